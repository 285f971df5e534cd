"""Checkpoints without waiting: a snapshot of the run in host memory, written by a thread."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

import sd_recipes
from sd_recipes.checkpoints.format import FORMAT, STATE, Contents, Manifest, write_checkpoint
from sd_recipes.checkpoints.snapshots import keep_snapshot
from sd_recipes.errors import RunError, one_line
from sd_recipes.recipe import CheckpointConfig
from sd_recipes.runtime.agreement import all_gather, broadcast
from sd_recipes.runtime.fsdp import full_tensor
from sd_recipes.runtime.host_memory import buffers_like
from sd_recipes.training.state import StateDict, TrainState

logger = logging.getLogger(__name__)

# Errors of a full or broken disk. Anything else is a bug, and ends the run.
FAILURES = (OSError, SafetensorError)
LONG_WAIT = 5.0  # seconds


class NotSaved(RunError):
    """The run has ended, but its checkpoints or its pipeline could not be written."""

    status = 7


@contextmanager
def one_thread() -> Iterator[None]:
    """Within this context torch computes with one thread.

    Several copy memory hardly faster, and wait for each other at every tensor: on two busy cores, 215 tensors of 4 MB
    took 2.5 s with two threads, and 0.08 s with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class BackgroundSaver:
    """Saves a run's state, on its main process; at most one checkpoint is being written at a time.

    A context manager, which waits at its end for what is being written. `save` returns when everything is
    copied into buffers in host memory (on a GPU: when the copies are queued ahead of whatever comes next).
    The buffers are as large as a checkpoint, pinned for a GPU, and kept, because touching fresh memory takes
    longer than copying into it.
    """

    def __init__(
        self,
        state: TrainState,
        accelerator: Accelerator,
        config: CheckpointConfig,
        output_dir: Path,
        *,
        settings: dict[str, Any],
        identity: dict[str, Any],
        num_steps: int,
    ) -> None:
        """`settings` and `identity` go into the manifests; `num_steps` are those of the whole run."""
        self.state, self.accelerator, self.config, self.output_dir = state, accelerator, config, output_dir
        self.num_written = 0
        self.failure: str | None = None  # of the last one, if it could not be written
        self._settings, self._identity, self._num_steps = settings, identity, num_steps
        self._saved_at = time.monotonic()
        self._has_buffers = self._warned_of_waiting = False
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def is_due(self, *, is_logged: bool) -> bool:
        """Every so many steps, or minutes; several processes check these only when they log, as they have to agree."""
        step = self.state.progress.global_step
        if step == self._num_steps or step % self.config.checkpointing_steps == 0:
            return True
        if self.config.checkpointing_minutes is None:
            return False
        if self.accelerator.num_processes == 1:
            return self._is_overdue()
        return is_logged and broadcast(self._is_overdue())

    def _is_overdue(self) -> bool:
        minutes = self.config.checkpointing_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()
        elif self._running is not None and (bug := self._running.exception()):
            logger.error("The last checkpoint was not written either: %r", bug)

    def allocate_buffers(self) -> None:
        """Make the buffers, once, in the thread; to be called after a step, when the optimizer has its state."""
        is_far = self.config.checkpointing_steps > self._num_steps and self.config.checkpointing_minutes is None
        if self._has_buffers or is_far or not self.accelerator.is_main_process:
            return
        self._has_buffers = True
        self._running = self._thread.submit(self._make_buffers, self.state.state_dict(only_layout=True))

    def save(self) -> None:
        """Write a checkpoint in the background. Every process has to call it.

        It waits for one that is still being written. What cannot be written is reported, and the run continues.
        """
        asked = time.monotonic()
        self.wait()
        self._saved_at = time.monotonic()
        state = self.state.state_dict()
        streams = all_gather(self.state.progress.stream_state)  # here the others wait until the first one has written
        if not self.accelerator.is_main_process:
            for named in state.tensors.values():
                for tensor in named.values():
                    full_tensor(tensor)  # which the first process asks for
            return
        was_writing = self.num_written > 0 or self.failure is not None
        if was_writing and self._saved_at - asked > LONG_WAIT and not self._warned_of_waiting:
            self._warned_of_waiting = True
            logger.warning(
                "Training stood still for %.0f s, until the previous checkpoint was written: a larger "
                "--checkpointing_steps, or a faster disk, would avoid that.",
                self._saved_at - asked,
            )
        contents = self._contents(state, streams)
        self._make_buffers(state)
        self._has_buffers = True  # also so that `allocate_buffers` does not replace the writing that `wait` waits for
        with one_thread():
            for file, named in state.tensors.items():
                buffers = contents.tensors[file] = {name: self._buffers[file, name] for name in named}
                for name, tensor in named.items():
                    # A copy from the GPU is queued there ahead of the next step's kernels, which change its source.
                    # The writer waits only for copies into pinned memory.
                    buffers[name].copy_(full_tensor(tensor), non_blocking=buffers[name].is_pinned())
        copied = torch.cuda.Event() if self.accelerator.device.type == "cuda" else None
        if copied:
            copied.record()
        self._running = self._thread.submit(self._write, contents, copied)

    def wait(self) -> None:
        """Wait until nothing is being written. Raises what was raised there, except for failures of the disk."""
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
            checkpoint = write_checkpoint(contents, self.output_dir, self.config.checkpoints_total_limit)
            self.num_written += 1
            self.failure = None
        except FAILURES as error:
            self.failure = one_line(error)
            logger.warning(
                "checkpoint-%d cannot be written (%s): training continues; earlier checkpoints are kept.",
                contents.manifest.step,
                self.failure,
            )
            return
        try:
            keep_snapshot(checkpoint, contents.manifest, self.output_dir, self.config.ema_snapshots_limit)
        except FAILURES as error:
            logger.warning(
                "The averages of %s cannot be kept in %s (%s): training continues, and `sd-recipes average` will do "
                "without them.", checkpoint.name, self.output_dir, one_line(error),
            )  # fmt: skip

    def _make_buffers(self, state: StateDict) -> None:
        tensors = {(file, name): each for file, named in state.tensors.items() for name, each in named.items()}
        new = [key for key in tensors if key not in self._buffers]
        # With the tensors' own strides, so that a copy is a plain memory copy.
        self._buffers |= zip(new, buffers_like(tensors[key] for key in new), strict=True)

    def manifest(self) -> Manifest:
        """Which run this is, and where it stands."""
        progress = self.state.progress
        return Manifest(
            format=FORMAT,
            step=progress.global_step,
            samples_seen=progress.samples_seen,
            world_size=self.accelerator.num_processes,
            versions={
                "sd-recipes": sd_recipes.__version__,
                "torch": str(torch.__version__),
                "diffusers": diffusers.__version__,
            },
            settings=self._settings,
            identity=self._identity,
        )

    def _contents(self, state: StateDict, streams: list[dict[str, Any] | None]) -> Contents:
        """Everything but the tensors."""
        values = json.dumps({**state.values, "streams": streams}, indent=1) + "\n"
        return Contents(self.manifest(), {STATE: values, **state.texts})
