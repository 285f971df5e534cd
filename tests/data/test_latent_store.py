"""The latent cache: keys, files, readers and writers; and training with it."""

from __future__ import annotations

import builtins
import copy
import errno
import fcntl
import io
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import build_image_folder, build_tiny_pipeline
from training_runs import assert_equal, build, forget_accelerator, losses, train, weights

from sd_recipes.checkpoints.format import remove
from sd_recipes.commands.cache import fill_cache, rows_of_no_data
from sd_recipes.data.latent_store import (
    SIZE_COLUMNS,
    LatentStore,
    check_provenance,
    memory_folder,
    model_hash,
    moments_of,
    open_cached,
    provenance_of,
    remove_memory_folder,
    row_key,
)
from sd_recipes.data.order import share
from sd_recipes.errors import RecipeError
from sd_recipes.model.components import load_vae
from sd_recipes.recipe import Recipe
from sd_recipes.training.finite import TrainingDiverged
from sd_recipes.training.run import Run

MADE = {"format": 1, "dtype": "fp16", "flips": True, "vae": "x", "size": 64}


def record(number: int) -> dict[str, Any]:
    key = row_key({"bytes": b"%d" % number, "path": None})
    return {"key": key, **dict.fromkeys(SIZE_COLUMNS, 64), "text": f"row {number}"}


def filled(folder: Path, numbers: range, **changes: Any) -> tuple[LatentStore, torch.Tensor]:
    cache = LatentStore(folder, {**MADE, **changes}, rank=0)
    moments = torch.randn(len(numbers), 8, 4, 4, generator=torch.Generator().manual_seed(0))
    cache.put([record(number) for number in numbers], moments, -moments)
    cache.flush()
    return cache, moments


