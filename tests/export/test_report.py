"""The loss curve at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from sd_recipes.evaluation.verdict import figures_by_step
from sd_recipes.export import report


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures, as they were saved."""
    kept: list[Any] = []
    savefig = Figure.savefig

    def keep(self: Figure, *arguments: Any, **options: Any) -> None:
        kept.append(self)
        savefig(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def figures(validations: dict[int, tuple[float, float | None]]) -> dict[str, dict[int, float]]:
    found: list[dict[str, Any]] = [{"step": step, "train_loss": 0.2 + 0.001 * step} for step in range(1, 101)]
    for step, (held_out, training_rows) in validations.items():
        found.append({"step": step, "validation_loss": held_out})
        if training_rows is not None:
            found[-1]["train_subset_loss"] = training_rows
    return figures_by_step(found)


def test_the_curve_shows_both_losses_their_gap_and_the_best_step(figure: list[Any], tmp_path: Path) -> None:
    curve = {0: (0.4, 0.4), 50: (0.2, 0.18), 100: (0.25, 0.1)}
    report.draw_loss_curve(figures(curve), tmp_path / "curve.png")
    (axes,) = figure[0].axes
    drawn = {line.get_label(): np.asarray(line.get_xydata()) for line in axes.get_lines()}
    assert drawn["held-out loss, fixed noise"].tolist() == [[0, 0.4], [50, 0.2], [100, 0.25]]
    assert drawn["the same of training rows"].tolist() == [[0, 0.4], [50, 0.18], [100, 0.1]]
    assert drawn["best: step 50"][:, 0].tolist() == [50, 50]
    (gap,) = axes.collections
    corners = {tuple(corner) for path in gap.get_paths() for corner in path.vertices.tolist()}
    assert {(50, 0.2), (50, 0.18), (100, 0.25), (100, 0.1)} <= corners
    with Image.open(tmp_path / "curve.png") as picture:
        picture.load()


def test_the_curve_without_training_rows_or_without_validation(figure: list[Any], tmp_path: Path) -> None:
    report.draw_loss_curve(figures({0: (0.4, None), 50: (0.2, None)}), tmp_path / "curve.png")
    report.draw_loss_curve(figures({}), tmp_path / "curve.png")
    labels = [[line.get_label() for line in each.axes[0].get_lines()] for each in figure]
    assert labels[0][2:] == ["held-out loss, fixed noise", "best: step 50"]
    assert labels[1] == ["training loss", "training loss, running mean"]
    assert [len(each.axes[0].collections) for each in figure] == [0, 0]
