"""The latent cache: keys, files, readers and writers; and training with it."""

from __future__ import annotations

import copy
import json
import os
import threading
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import build_tiny_pipeline
from training import assert_equal, forget_accelerator, losses, train, weights

from sd_recipes.accelerator import start_accelerator
from sd_recipes.build import build_training
from sd_recipes.data.cache import LatentCache, moments_of, row_key
from sd_recipes.data.order import GlobalBatch, share
from sd_recipes.fill_cache import fill_cache, rows_of_no_data
from sd_recipes.model.latents import batch_moments
from sd_recipes.recipe import Recipe, RecipeError

MADE = {"format": 1, "dtype": "fp16", "flips": True, "vae": "x", "size": 64}


def record(number: int) -> dict[str, Any]:
    return {"key": row_key({"bytes": b"%d" % number, "path": None}), "height": 64, "width": 64, "text": f"row {number}"}


def filled(folder: Path, numbers: range, **changes: Any) -> tuple[LatentCache, torch.Tensor]:
    cache = LatentCache(folder, {**MADE, **changes}, rank=0)
    moments = torch.randn(len(numbers), 8, 4, 4, generator=torch.Generator().manual_seed(0))
    cache.put([record(number) for number in numbers], moments, -moments)
    cache.flush()
    return cache, moments


def test_what_was_kept_is_found_by_a_new_reader(tmp_path: Path) -> None:
    _, moments = filled(tmp_path, range(5))
    reader = LatentCache(tmp_path, MADE, rank=3)
    assert reader.num_rows == 5
    for number in range(5):
        row = reader.find(record(number)["key"])
        assert row is not None
        found = moments_of(row, flip=False, latent_shape=(4, 4, 4))
        assert torch.equal(found, moments[number].half().float())
        assert torch.equal(moments_of(row, flip=True, latent_shape=(4, 4, 4)), -found)
    assert reader.find(record(5)["key"]) is None


@pytest.mark.parametrize("change", [{"vae": "y"}, {"size": 128}, {"dtype": "bf16"}, {"flips": False}])
def test_anything_else_that_made_the_moments_is_another_cache(tmp_path: Path, change: dict[str, Any]) -> None:
    filled(tmp_path, range(5))
    assert LatentCache(tmp_path, {**MADE, **change}, rank=0).num_rows == 0


def test_a_changed_picture_is_a_miss(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(path)
    before = row_key({"bytes": None, "path": str(path)})
    assert before == row_key({"bytes": None, "path": str(path)})
    Image.new("RGB", (8, 8), "blue").save(path)
    os.utime(path, ns=(1, 1))
    assert before != row_key({"bytes": None, "path": str(path)})
    assert row_key({"bytes": b"a", "path": "x"}) != row_key({"bytes": b"b", "path": "x"})


def test_files_are_data_sets(tmp_path: Path) -> None:
    cache, _ = filled(tmp_path, range(3))
    for streaming in (False, True):
        rows = datasets.load_dataset(
            "arrow", data_files=str(cache.folder / "*.arrow"), split="train", streaming=streaming
        )
        assert [row["text"] for row in rows] == ["row 0", "row 1", "row 2"]
        assert json.loads(next(iter(rows))["made_by"]) == MADE


def test_moments_that_were_made_in_several_ways_are_no_data_set(settings: dict[str, Any], tmp_path: Path) -> None:
    cached = settings | {"cache_latents": "disk", "latent_cache_dir": str(tmp_path / "latents"), "max_train_steps": 2}
    train(cached, center_crop=True)
    train(cached, crop="none", output_dir=str(tmp_path / "second"))
    data = settings | {
        "dataset_name": str(tmp_path / "latents" / "*" / "*.arrow"),
        "output_dir": str(tmp_path / "third"),
    }
    del data["train_data_dir"]
    with pytest.raises(RecipeError, match="were made in 2 ways, which differ in crop: name the folder of one"):
        train(data)
    other = build_tiny_pipeline(tmp_path / "other", seed=1)
    train(cached, crop="none", pretrained_model_name_or_path=str(other), output_dir=str(tmp_path / "fourth"))
    # A stream tells it with the row, whichever comes first.
    with pytest.raises(RecipeError, match="were made by another VAE"):
        train(data, streaming=True, max_train_steps=12, check_data="off", shuffle_block=4)


def test_rows_of_no_data(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["row 0", "row 1", "another caption"]})
    cache, _ = filled(tmp_path, range(3))
    files = list(cache.folder.glob("*.arrow"))
    assert rows_of_no_data(files, rows, ["text"]) == 1
    filled(tmp_path, range(2))  # by another run at the same time
    assert rows_of_no_data(list(cache.folder.glob("*.arrow")), rows, ["text"]) == 3


