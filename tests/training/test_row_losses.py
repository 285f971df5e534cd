"""How hard rows were to learn: by their losses in training, of all of them, and over a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from training_runs import build, fit_from, train

from sd_recipes.export.run_rows import rankings
from sd_recipes.training.row_losses import PRIOR, TRAINING_ROWS, RowLosses


def test_ratios_are_geometric_means_that_few_samples_pull_to_one() -> None:
    losses = RowLosses(4)
    losses.add(torch.tensor([0, 0, 1, 3]), torch.tensor([2.0, 8.0, 0.5, float("nan")], dtype=torch.float64))
    of_all = np.log(8) / 3
    expected = np.exp([(np.log(16) - 2 * of_all) / (2 + PRIOR), (np.log(0.5) - of_all) / (1 + PRIOR), 0, 0])
    assert losses.ratios == pytest.approx(expected)
    assert losses.counts.tolist() == [2, 1, 0, 0], "what is not finite does not count"
    assert losses.hardest(3) == [0], "those above their like only"


def test_what_was_noted_is_read_back_unless_the_rows_are_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses = RowLosses(5)
    losses.add(torch.tensor([1, 4, 4]), torch.tensor([2.0, 3.0, 0.5], dtype=torch.float64))
    losses.save(tmp_path, step=7)
    again, others = RowLosses(5), RowLosses(6)
    again.load(tmp_path)
    others.load(tmp_path)
    assert torch.equal(again.sums, losses.sums)
    assert torch.equal(again.counts, losses.counts)
    assert not others.counts.any()
    (tmp_path / "validation" / TRAINING_ROWS).write_bytes(b"torn")
    RowLosses(5).load(tmp_path)
    assert "cannot be read" in caplog.text


def test_every_row_that_is_trained_on_is_noted_and_the_hardest_are_shown(settings: dict[str, Any]) -> None:
    folder = Path(settings["output_dir"])
    settings |= {"max_train_steps": 24, "checkpointing_steps": 12, "validation_steps": 12, "validation_split": "2"}
    first = train(settings, max_train_steps=12)
    resumed = build(settings, resume_from_checkpoint="latest")
    fit_from(resumed)
    table = pq.read_table(folder / "validation" / TRAINING_ROWS)
    assert table["row"].to_pylist() == list(range(6)), "of 8, two are held out"
    before = first.state.quiet_loss.row_losses
    after = resumed.state.quiet_loss.row_losses
    assert before is not None
    assert after is not None
    assert after.counts.sum() == before.counts.sum() + 6 * 6, "the curve had begun: every sample of six epochs"
    assert table["samples"].to_pylist() == after.counts.long().tolist()
    shown = next(ranking for ranking in rankings(folder) if ranking.title == "Hardest to learn")
    assert [row.row for row in shown.rows] == after.hardest(10)
    assert shown.rows[0].caption == resumed.data.rows["text"][shown.rows[0].row]  # type: ignore[index]
    assert (shown.rows[0].thumbnail or "").startswith("data:image/jpeg")
