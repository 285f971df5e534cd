"""Data sets of others, recognised by what lies there."""

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_folder import pictures
from test_tables import png

from sd_recipes.data.captions import make_caption
from sd_recipes.data.first_words import FIRST
from sd_recipes.data.rows import load_held_out_rows, load_rows, load_sources, load_streams
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe


def recipe(place: Path | str, **settings: Any) -> Recipe:
    return Recipe(pretrained_model_name_or_path="-", dataset_name=str(place), **settings)


def jpeg() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, "JPEG")
    return content.getvalue()


def shard(path: Path, samples: list[dict[str, bytes]], mode: Any = "w") -> Path:
    """A WebDataset shard of samples, each its parts by name; keys are numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for number, parts in enumerate(samples):
            for part, content in parts.items():
                member = tarfile.TarInfo(f"{path.name.partition('.')[0]}{number:04d}.{part}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def img2dataset_sample(number: int) -> dict[str, bytes]:
    row = {"caption": f"number {number}", "width": 8, "status": "success"}
    return {"jpg": jpeg(), "json": json.dumps(row).encode(), "txt": f"number {number}".encode()}


def img2dataset_folder(folder: Path) -> Path:
    """Two finished shards of two samples, with what img2dataset writes beside them, and one that it is writing."""
    for name in ("00000", "00001", "00002"):
        shard(folder / f"{name}.tar", [img2dataset_sample(number) for number in range(2)])
        pq.write_table(pa.table({"url": ["https://example.org/a.jpg"], "caption": ["x"]}), folder / f"{name}.parquet")
        if name != "00002":
            (folder / f"{name}_stats.json").write_text('{"count": 2}')
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("place", "settings", "number"),
    [
        ("", {}, 4),
        ("", {"caption_column": "json.caption"}, 4),
        ("", {"image_column": "jpg", "caption_template": "{txt}"}, 4),
        ("/*.tar", {}, 6),
        ("/{00000..00001}.tar", {}, 4),
        ("/00001.tar", {"image_column": "jpg", "caption_column": "txt"}, 2),
    ],
)
def test_img2datasets_output_as_it_is(
    tmp_path: Path, place: str, settings: dict[str, Any], number: int, streaming: bool
) -> None:
    folder = img2dataset_folder(tmp_path / "shards")
    config = recipe(f"{folder}{place}", streaming=streaming, max_train_steps=1, **settings)
    rows = list(load_streams(config)[0].rows if streaming else load_rows(config))
    assert [make_caption(row, config, FIRST) for row in rows] == ["number 0", "number 1"] * (number // 2)
    assert all(row[config.image_column]["bytes"] == jpeg() for row in rows)


def test_what_img2dataset_left_is_told(tmp_path: Path) -> None:
    folder = img2dataset_folder(tmp_path)
    source = load_sources(recipe(folder))[0]
    assert source.recognised.captions == "the part txt"
    assert source.recognised.notes[0].startswith("3 .parquet files are passed over: 00000.parquet")
    assert source.recognised.notes[1].startswith("1 shards are unfinished (they have no _stats.json)")


def test_missing_shards_and_parts_are_named(tmp_path: Path) -> None:
    folder = img2dataset_folder(tmp_path)
    for place, settings, words in (
        (f"{folder}/{{00000..00003}}.tar", {}, r"stands for 4 files, and .*00003\.tar is not there"),
        (folder, {"caption_column": "tags"}, r"--caption_column tags: .* parts jpg, json, txt: .*json\.caption"),
        (folder, {"caption_column": "json"}, r"an object with the keys caption, width, status: .*json\.caption"),
        (folder, {"image_column": "png"}, r"--image_column png: .* has samples with the parts jpg, json, txt"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_rows(recipe(place, **settings))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_sample_is_a_bad_row(tmp_path: Path, streaming: bool) -> None:
    path = shard(
        tmp_path / "0.tar",
        [
            {"jpg": jpeg(), "txt": b"good"},
            {"txt": b"no picture"},
            {"jpg": jpeg()},
            {"jpg": jpeg(), "txt": "Käse".encode("cp1252")},
            {"png": png(), "txt": b"another suffix"},
            {"JPG": jpeg(), "txt": b"in capitals"},
        ],
    )
    config = recipe(path, image_column="jpg", caption_column="txt", streaming=streaming, max_train_steps=1)
    rows = list(load_streams(config)[0].rows if streaming else load_rows(config))
    assert [row["jpg"]["path"] for row in rows[:2]] == ["0.tar/00000.jpg", "0.tar/00001"]
    told = []
    for row in rows:
        try:
            told.append(make_caption(row, config, FIRST))
        except ValueError as error:
            told.append(re.sub(r"[:(].*", "", str(error)).strip())
    assert told == [
        "good",
        "the sample has no part jpg, only txt",
        "no caption",
        "the sample's part txt is not UTF-8",
        "the sample has no part jpg, only png, txt",
        "in capitals",
    ]
    config = config.model_copy(update={"image_column": "image"})
    rows = list(load_streams(config)[0].rows if streaming else load_rows(config))
    assert rows[4]["image"]["path"] == "0.tar/00004.png"


def test_a_shard_that_is_cut_short_is_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", [{"jpg": jpeg(), "txt": b"x"}] * 40)
    path.write_bytes(path.read_bytes()[:-30_000])
    with pytest.raises(RecipeError, match=r"cannot be read: .*0\.tar is cut short or damaged"):
        load_rows(recipe(path))


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz"])
def test_compressed_shards_are_read(tmp_path: Path, name: str) -> None:
    shard(tmp_path / name, [{"jpg": jpeg(), "txt": b"x"}], "w:gz")
    assert load_rows(recipe(tmp_path / name))["text"][:] == ["x"]
    assert load_rows(recipe(tmp_path))["text"][:] == ["x"]


def saved(number: int) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = [{"image": {"bytes": png(), "path": None}, "text": f"number {each}"} for each in range(number)]
    return datasets.Dataset.from_list(rows, features=features)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("flag", ["dataset_name", "train_data_dir"])
def test_what_save_to_disk_wrote(tmp_path: Path, flag: str, streaming: bool) -> None:
    saved(3).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved(2), "test": saved(1)}).save_to_disk(tmp_path / "splits")
    for name, number in (("one", 3), ("splits", 2)):
        settings: dict[str, Any] = {flag: str(tmp_path / name), "streaming": streaming, "max_train_steps": 1}
        config = Recipe(pretrained_model_name_or_path="-", **settings)
        rows = list(load_streams(config)[0].rows if streaming else load_rows(config))
        assert [row["text"] for row in rows] == [f"number {each}" for each in range(number)]
    config = Recipe(pretrained_model_name_or_path="-", dataset_name=str(tmp_path / "splits"))
    assert len(load_held_out_rows(config, "test", None)) == 1


@pytest.mark.parametrize("flag", ["dataset_name", "train_data_dir"])
def test_a_clone_of_a_data_set_of_the_hub(tmp_path: Path, flag: str) -> None:
    folder = tmp_path / "clone"
    for name, number in (("train-00000-of-00002", 2), ("train-00001-of-00002", 1), ("test-00000-of-00001", 4)):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        saved(number).to_parquet(folder / "data" / f"{name}.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# pictures\n")
    Image.new("RGB", (8, 8)).save(folder / "banner.png")
    (folder / ".git").mkdir()
    config = Recipe(pretrained_model_name_or_path="-", **{flag: str(folder)})
    assert load_rows(config)["text"][:] == ["number 0", "number 1", "number 0"]
    assert len(load_held_out_rows(config, "test", None)) == 4
    header = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/test-*\n---\n"
    (folder / "README.md").write_text(header)
    assert len(load_rows(config)) == 4


@pytest.mark.parametrize("name", ["rows[1].parquet", "a*b.pq", "with space.parquet"])
def test_names_with_the_characters_of_patterns(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "set [v2] *"
    folder.mkdir()
    saved(2).to_parquet(folder / name)
    assert len(load_rows(recipe(folder / name))) == 2
    assert len(load_rows(recipe(folder))) == 2
    pictures(folder / "p[1]", "a.png")
    (folder / "p[1]" / "a.txt").write_text("x")
    assert load_rows(recipe(folder / "p[1]"))["text"][:] == ["x"]


def picture_file(folder: Path) -> Path:
    return pictures(folder, "a.png") / "a.png"


def zip_file(folder: Path) -> Path:
    (folder / "a.zip").write_bytes(b"PK")
    return folder / "a.zip"


def mixed_files(folder: Path) -> str:
    for name in ("a.csv", "b.jsonl"):
        (folder / name).write_text("")
    return f"{folder}/*.*"


def folder_of_a_zip(folder: Path) -> Path:
    return zip_file(folder).parent


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (picture_file, r"is a picture: give the folder that it is in"),
        (zip_file, r"is an archive: unpack it, and give its folder"),
        (mixed_files, r"has files of several kinds \(\.csv, \.jsonl\)"),
        (folder_of_a_zip, r"neither pictures nor files of rows, but other files \(1 \.zip\); .*a\.zip is an archive"),
        (lambda folder: folder, r"is empty: put images there"),
        (lambda folder: folder / "deep" / "rows.csv", r"rows\.csv: no such file or folder \(.* is there\)"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, make: Callable[[Path], Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_rows(recipe(make(tmp_path)))


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pictures(tmp_path / "pics", "a.png")
    (tmp_path / "pics" / "a.txt").write_text("x")
    assert load_rows(recipe("~/pics"))["text"][:] == ["x"]


def test_the_picture_of_a_sample_is_the_one_without_a_name_of_its_own(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", [{"depth.png": png(), "jpg": jpeg(), "txt": b"x"}])
    assert load_rows(recipe(path))[0]["image"]["bytes"] == jpeg()


def test_an_empty_first_shard(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", [])
    shard(tmp_path / "1.tar", [{"jpg": jpeg(), "txt": b"x"}])
    assert load_rows(recipe(tmp_path))["text"][:] == ["x"]


def test_braces_that_count_down_and_with_patterns(tmp_path: Path) -> None:
    for name in ("a1", "a2"):
        shard(tmp_path / name / "0.tar", [{"jpg": jpeg(), "txt": name.encode()}])
    assert load_rows(recipe(f"{tmp_path}/a{{1..2}}/*.tar"))["text"][:] == ["a1", "a2"]
    with pytest.raises(RecipeError, match=r"\{2\.\.1\} counts from a number down"):
        load_rows(recipe(f"{tmp_path}/a{{2..1}}/0.tar"))


def test_repeats_are_not_dropped_from_a_stream(tmp_path: Path) -> None:
    source = {"train_data_dir": str(tmp_path), "repeats": 5}
    with pytest.raises(ValueError, match="`repeats` in data_sources, num_repeats of kohya's"):
        Recipe(pretrained_model_name_or_path="-", data_sources=[source], streaming=True, max_train_steps=1)
