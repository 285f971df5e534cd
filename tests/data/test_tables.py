"""Tables as people have them: what is written in them is what is read, and what they point to is found."""

import base64
import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_folder import pictures

from sd_recipes.data.captions import make_caption
from sd_recipes.data.first_words import FIRST
from sd_recipes.data.images import open_image
from sd_recipes.data.rows import load_rows, load_sources, load_streams
from sd_recipes.data.tables import Table
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe


def recipe(path: Path | str, **settings: Any) -> Recipe:
    return Recipe(pretrained_model_name_or_path="-", dataset_name=str(path), **settings)


def captions(path: Path, **settings: Any) -> list[str]:
    config = recipe(path, **settings)
    rows = load_rows(config)
    assert all(open_image(row[config.image_column]).size == (8, 8) for row in rows)
    return [make_caption(row, config, FIRST) for row in rows]


def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_values_are_text_as_it_is_written(tmp_path: Path, delimiter: str, encoding: str) -> None:
    texts = ["007", "1e5", "true", "2024-01-02", "Käse", "1.50", "null"]
    pictures(tmp_path, "a.png")
    lines = [("image", "text"), *(("a.png", text) for text in texts)]
    text = "\r\n".join(f"{delimiter} ".join(line) for line in lines)
    (tmp_path / "rows.csv").write_bytes(text.encode(encoding))
    assert captions(tmp_path / "rows.csv") == texts


def test_numbers_in_json_are_text_as_they_are_written(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"image": "a.png", "text": {value}}}\n' for value in ("1984", "1.50", "1e5", "true", '["x", 2]'))
    )
    rows = load_rows(recipe(tmp_path / "rows.jsonl"))
    assert rows["text"][:] == [["1984"], ["1.50"], ["1e5"], ["true"], ["x", "2"]]


def test_a_file_of_another_encoding_is_named_or_read_as_told(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "rows.csv").write_bytes("image,text\na.png,Café\n".encode("cp1252"))
    with pytest.raises(RecipeError, match=r"rows\.csv is not UTF-8 \(byte 0xe9 in line 2\).* --text_encoding cp1252"):
        load_rows(recipe(tmp_path / "rows.csv"))
    assert captions(tmp_path / "rows.csv", text_encoding="cp1252") == ["Café"]
    with pytest.raises(RecipeError, match="--text_encoding is the name of no encoding"):
        load_rows(recipe(tmp_path / "rows.csv", text_encoding="utf-9"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,text\na.png,a cat, asleep\n", r"has 3 fields in row 1, and its first line names 2 columns: put quotes"),
        ("image,text,text\na.png,x,y\n", "has the column 'text' more than once"),
        ("a.png,a cat\n", r"its first line looks like a row: add one with names"),
        ("image,caption\na.png,x\n", r"--caption_column text: .* has the columns \['image', 'caption'\]"),
        ("photo,text\na.png,x\n", r"--image_column image: .* has the columns \['photo', 'text'\]"),
        ("image,text\nhttps://example.org/a.png,x\n", r"holds addresses .* download them first"),
        ("image,text\nb.png,x\n", r"none of its 1 rows has its picture; the first: .*b\.png: no such file"),
        ("image,text\nC:\\\\pics\\\\b.png,x\n", r"begins with a drive of Windows"),
        ("image,text\n", "no rows"),
    ],
)
def test_mistakes_in_a_table_are_one_true_line(tmp_path: Path, text: str, words: str) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(RecipeError, match=words) as error:
        load_rows(recipe(tmp_path / "rows.csv"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"image": "a.png", "text": "x"}\n{"image": "a.p', r"rows\.jsonl is not JSON in line 2"),
        ('{"image": "a.png", "text": "x", "text": "y"}\n', "has 'text' more than once in a row"),
        ('["a.png", "x"]\n', r"holds 'a\.png' in row 1, where a row is an object"),
    ],
)
def test_mistakes_in_json_are_one_true_line(tmp_path: Path, text: str, words: str) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_rows(recipe(tmp_path / "rows.jsonl"))


