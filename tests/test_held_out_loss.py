"""The held-out loss: which timesteps its rows meet, and rows that cannot be used."""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import forget_accelerator

from sd_recipes.data.batches import Batch
from sd_recipes.model.latents import batch_moments
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import start_accelerator
from sd_recipes.training.build import Training, build_training


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """The timesteps that each of 8 held-out rows met, filled by every held-out loss with 8 of each."""
    monkeypatch.setattr("sd_recipes.evaluation.validation.MIN_HELD_OUT_SAMPLES", 64)
    timesteps: dict[int, list[int]] = defaultdict(list)

    def noted(vae: Any, batch: Batch, *rest: Any) -> Any:
        for row, timestep, weight in zip(
            batch.plan.rows.tolist(), batch.timesteps.tolist(), batch.weights.tolist(), strict=True
        ):
            timesteps[row] += [timestep] if weight else []
        return batch_moments(vae, batch, *rest)

    monkeypatch.setattr("sd_recipes.evaluation.validation.batch_moments", noted)
    return timesteps


def built(settings: dict[str, Any], **changes: Any) -> Training:
    recipe = Recipe(**{**settings, "validation_split": "train", "train_batch_size": 8, **changes})
    forget_accelerator()
    return build_training(recipe, start_accelerator(recipe))


def test_defect_19_every_held_out_row_meets_early_and_late_timesteps(
    settings: dict[str, Any], met: dict[int, list[int]]
) -> None:
    training = built(settings)
    loss = training.validator.held_out_loss(training)
    assert sorted(met) == list(range(8))
    for timesteps in met.values():
        assert np.bincount(np.array(timesteps) // 125).tolist() == [1] * 8, "one of 1000 timesteps in every eighth"
    # All are stratified: 64 slices of 15 or 16 timesteps.
    together = np.sort(np.concatenate(list(met.values())))
    assert (together < np.arange(1, 65) * 1000 / 64).all()
    assert (together + 1 > np.arange(64) * 1000 / 64).all()
    assert training.validator.held_out_loss(training) == loss, "always the same samples"


def test_defect_19_a_bad_held_out_row_is_named_once_and_leaves_no_timesteps_out(
    settings: dict[str, Any],
    image_folder: Path,
    tmp_path: Path,
    met: dict[int, list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = shutil.copytree(image_folder, tmp_path / "pictures")
    sorted(folder.glob("**/*.png"))[0].write_bytes(b"no picture")
    training = built(settings, train_data_dir=str(folder), check_data="off")
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            training.validator.held_out_loss(training)
    told = [record.getMessage() for record in caplog.records if "held-out rows" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("1 of 8 held-out rows cannot be used and are left out of the held-out loss: row ")
    assert met.pop(0) == []
    assert np.bincount(np.concatenate(list(met.values())) // 125).tolist() == [2 * 7] * 8
