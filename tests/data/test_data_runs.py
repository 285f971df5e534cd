"""Data settings through the real loop: buckets, captions, sources, a hostile folder."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_images import build_hostile_folder
from tiny_models import build_image_folder
from training_runs import assert_equal, losses, train, weights

from sd_recipes.data.bad_rows import TooManyBadRows
from sd_recipes.errors import RecipeError
from sd_recipes.model.conditioning import CachedText
from sd_recipes.model.stable_diffusion import hidden_states


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Pictures of three shapes, 11 in all."""
    folder = tmp_path / "shapes"
    lines = []
    for name, size, number in (("wide", (96, 32), 5), ("tall", (40, 80), 4), ("square", (64, 64), 2)):
        build_image_folder(folder / name, number, size)
        for line in (folder / name / "metadata.jsonl").read_text().splitlines():
            row = json.loads(line)
            lines.append({"file_name": f"{name}/{row['file_name']}", "text": f"{name} {row['text']}"})
        (folder / name / "metadata.jsonl").unlink()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


BUCKETS = {"aspect_ratio_buckets": True, "bucket_step": 8, "train_batch_size": 4, "max_train_steps": 9}


def test_buckets_train_every_row_on_its_shape(settings: dict[str, Any], shapes: Path) -> None:
    run = train(settings, train_data_dir=str(shapes), **BUCKETS)
    batches = [batch for (batch,) in run.batches(0, 4)]
    by_size = {tuple(batch.pixels.shape[2:]): len(batch.weights) for batch in batches}
    assert len(batches) == 4, "2 of the wide, 1 of the tall, 1 of the square"
    assert len(by_size) == 3
    for (height, width), _ in by_size.items():
        assert height * width <= 32 * 32
        assert height % 8 == width % 8 == 0
    assert any(height > width for height, width in by_size)
    assert any(height < width for height, width in by_size)
    for batch in batches:
        assert batch.noise.shape[2:] == tuple(side // 4 for side in batch.pixels.shape[2:])


def test_accumulated_buckets_are_one_big_batch(settings: dict[str, Any], shapes: Path, tmp_path: Path) -> None:
    settings |= {**BUCKETS, "train_data_dir": str(shapes), "optimizer": "sgd", "learning_rate": 1e-2}
    one = train(settings, output_dir=str(tmp_path / "4x1"))
    two = train(settings, train_batch_size=2, gradient_accumulation_steps=2, output_dir=str(tmp_path / "2x2"))
    np.testing.assert_allclose(losses(one), losses(two), rtol=1e-4)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(two)[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cache", ["off", "disk"])
def test_resumed_buckets_are_the_uninterrupted_run(
    settings: dict[str, Any], shapes: Path, tmp_path: Path, cache: str
) -> None:
    settings |= {**BUCKETS, "train_data_dir": str(shapes), "checkpointing_steps": 6, "center_crop": True}
    settings |= {"cache_latents": cache, "latent_cache_dir": str(tmp_path / "kept")}
    uninterrupted = train(settings, output_dir=str(tmp_path / "uninterrupted"))
    checkpoint = str(tmp_path / "uninterrupted" / "checkpoint-6")
    resumed = train(settings, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=checkpoint)
    assert_equal(weights(uninterrupted), weights(resumed))


def test_pictures_too_small_for_their_bucket_get_a_smaller_one(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = build_image_folder(tmp_path / "small", 4, (16, 16))
    run = train(
        settings, train_data_dir=str(folder), **{**BUCKETS, "max_upscale": 1.5, "max_train_steps": 1, "resolution": 64}
    )
    [[batch]] = run.batches(0, 1)
    assert batch.pixels.shape[2:] == (24, 24)


def test_long_captions_are_cut_encoded_in_chunks_or_refused(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build_image_folder(tmp_path / "pictures")
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text().replace("disc number 3", "disc number 3 and very much more than sixteen tokens"))
    settings |= {"train_data_dir": str(folder), "train_batch_size": 8, "max_train_steps": 1}
    [[batch]] = train(settings).batches(0, 1)
    assert batch.input_ids.shape == (8, 16)
    in_chunks = train(settings, long_captions="chunk", caption_chunks=2)
    [[batch]] = in_chunks.batches(0, 1)
    assert batch.input_ids.shape == (8, 32)
    assert in_chunks.model.encode_text(batch.input_ids)["encoder_hidden_states"].shape == (8, 32, 32)
    for check_data in ("sample", "off"):
        with pytest.raises(RecipeError, match=r"tokens.*--long_captions"):
            train(settings, long_captions="error", check_data=check_data)
    assert "the captions of 1 of 8 rows are longer than 14 tokens and are cut" in caplog.text


def test_cached_text_is_the_text(settings: dict[str, Any]) -> None:
    run = train(settings, max_train_steps=1)
    [[batch]] = run.batches(0, 1)
    cached = CachedText(partial(run.model.family.encode_text, run.model.components))
    expected = hidden_states(run.model.components.text_encoder, batch.input_ids)
    for _ in range(2):
        torch.testing.assert_close(cached(batch.input_ids)["encoder_hidden_states"], expected)
    assert len(cached.states) == 4
    np.testing.assert_allclose(losses(train(settings, cache_text=True)), losses(train(settings)), rtol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_text_is_encoded_where_its_model_is(settings: dict[str, Any], cached: bool) -> None:
    """The loop hands over ids in the host's memory; here the model is on another device than the host's."""
    run = train(settings, max_train_steps=1)
    [[batch]] = run.batches(0, 1)
    components = run.model.components
    elsewhere = components.text_encoder.to("meta")
    given = []
    elsewhere.register_forward_pre_hook(lambda model, inputs: given.append(inputs[0].device.type))
    encode = partial(run.model.family.encode_text, components)
    (CachedText(encode) if cached else encode)(batch.input_ids)
    assert given == ["meta"]


def test_captions_come_from_a_template_and_blank_ones_by_the_setting(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = build_image_folder(tmp_path / "pictures")
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text().replace("disc number 3", ""))
    settings |= {"train_data_dir": str(folder), "train_batch_size": 8, "max_train_steps": 1}
    run = train(settings, caption_template="a picture of {text}")
    [[batch]] = run.batches(0, 1)
    assert batch.weights.tolist().count(0) == 1
    assert [name for name, _ in batch.bad] == [f"row 3 ({folder}/3.png)"]
    [[batch]] = train(settings, blank_captions="empty").batches(0, 1)
    assert batch.weights.tolist() == [1] * 8
    with pytest.raises(RecipeError, match=r"row 3.*--blank_captions error"):
        train(settings, blank_captions="error")


def test_several_sources_are_trained_in_their_shares(settings: dict[str, Any], tmp_path: Path) -> None:
    one, other = (build_image_folder(tmp_path / name, number) for name, number in (("one", 2), ("other", 6)))
    settings |= {"train_data_dir": None, "data_sources": [{"train_data_dir": str(one), "weight": 3}, {
        "train_data_dir": str(other)}]}  # fmt: skip
    run = train(settings)
    rows = np.concatenate([batch.plan.rows for (batch,) in run.batches(0, 2)])
    assert (rows < 2).sum() == 6
    assert np.isfinite(losses(run)).all()


def test_a_hostile_folder_trains_with_the_bad_rows_skipped_and_named(settings: dict[str, Any], tmp_path: Path) -> None:
    expected = build_hostile_folder(tmp_path / "hostile")
    settings |= {"train_data_dir": str(tmp_path / "hostile"), "train_batch_size": 5, "num_train_epochs": 2}
    settings |= {"max_train_steps": None, "dataloader_num_workers": 1}
    bad = {name for name, what in expected.items() if what.kind == "bad" and what.has_row}
    assert len(bad) > 10
    run = train(settings, max_bad_rows=len(bad), output_dir=str(tmp_path / "all"))
    lines = (tmp_path / "all" / "bad_rows.jsonl").read_text().splitlines()
    named = {Path(json.loads(line)["row"].split("(")[1].rstrip(")")).name for line in lines}
    assert named == {Path(name).name for name in bad}
    assert len(lines) == len(bad), "each once, in two epochs"
    assert np.isfinite(losses(run)).all()
    for check_data in ("off", "sample", "full"):
        output_dir = tmp_path / check_data
        with pytest.raises(TooManyBadRows, match=r"\(--max_bad_rows\).*hostile/"):
            train(settings, max_bad_rows=len(bad) - 1, check_data=check_data, output_dir=str(output_dir))
        assert (output_dir / "metrics.jsonl").exists() == (check_data == "off")


def test_a_stream_gives_the_batch_of_its_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    """The same rows at the same positions, once by number and once as they come."""
    by_number = train(settings, random_flip=True, max_train_steps=1)
    [[batch]] = by_number.batches(0, 1)
    plan = batch.plan
    examples = tuple(by_number.batches.builder.rows[int(row)] for row in plan.rows)
    as_they_come = by_number.batches.builder[replace(plan, examples=examples)]
    for field in fields(batch):
        one, other = getattr(batch, field.name), getattr(as_they_come, field.name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other), field.name
