"""The held-out loss: which timesteps its rows meet, and rows that cannot be used."""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from training_runs import build

from sd_recipes.commands.cache import fill_cache
from sd_recipes.data.batches import Batch
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.trackers import read_metrics
from sd_recipes.training.build import Run


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """The timesteps that each of 8 held-out rows met, filled by the first held-out loss with 8 of each."""
    timesteps: dict[int, list[int]] = defaultdict(list)

    all_moments = Batch.all_moments
    left = 64  # those of the training rows come after

    def noted(batch: Batch, *rest: Any) -> Any:
        nonlocal left
        if left > 0:
            left -= len(batch.weights)
            for row, timestep, weight in zip(
                batch.plan.rows.tolist(), batch.timesteps.tolist(), batch.weights.tolist(), strict=True
            ):
                timesteps[row] += [timestep] if weight else []
        return all_moments(batch, *rest)

    monkeypatch.setattr(Batch, "all_moments", noted)
    return timesteps


HELD_OUT = {"validation_split": "train", "train_batch_size": 8, "validation_samples": 64}


def held_out_loss(run: Run) -> float:
    run.validator(run.state, run.tracker)
    return read_metrics(run.tracker.path)[-1]["validation_loss"]


def test_defect_19_every_held_out_row_meets_early_and_late_timesteps(
    settings: dict[str, Any], met: dict[int, list[int]]
) -> None:
    run = build(settings, **HELD_OUT)
    loss = held_out_loss(run)
    assert sorted(met) == list(range(8))
    for timesteps in met.values():
        assert np.bincount(np.array(timesteps) // 125).tolist() == [1] * 8, "one of 1000 timesteps in every eighth"
    # All are stratified: 64 slices of 15 or 16 timesteps.
    together = np.sort(np.concatenate(list(met.values())))
    assert (together < np.arange(1, 65) * 1000 / 64).all()
    assert (together + 1 > np.arange(64) * 1000 / 64).all()
    assert held_out_loss(run) == loss, "always the same samples"


def test_defect_19_a_bad_held_out_row_is_named_once_and_leaves_no_timesteps_out(
    settings: dict[str, Any],
    image_folder: Path,
    tmp_path: Path,
    met: dict[int, list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = shutil.copytree(image_folder, tmp_path / "pictures")
    sorted(folder.glob("**/*.png"))[0].write_bytes(b"no picture")
    run = build(settings, **HELD_OUT, train_data_dir=str(folder), check_data="off")
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            held_out_loss(run)
    told = [record.getMessage() for record in caplog.records if "held-out rows" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("1 of 8 held-out rows cannot be used and are left out of the held-out loss: row ")
    assert met.pop(0) == []
    assert np.bincount(np.concatenate(list(met.values())) // 125).tolist() == [7] * 8


def test_errors_depend_neither_on_the_batch_nor_on_the_cache(settings: dict[str, Any], tmp_path: Path) -> None:
    run = build(settings, **HELD_OUT)
    together = errors(run)
    assert len(together) == 2 * 64, "of held-out and of training rows"
    run.validator.samples_at_once.number = 3
    assert_alike(errors(run), together, 1e-6)
    assert_alike(errors(build(settings, **HELD_OUT | {"train_batch_size": 1})), together, 1e-6)

    cached = {**settings, "cache_latents": "disk", "center_crop": True, "latent_cache_dir": str(tmp_path / "cache")}
    fill_cache(Recipe(**cached))
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    of_cache = build(settings, **HELD_OUT, train_data_dir=None, dataset_name=str(folder))
    assert_alike(errors(of_cache), together, 1e-3)


def errors(run: Run) -> pa.Table:
    found = run.validator.errors()
    assert found is not None
    return found


def assert_alike(one: pa.Table, other: pa.Table, rel: float) -> None:
    for name in ("set", "row", "timestep"):
        assert one[name].equals(other[name])
    assert one["loss"].to_pylist() == pytest.approx(other["loss"].to_pylist(), rel=rel)