def test_a_kill_while_writing_leaves_no_half_file(tmp_path: Path) -> None:
    cache, _ = filled(tmp_path, range(3))
    (cache.folder / "00000-1-00000.partial").write_bytes(b"half")
    assert LatentCache(tmp_path, MADE, rank=0).num_rows == 3


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    cache, _ = filled(tmp_path, range(3))
    file = next(cache.folder.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(RecipeError, match=rf"{file.name}.*remove it"):
        LatentCache(tmp_path, MADE, rank=0)


def test_a_reader_waits_until_the_epoch_before_is_written(tmp_path: Path) -> None:
    writer = LatentCache(tmp_path, MADE, rank=0)
    reader = copy.copy(writer)  # as a worker process has it
    reader.begin_epoch(4)
    waiting = threading.Thread(target=reader.begin_epoch, args=(5,), daemon=True)
    waiting.start()
    moments = torch.zeros(1, 8, 4, 4)
    writer.put([record(0)], moments, moments)
    writer.flush()
    waiting.join(0.1)
    assert waiting.is_alive()
    assert reader.find(record(0)["key"]) is None
    writer.seal(5)
    waiting.join(5)
    assert not waiting.is_alive()
    assert reader.find(record(0)["key"]) is not None


def test_a_row_that_only_stands_in_is_kept_by_the_process_that_trains_on_it(settings: dict[str, Any]) -> None:
    forget_accelerator()
    recipe = Recipe(**settings | {"cache_latents": "disk", "center_crop": True})
    training = build_training(recipe, start_accelerator(recipe))
    assert training.cache is not None
    alone = GlobalBatch(np.array([3]), position=0, ends_epoch=True, epoch=0, size=(32, 32))
    for rank, files in ((1, 0), (0, 1)):
        (plan,) = share(alone, rank=rank, world_size=2, micro_batch_size=4)
        batch = training.batches.builder[plan]
        assert batch_moments(training.components.vae, batch, torch.float32, training.cache).shape[0] == 1
        training.cache.flush()
        assert len(list(training.cache.folder.glob("*.arrow"))) == files


def test_a_full_disk_ends_the_writing_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = LatentCache(tmp_path, MADE, rank=0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    moments = torch.zeros(1, 8, 4, 4)
    for number in range(2):
        cache.put([record(number)], moments, moments)
        cache.flush()
    assert caplog.text.count("No space left on device") == 1
    assert [path for path in cache.folder.iterdir() if path.name != "made_by.json"] == []


# ------------------------------------------------------------------------------------- through the loop

CACHED = {
    "cache_latents": "disk",
    "center_crop": True,
    "random_flip": True,
    "max_train_steps": 7,
    "train_batch_size": 3,
}


def test_cached_is_live_up_to_the_stored_precision(settings: dict[str, Any], tmp_path: Path) -> None:
    changes = {**CACHED, "optimizer": "sgd", "learning_rate": 1e-2}
    live = train(settings, **{**changes, "cache_latents": "off"}, output_dir=str(tmp_path / "live"))
    cached = train(settings, **changes, output_dir=str(tmp_path / "cached"))
    np.testing.assert_allclose(losses(cached), losses(live), rtol=2e-3)
    assert losses(cached) != losses(live), "the moments are rounded"
    assert LatentCache(tmp_path / "cached" / "latents", json.loads(cached.cache.made_by), 0).num_rows == 8


@pytest.mark.parametrize("num_workers", [0, 2])
def test_cached_runs_repeat_bit_for_bit(settings: dict[str, Any], tmp_path: Path, num_workers: int) -> None:
    runs = [
        train(settings, **CACHED, dataloader_num_workers=workers, output_dir=str(tmp_path / f"{number}"))
        for number, workers in enumerate((0, num_workers))
    ]
    assert_equal(weights(runs[0]), weights(runs[1]))


def test_later_epochs_neither_decode_nor_encode(
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded, encoded = [], []
    import sd_recipes.data.batches as batches
    import sd_recipes.model.latents as latents

    open_image, encode_pixels = batches.open_image, latents.encode_pixels
    monkeypatch.setattr(batches, "open_image", lambda *a, **k: decoded.append(1) or open_image(*a, **k))
    monkeypatch.setattr(latents, "encode_pixels", lambda vae, p: encoded.append(len(p)) or encode_pixels(vae, p))
    train(settings, **{**CACHED, "max_train_steps": 12, "check_data": "off"})  # four epochs of 8 rows in threes
    assert len(decoded) == 8
    assert sum(encoded) == 16, "each row once, and once mirrored"


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_cached_run_is_the_uninterrupted_one(settings: dict[str, Any], tmp_path: Path, stop: int) -> None:
    changes = {**CACHED, "checkpointing_steps": stop}
    quiet = train(settings, **changes, output_dir=str(tmp_path / "quiet"))
    # What a kill after the checkpoint leaves: its weights, and the cache up to there or beyond.
    resumed = train(
        settings, **changes, output_dir=str(tmp_path / "resumed"), latent_cache_dir=str(tmp_path / "quiet" / "latents"),
        resume_from_checkpoint=str(tmp_path / "quiet" / f"checkpoint-{stop}"),
    )  # fmt: skip
    assert_equal(weights(quiet), weights(resumed))


def test_a_cache_in_memory_is_a_cache(settings: dict[str, Any], tmp_path: Path) -> None:
    on_disk = train(settings, **CACHED, output_dir=str(tmp_path / "disk"))
    in_memory = train(settings, **{**CACHED, "cache_latents": "memory"}, output_dir=str(tmp_path / "memory"))
    assert_equal(weights(on_disk), weights(in_memory))
    assert not (tmp_path / "memory" / "latents").exists()
    assert not in_memory.cache.folder.exists(), "the memory is given back at the end"


def test_a_cache_filled_before_is_used_and_trains_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    changes = {**CACHED, "latent_cache_dir": str(tmp_path / "kept")}
    forget_accelerator()
    folder = fill_cache(Recipe(**{**settings, **changes, "cache_latents": "off"}))
    again = fill_cache(Recipe(**{**settings, **changes}))
    assert again == folder
    assert len(list(folder.glob("*.arrow"))) == 1, "the second call had nothing to do"
    live = train(settings, **CACHED, output_dir=str(tmp_path / "live"))
    filled_before = train(settings, **changes, output_dir=str(tmp_path / "filled"))
    np.testing.assert_allclose(losses(filled_before), losses(live), rtol=1e-4)
    # The cache is a data set: as rows, and as a stream.
    alone = {
        **CACHED, "cache_latents": "off", "train_data_dir": None, "dataset_name": str(folder / "*.arrow"),
    }  # fmt: skip
    as_rows = train(settings, **alone, output_dir=str(tmp_path / "rows"))
    assert losses(as_rows)[-1] == pytest.approx(losses(live)[-1], rel=0.5)
    as_stream = train(settings, **alone, streaming=True, output_dir=str(tmp_path / "stream"))
    assert np.isfinite(losses(as_stream)).all()
    with pytest.raises(RecipeError, match="were made at 32, not 64"):
        train(settings, **{**alone, "resolution": 64}, output_dir=str(tmp_path / "other"))


def test_another_vae_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = fill_cache(Recipe(**{**settings, **CACHED, "latent_cache_dir": str(tmp_path / "kept")}))
    other = build_tiny_pipeline(tmp_path / "other", seed=1)
    alone = {"train_data_dir": None, "dataset_name": str(folder / "*.arrow"), "center_crop": True}
    with pytest.raises(RecipeError, match="made by another VAE"):
        train(settings, **alone, pretrained_model_name_or_path=str(other))
