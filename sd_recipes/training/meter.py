"""Figures of training for the console and the trackers: mean loss, speed, and how long it waits for data."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from sd_recipes.training.phases import phase
from sd_recipes.training.state import Progress

logger = logging.getLogger(__name__)

MUCH_WAITING = 0.1  # share of the time that is spent waiting for data
SECONDS_TO_JUDGE = 30  # of training: the first batch always takes long

Item = TypeVar("Item")


class Meter:
    """Mean loss, speed and waiting since the last log; the loss stays on the device until then."""

    def __init__(self, device: torch.device, progress: Progress, remedy: str) -> None:
        """`remedy` is what to do about a loader that is slower than the model."""
        self.loss = torch.tensor(progress.loss_sum, device=device)
        self.steps_from = progress.logged_step
        self.steps_without_rows = progress.steps_without_rows
        self.grad_norm = 0.0  # of the last step, before clipping
        self.remedy = remedy
        self._waited_in_all = self._elapsed_in_all = 0.0
        self._warned = self._warned_of_fragmentation = False
        self.restart(progress)

    def restart(self, progress: Progress) -> None:
        """Start timing here: at the beginning, and after each log."""
        self.samples_from = progress.samples_seen
        self.waited = 0.0
        self.started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within this context, such as a validation, does not count as training time."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def waits(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items; measures how long the loop waits for them."""
        while True:
            asked = time.perf_counter()
            with phase("data"):
                item = next(items, None)
            self.waited += time.perf_counter() - asked
            if item is None:
                return
            yield item

    def add(self, loss: torch.Tensor, usable: float) -> None:
        """Add a step's loss, summed over the `usable` part of the global batch and divided by its whole size."""
        self.loss += loss.detach() / usable

    def add_none(self) -> None:
        """Add a step that has no loss: none of its rows was usable, or what came of them was not finite."""
        self.steps_without_rows += 1

    def warn_of_fragmentation(self, held: float, used: float) -> None:
        """Tell once how much of a GPU torch holds, and of how much there was ever use at once, in GB."""
        if not self._warned_of_fragmentation:
            self._warned_of_fragmentation = True
            logger.warning(
                "torch holds %.1f GB of the GPU in pieces, of which at most %.1f GB were in use at once: fewer shapes "
                "of pictures, or PYTORCH_ALLOC_CONF=expandable_segments:True if it is set otherwise, make it less.",
                held, used,
            )  # fmt: skip

    def close(self, loss: float, progress: Progress) -> dict[str, float]:
        """Mean of the steps' losses, whose sum over all processes is `loss`; speed, share of waiting, gradient norm.

        Some steps have no loss; nor do the figures if there were only such steps.
        """
        elapsed = time.perf_counter() - self.started
        figures = {}
        if num_losses := progress.global_step - self.steps_from - self.steps_without_rows:
            figures["train_loss"] = loss / num_losses
        figures |= {
            "images_per_second": (progress.samples_seen - self.samples_from) / elapsed,
            "data_wait": self.waited / elapsed,
        }
        # It is not at a step that was skipped, or that had no usable row; JSON has no infinity.
        if math.isfinite(self.grad_norm):
            figures["grad_norm"] = self.grad_norm
        self._waited_in_all += self.waited
        self._elapsed_in_all += elapsed
        share = self._waited_in_all / self._elapsed_in_all
        if share > MUCH_WAITING and self._elapsed_in_all > SECONDS_TO_JUDGE and not self._warned:
            self._warned = True
            logger.warning("%.0f %% of the time is spent waiting for data: try %s", 100 * share, self.remedy)
        self.loss.zero_()
        self.steps_from, self.steps_without_rows = progress.global_step, 0
        self.restart(progress)
        return figures
