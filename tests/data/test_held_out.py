"""What is held out of training: shares that stay as they are, first rows, folders; of rows and of streams."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import build_image_folder

from sd_recipes.data.held_out import choose, identities, identity, warn_of_rows_in_both
from sd_recipes.data.rows import load_held_out_rows, load_rows, load_sources, load_streams
from sd_recipes.data.training_data import hold_out, hold_out_of_streams
from sd_recipes.errors import RecipeError
from sd_recipes.flags import build_recipe
from sd_recipes.recipe import Recipe

NUM_PICTURES = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_image_folder(tmp_path_factory.mktemp("held-out") / "pictures", NUM_PICTURES)


def recipe(folder: Path, **settings: Any) -> Recipe:
    return build_recipe(
        {"pretrained_model_name_or_path": "model", "train_data_dir": str(folder), "max_train_steps": 1, **settings}
    )


def divided(folder: Path, split: Any, **settings: Any) -> tuple[set[str], set[str]]:
    """The captions that are held out, and those that are trained on."""
    config = recipe(folder, validation_split=split, **settings)
    parts = load_sources(config)
    held_out = hold_out(parts, config)
    return set(held_out["text"][:]), {text for part in parts for text in part.rows["text"][:]}


def test_rows_stay_on_their_side_when_the_data_grow_move_and_change_their_order(folder: Path, tmp_path: Path) -> None:
    held_out, trained = divided(folder, 0.2)
    assert len(held_out | trained) == NUM_PICTURES
    assert not held_out & trained
    assert 5 <= len(held_out) <= 20, "about a fifth of 60"

    moved = tmp_path / "moved"
    moved.mkdir()
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for place, line in enumerate(reversed(lines)):
        shutil.copy(folder / line["file_name"], moved / f"other-{place}.png")
        line["file_name"] = f"other-{place}.png"
    more = build_image_folder(tmp_path / "more", 20, size=(36, 36))
    for path in more.glob("*.png"):
        shutil.copy(path, moved / f"new-{path.name}")
        lines.append({"file_name": f"new-{path.name}", "text": f"new {path.name}"})
    (moved / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out_of_more, trained_of_more = divided(moved, "0.2")
    assert held_out <= held_out_of_more
    assert trained <= trained_of_more

    larger, _ = divided(folder, 0.4)
    assert held_out < larger, "a larger share holds out more, and none less"


def test_equal_pictures_are_on_one_side_and_each_is_held_out_once(folder: Path, tmp_path: Path) -> None:
    copies = shutil.copytree(folder, tmp_path / "copies")
    lines = [json.loads(line) for line in (copies / "metadata.jsonl").read_text().splitlines()]
    for line in list(lines):
        shutil.copy(copies / line["file_name"], copies / f"copy-{line['file_name']}")
        lines.append({"file_name": f"copy-{line['file_name']}", "text": f"copy of {line['text']}"})
    (copies / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out, trained = divided(copies, 0.3)
    originals = {text.removeprefix("copy of ") for text in trained}
    assert not {text.removeprefix("copy of ") for text in held_out} & originals
    assert len(trained) == 2 * len(originals)
    assert len(held_out) == NUM_PICTURES - len(originals)


def test_repeated_rows_are_held_out_together(tmp_path: Path) -> None:
    for name, number in (("3_disc", 8), ("1_disc", 8)):
        folder = build_image_folder(tmp_path / name, number, size=(40, 32) if name == "3_disc" else (32, 40))
        (folder / "metadata.jsonl").unlink()
        for path in folder.glob("*.png"):
            path.with_suffix(".txt").write_text(f"{name} {path.stem}")
    config = recipe(tmp_path, validation_split=0.4)
    parts = load_sources(config)
    held_out = hold_out(parts, config)
    assert sorted(held_out["text"][:]) == sorted(set(held_out["text"][:]))
    trained = parts[0].rows["text"][:]
    assert not set(trained) & set(held_out["text"][:])
    assert all(trained.count(text) == (3 if text.startswith("3") else 1) for text in trained)


def test_first_rows_are_held_out(folder: Path) -> None:
    repeated = recipe(folder, validation_split=10)
    parts = load_sources(repeated)
    parts[0].rows = parts[0].rows.select(np.repeat(np.arange(NUM_PICTURES), 3))
    assert len(hold_out(parts, repeated)) == 10, "pictures, not repeats of them"
    held_out, trained = divided(folder, 10)
    assert held_out == {f"disc number {number}" for number in range(10)}
    assert len(trained) == NUM_PICTURES - 10


@pytest.mark.parametrize("split", ["0.2", "10"])
def test_a_stream_is_divided_like_its_rows(folder: Path, split: str) -> None:
    held_out, trained = divided(folder, split)
    config = recipe(folder, validation_split=split, streaming=True)
    streams = load_streams(config)
    rows, watched = hold_out_of_streams(streams, config)
    assert set(rows["text"][:]) == held_out
    assert {row["text"] for row in streams[0].rows} == trained, "what is trained on"
    assert set(watched["text"][:]) <= trained
    # From any shard and row on, as streams are read.
    shards = [streams[0].rows.shard(num_shards=streams[0].rows.num_shards, index=n) for n in range(2)]
    assert {row["text"] for shard in shards for row in shard} <= trained


def test_a_limited_number_of_rows_of_a_stream_is_read(folder: Path) -> None:
    config = recipe(folder, validation_split="0.2", streaming=True, validation_rows=3)
    rows, watched = hold_out_of_streams(load_streams(config), config)
    assert (len(rows), len(watched)) == (3, 3)


def test_a_folder_of_other_rows(folder: Path, tmp_path: Path) -> None:
    other = build_image_folder(tmp_path / "other", 5, size=(36, 36))
    config = recipe(folder, validation_split=str(other))
    assert load_held_out_rows(config, str(other), None)["text"][:] == [f"disc number {number}" for number in range(5)]
    with pytest.raises(RecipeError, match=r"--validation_split .*/nowhere: no such file or folder"):
        load_held_out_rows(config, str(tmp_path / "nowhere"), None)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("0", "leaves nothing on one side"),
        ("1.0", "leaves nothing on one side"),
        ("1.5", "leaves nothing on one side"),
        ("-0.1", "leaves nothing on one side"),
        ("5%", "is a share in percent: write 0.05"),
        ("1e-9", "holds out none of 60 rows"),
        ("60", "leaves no row to train on, of 60"),
    ],
)
def test_a_side_that_is_empty_is_refused(folder: Path, split: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as error:
        divided(folder, split)
    assert f"--validation_split {split}" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_side_of_a_stream_is_refused(folder: Path) -> None:
    config = recipe(folder, validation_split="60", streaming=True)
    with pytest.raises(RecipeError, match="leaves nothing to train on of the stream's first 60 rows: hold out fewer"):
        hold_out_of_streams(load_streams(config), config)


def test_held_out_rows_that_are_trained_on_are_counted_and_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = build_image_folder(tmp_path / "other", 4, size=(36, 36))
    config = recipe(folder)
    with caplog.at_level(logging.WARNING):
        warn_of_rows_in_both(load_rows(recipe(other)), load_rows(config), config)
    assert not caplog.records
    shutil.copy(folder / "7.png", other / "2.png")
    with caplog.at_level(logging.WARNING):
        warn_of_rows_in_both(load_rows(recipe(other)), load_rows(config), config)
    (record,) = caplog.records
    assert record.getMessage().startswith("1 of 4 held-out rows have a picture that is also trained on")
    assert f"row 2 ({other / '2.png'}) is row 7 ({folder / '7.png'}) there" in record.getMessage()


def test_an_identity_is_that_of_the_content(folder: Path, tmp_path: Path) -> None:
    content = (folder / "0.png").read_bytes()
    known = identity({"bytes": None, "path": str(folder / "0.png")})
    assert known == identity({"bytes": content, "path": None}) == identity({"bytes": content, "path": "any.png"})
    large = bytes(range(256)) * 512
    middle = len(large) // 2
    changed = large[:middle] + b"?" + large[middle + 1 :]
    assert identity({"bytes": large, "path": None}) != identity({"bytes": changed, "path": None}), "also in the middle"
    assert identity({"bytes": large + b"a", "path": None}) != identity({"bytes": large + b"b", "path": None})
    assert identity({"bytes": b"a" + large, "path": None}) != identity({"bytes": b"b" + large, "path": None})
    nothing = identity(None)
    assert nothing == identity({"bytes": None, "path": str(tmp_path / "gone.png")})
    assert len(set(identities(load_rows(recipe(folder)), "image"))) == NUM_PICTURES


def test_the_same_rows_are_chosen_every_time(folder: Path) -> None:
    rows = load_rows(recipe(folder))
    chosen = choose(rows, 10)
    assert np.array_equal(chosen.numbers, choose(rows, 10).numbers)
    assert sorted(set(chosen.numbers)) == chosen.numbers.tolist()
    assert chosen.rows["text"][:] == [f"disc number {number}" for number in chosen.numbers]
    assert len(choose(rows, 100)) == NUM_PICTURES