def test_columns_that_nobody_asked_for_are_not_read(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    rows = [{"image": "a.png", "text": "x", "id": 17}, {"image": "a.png", "text": "y", "id": {"deep": [1]}}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.csv").write_text("image,text,note,note\na.png,x,1,2\na.png,y,,\n")
    assert captions(tmp_path / "rows.jsonl") == captions(tmp_path / "rows.csv") == ["x", "y"]


def test_one_array_or_an_object_of_paths_is_a_table_too(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    rows = [{"image": "a.png", "text": "x"}, {"image": "b.png", "text": "y"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "kohya.json").write_text(json.dumps({"a.png": {"text": "x"}, "b": {"text": "y"}}))
    (tmp_path / "flat.json").write_text(json.dumps({"a.png": "x", "b.png": "y"}))
    for name in ("rows.json", "kohya.json", "flat.json"):
        assert captions(tmp_path / name) == ["x", "y"], name


def test_captions_of_coco(tmp_path: Path) -> None:
    pictures(tmp_path / "train2017", "1.png", "2.png")
    images = [{"id": number, "file_name": f"{number}.png"} for number in (1, 2)]
    annotations = [{"image_id": number, "caption": f"a {number}, {each}"} for number in (1, 2) for each in range(2)]
    path = tmp_path / "annotations" / "captions.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    settings = {"caption_column": "caption", "image_root": str(tmp_path / "train2017")}
    assert load_rows(recipe(path, **settings))["caption"][:] == [["a 1, 0", "a 1, 1"], ["a 2, 0", "a 2, 1"]]
    folder = Recipe(pretrained_model_name_or_path="-", train_data_dir=str(tmp_path), **settings)
    assert len(load_rows(folder)) == 2


def test_columns_of_usual_names_are_found_in_any_case(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "rows.tsv").write_bytes("FileName\tText\r\na.png\tx\r\n".encode("utf-16"))
    pq.write_table(pa.table({"Path": ["a.png"], "Text": ["x"]}), tmp_path / "rows.parquet")
    for name in ("rows.tsv", "rows.parquet"):
        assert captions(tmp_path / name, caption_column="Text") == ["x"]
        with pytest.raises(RecipeError, match="nearest: Text"):
            load_rows(recipe(tmp_path / name))


def test_a_name_stands_for_the_one_file_that_fits(tmp_path: Path) -> None:
    folder = pictures(
        tmp_path / "pics", "Red.JPG", "b.png", "b.jpg", unicodedata.normalize("NFD", "é.png"), "sub/c.png"
    )
    lines = ["red.jpg", "RED", ".\\sub\\c.png", "./sub/C", str(folder / "b.png"), "é.png", "b", "missing"]
    (folder / "rows.csv").write_text("image,text\n" + "".join(f"{line},x\n" for line in lines), encoding="utf-8")
    source = load_sources(recipe(folder / "rows.csv"))[0]
    names = [Path(row["image"]["path"]).name for row in source.rows]
    assert names[:6] == ["Red.JPG", "Red.JPG", "c.png", "c.png", "b.png", unicodedata.normalize("NFD", "é.png")]
    assert "several files fit: b.jpg, b.png" in source.rows[6]["__defect__"]
    assert source.recognised.notes[0].startswith("2 rows have no picture")
    assert source.recognised.notes[1].startswith("5 paths were found in another case")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["path", "bytes", "dict of bytes", "dict of path", "base64", "data address"])
def test_columns_of_pictures_of_every_kind(tmp_path: Path, kind: str, streaming: bool) -> None:
    pictures(tmp_path, "a.png")
    text = base64.b64encode(png()).decode()
    values: dict[str, Any] = {
        "path": "a.png",
        "bytes": png(),
        "dict of bytes": {"bytes": png(), "path": None},
        "dict of path": {"bytes": None, "path": str(tmp_path / "a.png")},
        "base64": text,
        "data address": f"data:image/png;base64,{text}",
    }
    rows = [{"image": values[kind], "text": "x", "other": 1}] * 2
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    names = ["rows.parquet"]
    if not isinstance(values[kind], bytes) and kind != "dict of bytes":
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names.append("rows.jsonl")
    for name in names:
        config = recipe(tmp_path / name, streaming=streaming, max_train_steps=1)
        found = list(load_streams(config)[0].rows if streaming else load_rows(config))
        assert [open_image(row["image"]).size for row in found] == [(8, 8)] * 2, name
        assert [row["text"] for row in found] == ["x", "x"]


def test_classes_are_called_by_their_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "number": datasets.Value("int64"),
        }
    )
    rows = [{"image": {"bytes": png(), "path": None}, "label": label, "number": 3} for label in (0, 1)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    path = tmp_path / "rows.parquet"
    assert captions(path, caption_column="label") == ["cat", "dog"]
    assert captions(path, caption_template="{number} of a {label}") == ["3 of a cat", "3 of a dog"]
    stream = load_streams(recipe(path, caption_column="label", streaming=True, max_train_steps=1))[0].rows
    assert [row["label"] for row in stream] == ["cat", "dog"]
    with pytest.raises(RecipeError, match=r"holds Value\('int64'\).* --caption_template 'number \{number\}'"):
        load_rows(recipe(path, caption_column="number"))


def test_texts_within_objects_are_reached_by_their_path(tmp_path: Path) -> None:
    rows = [{"image": png(), "json": {"caption": f"number {number}", "width": 8}} for number in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert captions(tmp_path / "rows.parquet", caption_column="json.caption") == ["number 0", "number 1"]
    with pytest.raises(RecipeError, match=r"holds an object with the keys caption, width: .* json\.caption"):
        load_rows(recipe(tmp_path / "rows.parquet", caption_column="json"))


def test_excels_own_line_and_a_header_in_quotes(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('sep=;\n"file name";"text"\n')
    assert Table(tmp_path / "rows.csv").columns == ["file name", "text"]


def test_addresses_in_parquet_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["https://example.org/a.jpg"], "text": ["x"]}), tmp_path / "rows.parquet")
    with pytest.raises(RecipeError, match="holds addresses"):
        load_rows(recipe(tmp_path / "rows.parquet"))


def test_a_long_path_is_no_base64(tmp_path: Path) -> None:
    folder = tmp_path / "workspace" / ("x" * 40) / ("y" * 40)
    pictures(folder, "a.png")
    (folder / "Qk").mkdir()
    name = pictures(folder, f"Qk{'z' * 80}.png") / f"Qk{'z' * 80}"
    name.with_suffix(".png").rename(name)
    (tmp_path / "rows.csv").write_text(f"image,text\n{folder}/a.png,x\n{name},y\n")
    assert captions(tmp_path / "rows.csv") == ["x", "y"]


def test_paths_in_parquet_stay_in_their_folder_and_begin_at_image_root(tmp_path: Path) -> None:
    pictures(tmp_path / "elsewhere", "a.png")
    (tmp_path / "data").mkdir()
    rows = {"image": ["a.png"], "text": ["x"]}
    pq.write_table(pa.table(rows), tmp_path / "data" / "rows.parquet")
    root = str(tmp_path / "elsewhere")
    assert captions(tmp_path / "data" / "rows.parquet", image_root=root) == ["x"]
    with pytest.raises(RecipeError, match=r"names no picture: .*a\.png: no such file; .* --image_root"):
        load_rows(recipe(tmp_path / "data"))
    pq.write_table(pa.table({**rows, "image": ["../elsewhere/a.png"]}), tmp_path / "data" / "rows.parquet")
    assert captions(tmp_path / "data" / "rows.parquet") == ["x"]
    with pytest.raises(RecipeError, match="names no picture"):
        load_rows(recipe(tmp_path / "data"))


@pytest.mark.parametrize("streaming", [False, True])
def test_objects_with_a_path_only_and_relative_paths(tmp_path: Path, streaming: bool) -> None:
    pictures(tmp_path / "im", "a.png")
    for image in ({"path": "im/a.png"}, {"bytes": None, "path": "im\\A.png"}):
        pq.write_table(pa.Table.from_pylist([{"image": image, "text": "x"}]), tmp_path / "rows.parquet")
        config = recipe(tmp_path / "rows.parquet", streaming=streaming, max_train_steps=1)
        (row,) = load_streams(config)[0].rows if streaming else load_rows(config)
        assert open_image(row["image"]).size == (8, 8)


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_in_lists_and_objects_are_called_by_their_names(tmp_path: Path, streaming: bool) -> None:
    label = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Image(), "tags": datasets.List(label), "o": {"label": label}})
    rows = [{"image": {"bytes": png(), "path": None}, "tags": [1, 0], "o": {"label": 1}}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    for template, caption in (("a {tags}", "a dog"), ("a {o.label}", "a dog")):
        config = recipe(tmp_path / "rows.parquet", caption_template=template, streaming=streaming, max_train_steps=1)
        (row,) = load_streams(config)[0].rows if streaming else load_rows(config)
        assert make_caption(row, config, FIRST) == caption


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('image,text\na.png,"an unfinished quote\na.png,y\n', r"has a quote in row 1 that is not closed"),
        ('image,text\na.png,"Hello" she said\n', r"has a quote in row 1 that is not closed, or does not end its text"),
        ("image,text,\na.png,a cat, asleep\n", r"has 3 fields in row 1, and its first line names 2 columns"),
    ],
)
def test_quotes_swallow_no_rows(tmp_path: Path, text: str, words: str) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_rows(recipe(tmp_path / "rows.csv"))


def test_the_first_words_name_the_captions_column(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "rows.csv").write_text("image,caption\na.png,x\n")
    (source,) = load_sources(recipe(tmp_path / "rows.csv", caption_column="caption"))
    assert source.recognised.captions == "the column caption"


def test_line_ends_of_old_macs(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "rows.csv").write_bytes(b"image;text\ra.png;x\ra.png;y\r")
    assert captions(tmp_path / "rows.csv") == ["x", "y"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet", "rows.tar"])
def test_what_was_not_downloaded_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(RecipeError, match=r"is a pointer of Git LFS instead of the file: run `git lfs pull`"):
        load_rows(recipe(tmp_path / name))
    (tmp_path / name).write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(RecipeError, match="is a web page instead of the file"):
        load_rows(recipe(tmp_path / name))
