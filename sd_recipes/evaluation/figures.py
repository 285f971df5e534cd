"""What a table of sample errors says: the loss on both sets of rows, the gap, and how it spreads over the timesteps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sd_recipes.evaluation.sample_errors import AVERAGED, HELD_OUT, RAW, TRAIN

NUM_BINS = 10
NAMES = {HELD_OUT: "validation", TRAIN: "train_subset"}  # of the sets, in figures
LOSS = "validation_loss"
FIGURES = {LOSS: "held-out loss", "image_text_score": "image-text score"}  # that the last lines compare


def figures_of(table: pa.Table, before: pa.Table, num_train_timesteps: int) -> dict[str, float]:
    """Figures of a validation by name.

    validation_loss, train_subset_loss    mean squared error of the held-out rows, and of as many training rows
    validation_gap                        the former less the latter
    …_loss_bin_0 … _9                     the same in ten equal bins of the timesteps, from the least noise on
    …_excess_bin_0 … _9                   that over its value `before`: below 1 is learned since then
    raw_…                                 likewise of the weights that are not averaged, where there is an average

    `before` is the table of a run's first validation, of step 0 if there is one; in an evaluation that of the first
    model. A set without usable rows has no figures; a bin without samples neither.
    """
    labels = set(table["weights"].to_pylist())
    figures: dict[str, float] = {}
    for weights in sorted(labels):
        prefix = "raw_" if weights == RAW and AVERAGED in labels else ""
        for which, name in NAMES.items():
            timesteps, losses = samples(table, which, weights)
            if not len(losses):
                continue
            figures[f"{prefix}{name}_loss"] = float(losses.mean())
            bins = bin_means(timesteps, losses, num_train_timesteps)
            # Before training, the averaged weights are the others.
            bins_before = bin_means(*samples(before, which, None), num_train_timesteps)
            for number, (loss, loss_before) in enumerate(zip(bins, bins_before, strict=True)):
                if math.isfinite(loss):
                    figures[f"{prefix}{name}_loss_bin_{number}"] = loss
                    if loss_before > 0:
                        figures[f"{prefix}{name}_excess_bin_{number}"] = loss / loss_before
        if {f"{prefix}{name}_loss" for name in NAMES.values()} <= figures.keys():
            figures[f"{prefix}validation_gap"] = (
                figures[f"{prefix}validation_loss"] - figures[f"{prefix}train_subset_loss"]
            )
    return figures


def samples(table: pa.Table, which: str, weights: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and losses, (N,) each, of a set; of the weights that are evaluated, if none are named."""
    if weights is None:
        weights = AVERAGED if AVERAGED in table["weights"].to_pylist() else RAW
    chosen = table.filter(pc.and_(pc.equal(table["set"], which), pc.equal(table["weights"], weights)))
    return chosen["timestep"].to_numpy(), chosen["loss"].to_numpy()


def bin_means(timesteps: np.ndarray, losses: np.ndarray, num_train_timesteps: int) -> list[float]:
    """Mean loss in each of ten equal bins of the timesteps; NaN for one without samples."""
    bins = timesteps.astype(np.int64) * NUM_BINS // num_train_timesteps
    counts = np.bincount(bins, minlength=NUM_BINS)
    sums = np.bincount(bins, losses, NUM_BINS)
    return [float(total / count) if count else math.nan for total, count in zip(sums, counts, strict=True)]


@dataclass(frozen=True)
class Best:
    """The validation with the lowest held-out loss so far, the last one, and how many came since the best."""

    step: int
    loss: float
    last_step: int
    last_loss: float
    since: int

    @property
    def excess(self) -> float:
        """By which part the last one's loss is higher."""
        return self.last_loss / self.loss - 1


def held_out_losses(lines: list[dict[str, Any]]) -> dict[int, float]:
    """The held-out loss by step, of a run's metrics; those that are finite."""
    return {line["step"]: line[LOSS] for line in lines if LOSS in line and math.isfinite(line[LOSS])}


def best_of(losses: Mapping[int, float]) -> Best | None:
    """The best of a run's validations, of held-out losses by step; the first of equal ones.

    Those before training do not count. None if there is no other.
    """
    steps = sorted(step for step in losses if step > 0)
    if not steps:
        return None
    best = min(steps, key=lambda step: losses[step])
    return Best(best, losses[best], steps[-1], losses[steps[-1]], len(steps) - 1 - steps.index(best))
