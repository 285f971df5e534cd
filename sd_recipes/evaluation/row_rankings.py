"""Which rows stand out by their loss: the hardest, those learned first, those learned by heart.

A row is measured at a few timesteps only, and the loss differs far more between timesteps than between rows. So a
sample is compared with its like: what the other samples of its set have, on average, at its timestep t. That is a line
fitted around t to the logarithms of their losses, weighted by exp(-((t - t') / h)² / 2), the sample itself left out.
All figures are ratios, averaged over a row's samples: 1 is like the others.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sd_recipes.errors import one_line
from sd_recipes.evaluation.sample_errors import AVERAGED, HELD_OUT, METADATA, RAW, TRAIN, read_table
from sd_recipes.runtime.trackers import list_tables

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
BANDWIDTH = 0.05  # h, as a part of all timesteps
NEIGHBOURS = 4  # with few samples, h is wide enough for about so many on either side
MIN_ROWS = 5  # fewer have no like
TINY = float(np.finfo(float).tiny)


@dataclass(frozen=True)
class RowLosses:
    """The losses of one set of rows at one validation; all arrays (N,), one element a sample."""

    step: int
    num_train_timesteps: int
    row: np.ndarray  # int64
    timestep: np.ndarray  # int64
    log_loss: np.ndarray  # float64: of the sample's mean squared error

    @property
    def num_rows(self) -> int:
        return len(np.unique(self.row))


@dataclass(frozen=True)
class RankedRow:
    """A row of a set that stands out by its `ratio` to its like; each ranking says what these are."""

    row: int
    ratio: float
    own: float  # the row's loss, or its change, not relative to its like
    to_held_out: float | None = None


def read_validations(output_dir: Path, at_most: int) -> list[dict[str, RowLosses]]:
    """The losses of `at_most` of a run's validations, evenly chosen, in order of steps; each by set (held_out, train).

    They are those of the weights that are exported: the averaged ones, where there is an average. A file that is torn,
    or no such table, is left out with a warning.
    """
    found = []
    for path in evenly_spaced(list_tables(output_dir), at_most):
        try:
            found.append(read_losses(path))
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
            logger.warning("%s is not a table of losses (%s): it is left out.", path, one_line(error, 100))
    return found


def read_losses(path: Path) -> dict[str, RowLosses]:
    """The losses of one validation by set. Raises OSError, ValueError, LookupError, TypeError or pa.ArrowException."""
    table = read_table(path)
    about = json.loads((table.schema.metadata or {})[METADATA])
    step, num_train_timesteps = int(about["step"]), int(about["num_train_timesteps"])
    weights = table["weights"]
    exported = AVERAGED if pc.any(pc.equal(weights, AVERAGED)).as_py() else RAW
    table = table.filter(pc.and_(pc.equal(weights, exported), pc.is_finite(table["loss"])))
    found = {}
    for name in (HELD_OUT, TRAIN):
        of_set = table.filter(pc.equal(table["set"], name))
        # Numbers that are multiplied: int32 would overflow.
        row, timestep = (of_set[column].to_numpy().astype(np.int64) for column in ("row", "timestep"))
        if len(row):
            if timestep.min() < 0 or timestep.max() >= num_train_timesteps:
                raise ValueError(f"its timesteps are not all in 0 … {num_train_timesteps - 1}")
            log_loss = np.log(np.maximum(of_set["loss"].to_numpy(), TINY))
            found[name] = RowLosses(step, num_train_timesteps, row, timestep, log_loss)
    return found


def evenly_spaced(items: Sequence[Item], number: int) -> list[Item]:
    """At most `number` of the items, the first and the last among them."""
    if len(items) <= number:
        return list(items)
    return [items[round(n * (len(items) - 1) / (number - 1))] for n in range(number)]


def hardest(validations: Sequence[RowLosses], number: int) -> list[RankedRow]:
    """The rows with the highest loss, relative to their like and above it: wrong captions, odd or crowded pictures.

    ratio = mean over the row's samples of loss / exp(f(t)), where f(t) is the like's log loss at the sample's t; over
    its samples at all of `validations`. With the last one alone these are the rows that are hardest at the end. In a
    training row a wrong caption is learned by heart in time, and stands out over all validations only.
    `own` is the mean of the row's losses.
    """
    validations = [each for each in validations if each.num_rows >= MIN_ROWS]
    if not validations:
        return []
    row = np.concatenate([each.row for each in validations])
    loss = np.exp(np.concatenate([each.log_loss for each in validations]))
    like = np.exp(np.concatenate([_like(each, each.log_loss) for each in validations]))
    rows, ratios, owns = _mean_by_row(row, loss / like, loss)
    ranked = [RankedRow(*each) for each in zip(rows, ratios, owns, strict=True) if each[1] > 1]
    return sorted(ranked, key=lambda each: -each.ratio)[:number]


def learned_first(validations: Sequence[RowLosses], number: int) -> tuple[int, list[RankedRow]] | None:
    """The step by which half was learned, and the rows whose loss had fallen most by then, relative to their like.

    `validations` are of one set, in order of steps. With d = log(loss at a validation / loss at the first) of a sample,
    half was learned at the first validation whose mean d is at most half of the lowest mean d. There,
    ratio = exp(mean over the row's samples of [d - g(t)]), where g(t) is the like's d at t, and `own` is exp(mean d):
    what was left of the row's loss. Only rows that fell below their like. None if the mean d never fell below 0.
    """
    if not validations or validations[0].num_rows < MIN_ROWS:
        return None
    falls = [fall for each in validations[1:] if len((fall := _fall(validations[0], each)).row)]
    lowest = min((fall.log_loss.mean() for fall in falls), default=0.0)
    if lowest >= 0:
        return None
    half = next(fall for fall in falls if fall.log_loss.mean() <= lowest / 2)
    return half.step, _fallen(half)[:number]


def memorised(
    start: RowLosses, end: RowLosses, number: int, held_out: tuple[RowLosses, RowLosses] | None = None
) -> list[RankedRow]:
    """The training rows whose loss fell most below that of their like: duplicates, and what is learned by heart.

    `start` and `end` are the first and the last validation of training rows, `held_out` the same of held-out rows.
    With d = log(loss at the end / loss at the start) of a sample, ratio = exp(mean over the row's samples of
    [d - g(t)]), where g(t) is what other training rows have for d at t; `to_held_out` is the same against held-out
    rows, and None without them; `own` is exp(mean d). Only rows below both are listed. A ratio of 0.5 means that half
    as much of the loss is left as of the like's.
    """
    fall = _fall(start, end)
    if fall.num_rows < MIN_ROWS:
        return []
    against_held_out = None
    if held_out and (like := _fall(*held_out)).num_rows >= MIN_ROWS:
        against_held_out = fall.log_loss - _like(like, like.log_loss, fall.timestep)
    ranked = _fallen(fall, against_held_out)
    return [row for row in ranked if row.to_held_out is None or row.to_held_out < 1][:number]


def _fall(start: RowLosses, end: RowLosses) -> RowLosses:
    """log(loss at the end / loss at the start) of the samples that both validations have."""
    keys = [each.row * each.num_train_timesteps + each.timestep for each in (start, end)]
    _, before, after = np.intersect1d(*keys, return_indices=True)
    change = end.log_loss[after] - start.log_loss[before]
    return RowLosses(end.step, end.num_train_timesteps, end.row[after], end.timestep[after], change)


def _like(samples: RowLosses, values: np.ndarray, at: np.ndarray | None = None) -> np.ndarray:
    """What samples have for `values`, (N,), on average at the timesteps `at`, (M,).

    By default at their own, where each sample is left out of its own average. A local linear fit by the sums of
    k(t - t') (t - t')^p over the samples, which are convolutions over all timesteps.
    """
    num_timesteps = samples.num_train_timesteps
    width = num_timesteps * min(1.0, max(BANDWIDTH, NEIGHBOURS / len(values)))
    distance = np.arange(1 - num_timesteps, num_timesteps)
    kernel = np.exp(-((distance / width) ** 2) / 2)
    counts = np.bincount(samples.timestep, minlength=num_timesteps).astype(float)
    sums = np.bincount(samples.timestep, weights=values, minlength=num_timesteps)
    where = samples.timestep if at is None else at

    def convolved(of: np.ndarray, power: int) -> np.ndarray:
        return np.convolve(of, kernel * (distance / width) ** power, mode="valid")[where]

    weight, slope, spread = (convolved(counts, power) for power in (0, 1, 2))
    total, sloped = (convolved(sums, power) for power in (0, 1))
    if at is None:
        weight, total = weight - 1, total - values  # the sample itself, at distance 0
    # A trace of the overall mean, and of a level line, where there are no neighbours to fit a line to.
    weight, total = weight + 1e-6, total + 1e-6 * values.mean()
    spread = spread + 1e-3 * weight
    return (spread * total - slope * sloped) / (spread * weight - slope**2)


def _fallen(fall: RowLosses, beyond_held_out: np.ndarray | None = None) -> list[RankedRow]:
    """The rows whose `fall` was below their like's, the farthest first; `beyond_held_out` is (N,), a logarithm."""
    beyond = fall.log_loss - _like(fall, fall.log_loss)
    others = [] if beyond_held_out is None else [beyond_held_out]
    rows, *means = _mean_by_row(fall.row, beyond, fall.log_loss, *others)
    ranked = [RankedRow(row, *map(math.exp, each)) for row, *each in zip(rows, *means, strict=True)]
    return sorted((row for row in ranked if row.ratio < 1), key=lambda row: row.ratio)


def _mean_by_row(row: np.ndarray, *values: np.ndarray) -> list[list[Any]]:
    """The rows' numbers, and of each of `values`, (N,), the mean over the row's samples."""
    rows, place, counts = np.unique(row, return_inverse=True, return_counts=True)
    return [rows.tolist(), *((np.bincount(place, weights=each) / counts).tolist() for each in values)]