def test_what_was_kept_is_found_by_a_new_reader(tmp_path: Path) -> None:
    _, moments = filled(tmp_path, range(5))
    reader = LatentStore(tmp_path, MADE, rank=3)
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
    assert LatentStore(tmp_path, {**MADE, **change}, rank=0).num_rows == 0


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
    assert LatentStore(tmp_path, MADE, rank=0).num_rows == 3


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    cache, _ = filled(tmp_path, range(3))
    file = next(cache.folder.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(RecipeError, match=rf"{file.name}.*remove it"):
        LatentStore(tmp_path, MADE, rank=0)


def test_a_reader_waits_until_the_epoch_before_is_written(tmp_path: Path) -> None:
    writer = LatentStore(tmp_path, MADE, rank=0)
    writer.start_at(4, is_within=True)
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
    writer.publish_epoch(5)
    waiting.join(5)
    assert not waiting.is_alive()
    assert reader.find(record(0)["key"]) is not None


@pytest.mark.parametrize("is_full", [True, False])
def test_once_all_rows_are_there_readers_go_on_and_see_no_later_ones(tmp_path: Path, is_full: bool) -> None:
    writer = LatentStore(tmp_path, MADE, rank=0)
    writer.start_at(0, is_within=False)
    reader = copy.copy(writer)
    moments = torch.zeros(1, 8, 4, 4)
    writer.put([record(0)], moments, moments)
    writer.keep()
    writer.end_epoch(0, is_full=is_full)
    reader.begin_epoch(1)
    assert reader.find(record(0)["key"]) is not None
    writer.put([record(1)], moments, moments)  # such as of a picture that has changed meanwhile
    writer.flush()
    waiting = threading.Thread(target=reader.begin_epoch, args=(2,), daemon=True)
    waiting.start()
    waiting.join(5 if is_full else 0.1)
    assert waiting.is_alive() is not is_full
    assert reader.find(record(1)["key"]) is None
    writer.publish_epoch(2)
    waiting.join(5)


def test_an_epoch_that_the_run_began_within_is_not_whole(tmp_path: Path) -> None:
    writer = LatentStore(tmp_path, MADE, rank=0)
    for is_within, whole in ((False, [3]), (True, [])):
        writer.start_at(3, is_within=is_within)
        assert list(writer.whole_epochs(3)) == whole
        assert list(writer.whole_epochs(4)) == [*whole, 4]


def test_a_row_that_only_stands_in_is_kept_by_the_process_that_trains_on_it(settings: dict[str, Any]) -> None:
    run = build(settings, cache_latents="disk", center_crop=True)
    assert run.store is not None
    assert run.data.order is not None
    alone = replace(next(run.data.order.batches_from(0)), rows=np.array([3]), places=np.array([0]), num_samples=1)
    for rank, files in ((1, 0), (0, 1)):
        (plan,) = share(alone, rank=rank, world_size=2, micro_batch_size=4)
        batch = run.batches.builder[plan]
        assert batch.all_moments(run.model.encoder.encode, run.store).shape[0] == 1
        run.store.flush()
        assert len(list(run.store.folder.glob("*.arrow"))) == files


def test_a_full_disk_ends_the_writing_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = LatentStore(tmp_path, MADE, rank=0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    moments = torch.zeros(1, 8, 4, 4)
    for number in range(2):
        cache.put([record(number)], moments, moments)
        cache.flush()
    assert caplog.text.count("No space left on device") == 1
    assert [path for path in cache.folder.iterdir() if path.name != "made_by.json"] == []


def test_defect_5_a_row_is_kept_once_and_one_picture_with_two_captions_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd_recipes.data.latent_store.NUMBERS_TO_SORT", 2, raising=False)
    cache = LatentStore(tmp_path, MADE, rank=0)
    rows = [record(0), record(1), record(1), record(1) | {"text": "another"}, record(2), record(0)]
    moments = torch.arange(len(rows), dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 8, 4, 4)
    for _ in range(2):
        cache.put(rows, moments, -moments)
        cache.put(rows[3:], moments[3:], -moments[3:])
        cache.flush()
    kept = [row for path in stored(cache) for row in open_cached(path).to_pylist()]
    assert [(row["text"], np.frombuffer(row["moments"], np.float16)[0]) for row in kept] == [
        ("row 0", 0), ("row 1", 1), ("another", 3), ("row 2", 4),
    ]  # fmt: skip


def test_defect_28_what_a_killed_run_left_half_written_is_removed_and_what_a_live_one_writes_is_not(
    tmp_path: Path,
) -> None:
    cache, _ = filled(tmp_path, range(3))
    other, _ = filled(tmp_path, range(3), size=128)
    left = [folder / "00001-18f-00000.partial" for folder in (cache.folder, other.folder)]
    not_ours = [tmp_path / "00000-1-00000.partial", cache.folder / "download.partial"]
    held = other.folder / "00000-18e-00000.partial"
    for path in (*left, *not_ours, held):
        path.write_bytes(b"half")
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as its writer does
        assert LatentStore(tmp_path, MADE, rank=0).num_rows == 3
        assert [path.exists() for path in left] == [False, False]
        assert all(path.exists() for path in not_ours)
        assert held.exists()
    LatentStore(tmp_path, MADE, rank=0)
    assert not held.exists(), "its writer has gone"


def test_defect_28_a_file_is_held_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = LatentStore(tmp_path, MADE, rank=0)
    fsync = os.fsync

    def sync_while_another_run_begins(descriptor: int) -> None:
        assert len(list(cache.folder.glob("*.partial"))) == 1
        LatentStore(tmp_path, MADE, rank=0)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_while_another_run_begins)
    moments = torch.zeros(1, 8, 4, 4)
    cache.put([record(0)], moments, moments)
    cache.flush()
    assert cache.failure is None
    assert LatentStore(tmp_path, MADE, rank=0).num_rows == 1


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a folder one that cannot be written, also by root."""

    def make(folder: Path) -> None:
        def refused(path: Any) -> bool:
            return isinstance(path, (str, Path)) and Path(path).is_relative_to(folder)

        def opened(path: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
            if refused(path) and set(mode) & set("wax+"):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return plain(path, mode, *arguments, **more)

        def changing(function: Callable[..., Any], refused: Callable[[Any], bool]) -> Callable[..., Any]:
            def changed(path: Any, *rest: Any, **more: Any) -> Any:
                if refused(path):
                    raise OSError(errno.EROFS, "Read-only file system", str(path))
                return function(path, *rest, **more)

            return changed

        plain = builtins.open
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", opened)
        for name in ("mkdir", "unlink", "replace"):
            monkeypatch.setattr(os, name, changing(getattr(os, name), refused))

    return make


def test_defect_28_a_read_only_cache_is_read_and_says_once_that_it_cannot_add(
    tmp_path: Path, read_only: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path / "shared", range(3))
    (tmp_path / "shared" / "empty").mkdir()
    read_only(tmp_path / "shared")
    cache = LatentStore(tmp_path / "shared", MADE, rank=0)
    assert cache.find(record(1)["key"]) is not None
    assert caplog.text == ""
    moments = torch.zeros(1, 8, 4, 4)
    for number in (3, 4):
        cache.put([record(number)], moments, moments)
        cache.flush()
    assert caplog.text.count("Read-only file system") == caplog.text.count("it is read, and no rows are added") == 1
    with pytest.raises(RecipeError, match=r"cannot be made \(Read-only file system\): choose another"):
        LatentStore(tmp_path / "shared", {**MADE, "size": 128}, rank=0)


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """Where a run in tmp_path / "run" keeps a cache in memory; nothing is there yet."""
    folder = memory_folder(str(tmp_path / "run"))
    if folder.exists():  # of a test that was ended
        remove(folder)
    yield folder
    if os.path.lexists(folder):
        remove(folder)


def test_defect_31_memory_is_for_this_user_alone(tmp_path: Path, in_memory: Path) -> None:
    before = os.umask(0)
    try:
        folder = memory_folder(str(tmp_path / "run"))
        cache, _ = filled(folder, range(3))
    finally:
        os.umask(before)
    assert stat.S_IMODE(in_memory.stat().st_mode) == 0o700
    assert memory_folder(str(tmp_path / "run")) == in_memory, "by another process of the run"
    assert cache.folder.parent == in_memory


@pytest.mark.parametrize(
    "planted", ["another user's folder", "a folder for all", "a link", "a link to nothing", "a file"]
)
def test_defect_31_what_another_user_put_there_is_refused(
    tmp_path: Path, in_memory: Path, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    if "folder" in planted:
        in_memory.mkdir()
        in_memory.chmod(0o777 if planted == "a folder for all" else 0o700)
    elif planted == "a file":
        in_memory.write_text("")
    else:
        in_memory.symlink_to(tmp_path / ("elsewhere" if planted == "a link" else "nowhere"))
    if planted == "another user's folder":
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
        remove_memory_folder(str(tmp_path / "run"))
        assert in_memory.exists(), "it is not ours to remove"
    with pytest.raises(RecipeError, match=f"{in_memory}.*: remove it, use --cache_latents disk, or choose"):
        memory_folder(str(tmp_path / "run"))


# ------------------------------------------------------------------------------------- through the loop


def stored(cache: LatentStore) -> list[Path]:
    return sorted(cache.folder.glob("*.arrow"))


def stored_captions(run: Run) -> list[str]:
    assert run.store is not None
    return sorted(text for path in stored(run.store) for text in open_cached(path)["text"].to_pylist())


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
    assert LatentStore(tmp_path / "cached" / "latents", json.loads(cached.store.provenance), 0).num_rows == 8


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

    open_with_size, encode_pixels = batches.open_with_size, latents.encode_pixels
    monkeypatch.setattr(batches, "open_with_size", lambda *a, **k: decoded.append(1) or open_with_size(*a, **k))
    monkeypatch.setattr(latents, "encode_pixels", lambda vae, p: encoded.append(len(p)) or encode_pixels(vae, p))
    train(settings, **{**CACHED, "max_train_steps": 12, "check_data": "off"})  # four epochs of 8 rows in threes
    assert len(decoded) == 8
    assert sum(encoded) == 16, "each row once, and once mirrored"


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_cached_run_is_the_uninterrupted_one(settings: dict[str, Any], tmp_path: Path, stop: int) -> None:
    changes = {**CACHED, "checkpointing_steps": stop}
    uninterrupted = train(settings, **changes, output_dir=str(tmp_path / "uninterrupted"))
    # What a kill after the checkpoint leaves: its weights, and the cache up to there or beyond.
    resumed = train(
        settings, **changes, output_dir=str(tmp_path / "resumed"),
        latent_cache_dir=str(tmp_path / "uninterrupted" / "latents"),
        resume_from_checkpoint=str(tmp_path / "uninterrupted" / f"checkpoint-{stop}"),
    )  # fmt: skip
    assert_equal(weights(uninterrupted), weights(resumed))


def test_defect_5_an_epoch_of_fewer_batches_than_workers_keeps_each_row_once(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    changes = {**CACHED, "train_batch_size": 8, "max_train_steps": 4}
    alone = train(settings, **changes, output_dir=str(tmp_path / "alone"))
    workers = train(settings, **changes, dataloader_num_workers=2, output_dir=str(tmp_path / "workers"))
    assert stored_captions(workers) == [f"disc number {number}" for number in range(8)]
    assert_equal(weights(alone), weights(workers))


def test_defect_5_repeated_rows_of_a_weighted_source_are_kept_once(settings: dict[str, Any], tmp_path: Path) -> None:
    small = build_image_folder(tmp_path / "small", 2, (36, 32))
    metadata = small / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("disc", "small disc"))
    sources = [
        {"train_data_dir": settings.pop("train_data_dir"), "weight": 1}, {"train_data_dir": str(small), "weight": 4},
    ]  # fmt: skip
    found = stored_captions(train(settings, **CACHED, data_sources=sources))
    assert {"small disc number 0", "small disc number 1"} < set(found)
    assert len(found) == len(set(found))


def test_defect_5_several_streams_keep_each_row_once(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = []
    for name in "ab":
        rows = datasets.load_dataset("imagefolder", data_dir=settings["train_data_dir"], split="train")
        rows = rows.cast_column("image", datasets.Image(decode=False)).map(
            lambda row, name=name: {"text": f"{name}: {row['text']}"}
        )
        rows.to_parquet(tmp_path / f"{name}.parquet")
        sources.append({"dataset_name": str(tmp_path / f"{name}.parquet"), "weight": 1})
    del settings["train_data_dir"]
    streams = {**CACHED, "data_sources": sources, "streaming": True, "shuffle_block": 4, "max_train_steps": 20}
    run = train(settings, **streams)
    assert stored_captions(run) == [f"{name}: disc number {number}" for name in "ab" for number in range(8)]
    assert "Several streams have no common epoch" in caplog.text


def test_a_cache_in_memory_is_a_cache(settings: dict[str, Any], tmp_path: Path) -> None:
    on_disk = train(settings, **CACHED, output_dir=str(tmp_path / "disk"))
    in_memory = train(settings, **{**CACHED, "cache_latents": "memory"}, output_dir=str(tmp_path / "memory"))
    assert_equal(weights(on_disk), weights(in_memory))
    assert not (tmp_path / "memory" / "latents").exists()
    assert not in_memory.store.folder.exists(), "the memory is given back at the end"


@pytest.mark.parametrize("cache_latents", ["memory", "disk", "off"])
def test_defect_31_memory_of_a_killed_run_is_given_back_by_the_next(
    settings: dict[str, Any], in_memory: Path, cache_latents: str
) -> None:
    (in_memory / "0123456789abcdef").mkdir(parents=True)
    (in_memory / "0123456789abcdef" / "00000-18f-00000.arrow").write_bytes(b"large")
    other_run = memory_folder("/another/run")
    changes = {**CACHED, "cache_latents": cache_latents}
    build(settings, **changes, dry_run=True)
    assert in_memory.exists(), "a look at what a run would do takes nothing from one that may be running"
    train(settings, **changes)
    assert not in_memory.exists()
    assert other_run.exists()
    other_run.rmdir()


def test_defect_31_memory_is_given_back_by_a_run_that_fails(
    settings: dict[str, Any], in_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fail(*_: Any) -> None:
        seen.append(in_memory.exists())
        raise TrainingDiverged("the loss is nan")

    monkeypatch.setattr("sd_recipes.training.loop.sum_up", fail)
    with pytest.raises(TrainingDiverged):
        train(settings, **{**CACHED, "cache_latents": "memory"})
    assert seen == [True]
    assert not in_memory.exists()


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


@pytest.mark.parametrize(("made_in", "used_in"), [("bf16", "no"), ("no", "bf16")])
def test_defect_12_a_vae_is_the_same_in_every_precision(
    settings: dict[str, Any], tiny_pipeline: Path, tmp_path: Path, made_in: str, used_in: str
) -> None:
    """Moments that come as data, by `sd-recipes cache` and by training, and are used in another precision."""
    settings |= {**CACHED, "max_train_steps": 3}
    forget_accelerator()
    filled = fill_cache(Recipe(**settings | {"mixed_precision": made_in, "latent_cache_dir": str(tmp_path / "kept")}))
    trained = train(settings, mixed_precision=made_in, output_dir=str(tmp_path / "trained")).store
    identity = model_hash(load_vae(Recipe(**settings)))
    used = settings | {"train_data_dir": None, "cache_latents": "off", "mixed_precision": used_in}
    for number, folder in enumerate((filled, trained.folder)):
        made = json.loads((folder / "made_by.json").read_text())
        assert (made["vae"], made["vae_dtype"]) == (identity, {"no": "float32", "bf16": "bfloat16"}[made_in])
        used |= {"dataset_name": str(folder / "*.arrow"), "output_dir": str(tmp_path / f"used-{number}")}
        for streaming in (False, True):
            run = train(used, streaming=streaming, output_dir=f"{used['output_dir']}-{streaming}")
            assert np.isfinite(losses(run)).all()
    other = build_tiny_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(RecipeError, match="made by another VAE"):
        train(used, pretrained_model_name_or_path=str(other), output_dir=str(tmp_path / "refused"))


def test_defect_12_the_words_about_another_format_are_true(settings: dict[str, Any]) -> None:
    vae = load_vae(Recipe(**settings))
    wanted = provenance_of(Recipe(**settings, center_crop=True), vae, torch.float32)
    check_provenance(json.dumps(wanted), wanted)
    with pytest.raises(RecipeError, match=r"in format 1, .* another version .*make them again with `sd-recipes cache`"):
        check_provenance(json.dumps({**wanted, "format": 1}), wanted)


def test_defect_28_a_run_trains_on_a_read_only_cache(
    settings: dict[str, Any], tmp_path: Path, read_only: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    changes = {**CACHED, "latent_cache_dir": str(tmp_path / "shared")}
    first = train(settings, **changes)
    read_only(tmp_path / "shared")
    second = train(settings, **changes, output_dir=str(tmp_path / "second"))
    assert "cannot be written" not in caplog.text
    np.testing.assert_allclose(losses(first), losses(second), rtol=1e-4)


def test_defect_28_a_cache_that_cannot_be_filled_is_no_success(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecipeError, match=r"No space left on device.*make room"):
        fill_cache(Recipe(**{**settings, **CACHED, "latent_cache_dir": str(tmp_path / "kept")}))


def test_another_vae_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = fill_cache(Recipe(**{**settings, **CACHED, "latent_cache_dir": str(tmp_path / "kept")}))
    other = build_tiny_pipeline(tmp_path / "other", seed=1)
    alone = {"train_data_dir": None, "dataset_name": str(folder / "*.arrow"), "center_crop": True}
    with pytest.raises(RecipeError, match="made by another VAE"):
        train(settings, **alone, pretrained_model_name_or_path=str(other))
