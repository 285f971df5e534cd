"""Checkpoints without waiting: a snapshot of the run in the host's memory, written by a thread."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from safetensors import SafetensorError

import sd_recipes
from sd_recipes.checkpoints.format import (
    CONFIG,
    FORMAT,
    OPTIMIZER,
    STATE,
    UNET_WEIGHTS,
    Contents,
    Manifest,
    Progress,
    write_checkpoint,
)
from sd_recipes.checkpoints.resume import flatten
from sd_recipes.errors import RunError
from sd_recipes.flags import written_settings
from sd_recipes.runtime.agreement import all_gather
from sd_recipes.runtime.fsdp import full_tensor

if TYPE_CHECKING:
    from sd_recipes.training.build import Training

logger = logging.getLogger(__name__)

# What a full or broken disk raises. Anything else is a bug, and ends the run.
FAILURES = (OSError, SafetensorError)
LONG_WAIT = 5.0  # seconds
SAVED = ("global_step", "samples_seen", "loss_sum", "logged_step", "awaits_validation")


class NotSaved(RunError):
    """The run is done, and its checkpoints or its pipeline could not be written."""

    status = 7


@dataclass(frozen=True)
class Part:
    """One tensor of the run, and the file and name under which it is saved."""

    file: str
    name: str
    tensor: torch.Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch computes with one thread.

    Several copy memory hardly faster, and wait for each other at every tensor: on two busy cores 215 tensors of 4 MB
    took 2.5 s with two threads, and 0.08 s with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Checkpointer:
    """Saves a run, on its main process; at most one checkpoint is being written at a time.

    A context manager, which does not end before what is being written is. `save` returns when everything is
    copied into buffers in the host's memory (on a GPU: when the copies are queued before whatever comes next).
    The buffers are as large as a checkpoint, pinned for a GPU, and kept, because touching fresh memory takes
    longer than copying into it.
    """

    def __init__(self, training: Training, output_dir: Path, identity: dict[str, Any]) -> None:
        self.training = training
        self.output_dir = output_dir
        self.num_written = 0
        self.failure: str | None = None  # of the last one, if it could not be written
        self._identity = identity
        self._saved_at = time.monotonic()
        self._has_room = self._warned_of_waiting = False
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def is_overdue(self) -> bool:
        """Whether the last checkpoint is `--checkpointing_minutes` ago."""
        minutes = self.training.recipe.checkpointing_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()
        elif self._running is not None and (bug := self._running.exception()):
            logger.error("The last checkpoint was not written either: %r", bug)

    def allocate_buffers(self) -> None:
        """Make the buffers, in the thread and once; when the optimizer has its state, that is after a step."""
        recipe = self.training.recipe
        is_far = recipe.checkpointing_steps > self.training.max_train_steps and recipe.checkpointing_minutes is None
        if self._has_room or is_far or not self.training.accelerator.is_main_process:
            return
        self._has_room = True
        self._running = self._thread.submit(self._make_buffers, self._parts())

    def save(self, progress: Progress) -> None:
        """Write a checkpoint in the background. Every process has to call it.

        One that is still being written is waited for. What cannot be written is told, and the run goes on.
        """
        asked = time.monotonic()
        self.wait()
        self._saved_at = time.monotonic()
        streams = all_gather(progress.stream_state)  # here the others wait until the first has written
        if not self.training.accelerator.is_main_process:
            for part in self._parts():
                full_tensor(part.tensor)  # which the first process asks for
            return
        was_writing = self.num_written > 0 or self.failure is not None
        if was_writing and self._saved_at - asked > LONG_WAIT and not self._warned_of_waiting:
            self._warned_of_waiting = True
            logger.warning(
                "Training stood still for %.0f s, until the checkpoint before was written: a larger "
                "--checkpointing_steps, or a faster disk, would spare that.",
                self._saved_at - asked,
            )
        contents = self._contents(progress, streams)
        parts = self._parts()
        self._make_buffers(parts)
        self._has_room = True  # also so that nothing takes the place of the writing that is waited for
        # Without any tensors too, as of SGD without momentum, or before the loss scaler let a step pass.
        contents.tensors[OPTIMIZER] = {}
        with one_thread():
            for part in parts:
                buffer = self._buffers[part.file, part.name]
                # A copy from the GPU is queued there before the next step's kernels, which change its source. Only
                # what is pinned is waited for by the writer.
                buffer.copy_(full_tensor(part.tensor), non_blocking=buffer.is_pinned())
                contents.tensors.setdefault(part.file, {})[part.name] = buffer
        copied = torch.cuda.Event() if self.training.accelerator.device.type == "cuda" else None
        if copied:
            copied.record()
        self._running = self._thread.submit(self._write, contents, copied)

    def wait(self) -> None:
        """Until nothing is being written. Raises what was raised there, but for a disk's failures."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    @property
    def not_saved(self) -> str | None:
        """Why no checkpoint at all could be written."""
        return None if self.num_written else self.failure

    def _write(self, contents: Contents, copied: torch.cuda.Event | None) -> None:
        if copied:
            copied.synchronize()
        try:
            write_checkpoint(contents, self.output_dir, self.training.recipe.checkpoints_total_limit)
            self.num_written += 1
            self.failure = None
        except FAILURES as error:
            self.failure = " ".join(str(error).split())[:300]
            logger.warning(
                "checkpoint-%d cannot be written (%s): training goes on; the checkpoints before it are kept.",
                contents.manifest.step,
                self.failure,
            )

    def _parts(self) -> list[Part]:
        training = self.training
        parts = [
            Part(f"unet/{UNET_WEIGHTS}", name, tensor) for name, tensor in training.components.unet.state_dict().items()
        ]
        if training.ema:
            parts += [
                Part(f"unet_ema/{UNET_WEIGHTS}", name, tensor) for name, tensor in training.ema.named_tensors().items()
            ]
        state = flatten(training.optimizer.state_dict()["state"])
        parts += [Part(OPTIMIZER, name, value) for name, value in state if isinstance(value, torch.Tensor)]
        return parts

    def _make_buffers(self, parts: list[Part]) -> None:
        for part in parts:
            place = part.file, part.name
            if place not in self._buffers:
                # With the tensor's own strides, so that the copy is one of plain memory.
                size, strides, pinned = part.tensor.size(), part.tensor.stride(), part.tensor.device.type == "cuda"
                buffer = torch.empty_strided(size, strides, dtype=part.tensor.dtype, pin_memory=pinned)
                self._buffers[place] = buffer.zero_()

    def _contents(self, progress: Progress, streams: list[dict[str, Any] | None]) -> Contents:
        """Everything but the tensors."""
        training, recipe = self.training, self.training.recipe
        scaler = training.accelerator.scaler
        state = {
            "progress": {name: value for name, value in asdict(progress).items() if name in SAVED},
            "streams": streams,
            "optimizer_values": {
                name: value
                for name, value in flatten(training.optimizer.state_dict()["state"])
                if not isinstance(value, torch.Tensor)
            },
            "schedule_step": training.schedule.last_epoch,
            "scaler": scaler.state_dict() if scaler else None,
            "ema_step": training.ema.model.optimization_step if training.ema else None,
        }
        texts = {STATE: json.dumps(state, indent=1) + "\n", f"unet/{CONFIG}": training.unet_config}
        if training.ema:
            texts[f"unet_ema/{CONFIG}"] = training.unet_config
        manifest = Manifest(
            format=FORMAT,
            step=progress.global_step,
            samples_seen=progress.samples_seen,
            world_size=training.accelerator.num_processes,
            versions={
                "sd-recipes": sd_recipes.__version__,
                "torch": str(torch.__version__),
                "diffusers": diffusers.__version__,
            },
            settings=written_settings(recipe),
            identity=self._identity,
        )
        return Contents(manifest, texts)
