"""The weights with the lowest held-out loss so far, one copy, next to the checkpoints.

best/step-200/
  PART/          the evaluated weights of a trained part; unet/ loads as a UNet2DConditionModel
  state.json     the step, the held-out loss, and whether the weights are averaged
  manifest.json  as in a checkpoint

It is written like a checkpoint: a kill leaves the one before, or it, whole. Until there is a checkpoint that a killed
run would resume from with it, the one before stays, too.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file

from sd_recipes.checkpoints.format import (
    REMOVED,
    STATE,
    Contents,
    Manifest,
    folders_by_step,
    list_checkpoints,
    remove,
    remove_leftovers,
    step_of,
    verify_checkpoint,
    write_folder,
)
from sd_recipes.checkpoints.saver import FAILURES
from sd_recipes.errors import one_line
from sd_recipes.runtime.fsdp import gather
from sd_recipes.training.state import CONFIG, TrainState

logger = logging.getLogger(__name__)

BEST = "best"


def list_best(output_dir: Path) -> list[Path]:
    """The kept weights in a run's folder, by step; the last are the best."""
    return folders_by_step(output_dir / BEST, "step")


class BestWeights:
    """Keeps the best weights of a run, written by a thread. A context manager, which waits at its end for it."""

    def __init__(self, state: TrainState, output_dir: Path, manifest: Callable[[], Manifest], *, is_main: bool) -> None:
        """`manifest` describes the run where it stands."""
        self.state, self.output_dir, self.manifest, self.is_main = state, output_dir, manifest, is_main
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="best")
        self._running: Future[None] | None = None

    def __enter__(self) -> BestWeights:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True)
        if error[0] is None:
            self._wait()
            if self.is_main:
                _prune(self.output_dir)

    def keep(self, loss: float) -> None:
        """Keep the weights as they are now, of this held-out loss. Every process has to call it.

        What cannot be written is reported, and the run continues.
        """
        self._wait()
        contents = Contents(self.manifest())
        for part in self.state.parts.values():
            # Copies, which the next steps do not change.
            whole = gather(part.evaluated_tensors(), is_wanted=self.is_main, copied=True)
            contents.tensors[f"{part.name}/{part.weights_file}"] = whole
            contents.texts[f"{part.name}/{CONFIG}"] = part.config
        about = {"step": contents.manifest.step, "validation_loss": loss, "averaged": self.state.is_averaged}
        contents.texts[STATE] = json.dumps(about, indent=1) + "\n"
        if self.is_main:
            self._running = self._thread.submit(self._write, contents)

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _write(self, contents: Contents) -> None:
        step = contents.manifest.step
        folder = self.output_dir / BEST
        try:
            folder.mkdir(exist_ok=True)
            write_folder(contents, folder / f"step-{step}")
            _prune(self.output_dir)
        except FAILURES as error:
            logger.warning(
                "The weights of step %d, the best so far, cannot be kept in %s (%s): training continues.",
                step, folder, one_line(error),
            )  # fmt: skip


def _prune(output_dir: Path) -> None:
    """Remove all but the best, and but the best that the newest checkpoint knows of."""
    kept = list_best(output_dir)
    checkpoints = list_checkpoints(output_dir)
    resumed_from = step_of(checkpoints[-1]) if checkpoints else 0
    needed = {*kept[-1:], *[path for path in kept if step_of(path) <= resumed_from][-1:]}
    for path in kept:
        if path not in needed:
            os.replace(path, path.with_name(f".{path.name}{REMOVED}"))
    remove_leftovers(output_dir / BEST)


def remove_best(output_dir: Path, after: int) -> None:
    """Remove what was kept after a step, from which the run goes on."""
    for path in list_best(output_dir):
        if step_of(path) > after:
            logger.info("Removing %s: the run goes on from step %d.", path, after)
            remove(path)


def read_best(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Whole tensors by part and name. Raises DamagedCheckpoint, OSError and SafetensorError."""
    files = [name for name in verify_checkpoint(path).files if name.endswith(".safetensors")]
    return {name.partition("/")[0]: load_file(path / name) for name in files}
