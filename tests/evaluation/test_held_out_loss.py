"""The held-out loss: which timesteps its rows meet, and rows that cannot be used."""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from training_runs import build

from sd_recipes.commands.cache import fill_cache
from sd_recipes.data.batches import Batch
from sd_recipes.evaluation import sample_errors
from sd_recipes.evaluation.sample_errors import of_set, sorted_table
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.trackers import read_metrics
from sd_recipes.training.run import Run


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


def test_a_process_may_have_no_sample(settings: dict[str, Any]) -> None:
    run = build(settings, validation_split="1", validation_samples=1)
    for samples in run.validator.samples.values():
        samples.own = slice(1, None, 2)  # the second of two processes
    encode_text = partial(run.model.family.encode_text, run.model.components)
    with run.validator.evaluating():
        found = [
            each.errors(
                run.validator._latents, encode_text, run.validator._losses, run.accelerator.device, 4, bar=False
            )
            for each in run.validator.samples.values()
        ]
    assert [len(table) for table in found] == [0, 0]
    assert sorted_table([of_set(table, "train", "raw") for table in found]).num_rows == 0


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_captions_and_pictures_are_encoded_once_and_the_errors_are_those_of_encoding_them_anew(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    run = build(settings, **HELD_OUT)
    encode_text, num_encoded = type(run.model.family).encode_text, 0

    def counted(self: Any, components: Any, input_ids: torch.Tensor) -> Any:
        nonlocal num_encoded
        num_encoded += len(input_ids)
        return encode_text(self, components, input_ids)

    monkeypatch.setattr(type(run.model.family), "encode_text", counted)
    pictures: list[int] = []
    run.model.components.vae.encoder.register_forward_pre_hook(lambda _, inputs: pictures.append(len(inputs[0])))
    for samples in run.validator.samples.values():
        samples.num_workers = num_workers
    first = errors(run)
    assert num_encoded == 2 * 64, "of held-out and of training rows"
    assert pictures
    pictures.clear()
    assert errors(run).equals(first)
    assert num_encoded == 2 * 64
    assert pictures == [], "nor does the VAE encode them again"
    for samples in run.validator.samples.values():
        samples.keeps_text, samples._kept = False, []
    assert errors(run).equals(first)
    assert errors(run).equals(first)
    assert num_encoded == 3 * 2 * 64


def test_text_states_beyond_the_bound_are_encoded_anew_and_told_of(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = build(settings, **HELD_OUT)
    whole = errors(run)
    states = run.validator.samples[sample_errors.HELD_OUT]._kept[0].states
    assert states is not None
    of_batch = sum(each.nbytes for each in states.values())
    monkeypatch.setattr(sample_errors, "MAX_TEXT_BYTES", 5 * of_batch)  # of the 8 batches of each set
    run = build(settings, **HELD_OUT)
    with caplog.at_level(logging.INFO):
        assert errors(run).equals(whole)
    assert "The captions of 24 of 64 samples are encoded anew at every validation" in caplog.text
    assert errors(run).equals(whole)


def test_text_states_of_a_trained_text_encoder_are_not_kept(settings: dict[str, Any]) -> None:
    run = build(settings, **HELD_OUT, train_text_encoder=True)
    assert not any(samples.keeps_text for samples in run.validator.samples.values())


def errors(run: Run) -> pa.Table:
    found = run.validator.errors()
    assert found is not None
    return found


def assert_alike(one: pa.Table, other: pa.Table, rel: float) -> None:
    for name in ("set", "row", "timestep"):
        assert one[name].equals(other[name])
    assert one["loss"].to_pylist() == pytest.approx(other["loss"].to_pylist(), rel=rel)
