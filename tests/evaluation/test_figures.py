"""Figures of tables of errors, against an independent computation; and which validation was best."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from sd_recipes.evaluation.figures import best_of, figures_of, held_out_losses
from sd_recipes.evaluation.sample_errors import SCHEMA


def table(scale: float, *, averaged: bool, training: bool = True) -> pa.Table:
    """Errors of 40 rows, whose loss depends on set, weights and timestep."""
    lines = []
    for weights, factor in [("averaged", 1.0), ("raw", 2.0)] if averaged else [("raw", 1.0)]:
        for which, offset in [("held_out", 3.0), ("train", 1.0)] if training else [("held_out", 3.0)]:
            lines += [(which, weights, row, 25 * row, scale * factor * (offset + row)) for row in range(40)]
    columns = dict(zip(SCHEMA.names, zip(*lines, strict=True), strict=True))
    return pa.table({name: list(values) for name, values in columns.items()}, SCHEMA)


def test_figures_are_means_of_the_errors() -> None:
    before, now = table(1.0, averaged=True), table(0.5, averaged=True)
    figures = figures_of(now, before, 1000)
    mean = np.arange(40).mean()
    assert figures["validation_loss"] == pytest.approx(0.5 * (3 + mean))
    assert figures["train_subset_loss"] == pytest.approx(0.5 * (1 + mean))
    assert figures["validation_gap"] == pytest.approx(0.5 * 2)
    assert figures["raw_validation_loss"] == pytest.approx(1.0 * (3 + mean))
    for number in range(10):
        rows = np.arange(4 * number, 4 * number + 4)  # timesteps 100 number … 100 number + 75
        assert figures[f"validation_loss_bin_{number}"] == pytest.approx(0.5 * (3 + rows.mean()))
        assert figures[f"train_subset_loss_bin_{number}"] == pytest.approx(0.5 * (1 + rows.mean()))
        assert figures[f"validation_excess_bin_{number}"] == pytest.approx(0.5)
        assert figures[f"raw_train_subset_excess_bin_{number}"] == pytest.approx(1.0), "over the evaluated ones before"
    assert np.mean([figures[f"validation_loss_bin_{n}"] for n in range(10)]) == pytest.approx(
        figures["validation_loss"]
    )


def test_what_was_not_measured_has_no_figures() -> None:
    alone = table(1.0, averaged=False, training=False)
    figures = figures_of(alone, alone, 1000)
    assert not [name for name in figures if name.startswith(("raw_", "train_subset"))]
    assert "validation_gap" not in figures
    early = alone.slice(0, 8)  # two bins of timesteps
    assert {name for name in figures_of(early, alone, 1000) if "_loss_bin_" in name} == {
        "validation_loss_bin_0", "validation_loss_bin_1",
    }  # fmt: skip


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    lines = [{"step": step, "validation_loss": loss} for step, loss in ((4, math.nan), (8, 1.0), (12, 0.5))]
    best = best_of(held_out_losses(lines))
    assert best is not None
    assert (best.step, best.since) == (12, 0)


def test_the_best_is_the_first_of_the_lowest_after_training_began() -> None:
    assert best_of({}) is None
    assert best_of({0: 1.0}) is None, "nothing was trained"
    best = best_of({0: 0.1, 10: 0.5, 20: 0.3, 30: 0.3, 40: 0.6})
    assert best is not None
    assert (best.step, best.loss, best.last_step, best.since) == (20, 0.3, 40, 2)
    assert best.excess == pytest.approx(1.0)
