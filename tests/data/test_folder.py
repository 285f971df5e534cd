"""Folders as people have them: captions beside the pictures, in tables, or in names."""

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sd_recipes.data.captions import make_caption
from sd_recipes.data.first_words import FIRST
from sd_recipes.data.rows import SourceRows, load_held_out_rows, load_rows, load_sources, load_streams
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe


def recipe(folder: Path, **settings: Any) -> Recipe:
    return Recipe(pretrained_model_name_or_path="-", train_data_dir=str(folder), **settings)


def source(folder: Path, **settings: Any) -> SourceRows:
    return load_sources(recipe(folder, **settings))[0]


def captions(folder: Path, **settings: Any) -> dict[str, list[str]]:
    """The captions of each picture's rows, as training makes them, by the picture's path in the folder."""
    config = recipe(folder, **settings)
    found: dict[str, list[str]] = {}
    for row in load_rows(config):
        name = os.path.relpath(row["image"]["path"], folder)
        found.setdefault(name, []).append(make_caption(row, config, FIRST))
    return found


def pictures(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 10 * number, np.uint8)).save(path)
    return folder


def beside(folder: Path, suffix: str, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}{suffix}").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("suffix", [".txt", ".caption", ".TXT"])
@pytest.mark.parametrize("streaming", [False, True])
def test_captions_in_files_beside_the_pictures(tmp_path: Path, suffix: str, streaming: bool) -> None:
    pictures(tmp_path, "a.jpg", "b.PNG", "c d.jpeg")
    beside(tmp_path, suffix, **{"a": "an ä\n", "b": "\ufeffa b", "c d": "a c"})
    config = recipe(tmp_path, streaming=streaming, max_train_steps=1)
    rows = load_streams(config)[0].rows if streaming else load_rows(config)
    assert [row["text"] for row in rows] == ["an ä", "a b", "a c"]


def test_a_json_file_beside_a_picture_has_keys(tmp_path: Path) -> None:
    pictures(tmp_path, "a.jpg", "b.jpg")
    beside(tmp_path, ".json", a='{"caption": "an a", "width": 8}', b='{"caption": ["a b", "second"], "width": 9}')
    assert captions(tmp_path, caption_column="caption") == {"a.jpg": ["an a"], "b.jpg": ["a b"]}
    assert captions(tmp_path, caption_template="{width} wide: {json.caption}")["a.jpg"] == ["8 wide: an a"]
    with pytest.raises(Exception, match=r"a.json has no text: it holds \['caption', 'width'\]"):
        captions(tmp_path)


def test_several_lines_are_several_captions_or_one(tmp_path: Path) -> None:
    pictures(tmp_path, "a.jpg", "b.jpg")
    beside(tmp_path, ".txt", a="first\n\nsecond \n", b="only\n")
    several = source(tmp_path)
    assert several.rows["text"][:] == [["first", "second"], ["only"]]
    assert "1 of several lines, of which one is drawn" in several.recognised.captions
    assert source(tmp_path, caption_lines="one").rows["text"][:] == ["first second", "only"]


def test_two_kinds_of_caption_files_are_chosen_between(tmp_path: Path) -> None:
    pictures(tmp_path, "a.jpg")
    beside(tmp_path, ".txt", a="of txt")
    beside(tmp_path, ".caption", a="of caption")
    with pytest.raises(RecipeError, match=r"1 \.txt files and 1 \.caption files .* --caption_extension \.txt"):
        captions(tmp_path)
    for extension in (".caption", "caption"):
        assert captions(tmp_path, caption_extension=extension) == {"a.jpg": ["of caption"]}
    with pytest.raises(RecipeError, match=r"no \.tags file beside a picture"):
        captions(tmp_path, caption_extension=".tags")


def test_orphans_on_either_side_are_counted_and_named(tmp_path: Path) -> None:
    pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    beside(tmp_path, ".txt", a="an a", readme="about these pictures")
    found = source(tmp_path)
    assert found.recognised.notes == [
        "2 pictures have no .txt file and are not used (--blank_captions empty uses them): b.jpg, c.jpg",
        "1 .txt files have no picture: readme.txt",
    ]
    assert len(found.rows) == 1
    assert captions(tmp_path, blank_captions="empty") == {"a.jpg": ["an a"], "b.jpg": [""], "c.jpg": [""]}
    with pytest.raises(RecipeError, match=r"2 pictures have no \.txt file \(--blank_captions error\): .*b\.jpg"):
        captions(tmp_path, blank_captions="error")


def test_a_caption_file_that_is_not_utf8_is_a_bad_row_or_read_as_told(tmp_path: Path) -> None:
    pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    beside(tmp_path, ".txt", a="an a")
    (tmp_path / "b.txt").write_bytes("Café".encode("cp1252"))
    (tmp_path / "c.txt").write_bytes("Käse".encode("utf-16"))
    rows = load_rows(recipe(tmp_path))
    with pytest.raises(
        ValueError, match=r"b\.txt is not UTF-8 \(byte 0xe9 in line 1\); as cp1252 it would read 'Café'"
    ):
        make_caption(rows[1], recipe(tmp_path), FIRST)
    assert rows[2]["text"] == "Käse"
    assert captions(tmp_path, text_encoding="cp1252")["b.jpg"] == ["Café"]


def test_folders_repeat_their_pictures(tmp_path: Path) -> None:
    pictures(tmp_path, "10_a cat/0.png", "10_a cat/1.png", "2_dog/2.png", "birds/3.png", "2019_trip/4.png")
    for path in tmp_path.rglob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)
    found = source(tmp_path)
    numbers = {name: len(each) for name, each in captions(tmp_path).items()}
    assert numbers == {
        "10_a cat/0.png": 10,
        "10_a cat/1.png": 10,
        "2_dog/2.png": 2,
        "birds/3.png": 1,
        "2019_trip/4.png": 1,
    }
    assert "10_a cat: 2 pictures, each 10 times an epoch (--no-folder_repeats)" in found.recognised.notes
    assert len(load_rows(recipe(tmp_path, folder_repeats=False))) == 5
    streamed = load_streams(recipe(tmp_path, streaming=True, max_train_steps=1))[0].rows
    assert sorted(row["text"] for row in streamed) == sorted(found.rows["text"][:])


@pytest.mark.parametrize(("settings", "expected"), [
    ({"caption_from": "folder"}, {"a cat", "birds"}),
    ({"caption_from": "file"}, {"red one", "blue"}),
    ({"caption_template": "a photo of {label}"}, {"a photo of a cat", "a photo of birds"}),
    ({"caption_column": "label"}, {"a cat", "birds"}),
])  # fmt: skip
def test_names_as_captions(tmp_path: Path, settings: dict[str, Any], expected: set[str]) -> None:
    pictures(tmp_path, "3_a cat/red one.png", "birds/blue.png")
    assert {each for found in captions(tmp_path, **settings).values() for each in found} == expected


def test_pictures_without_any_caption_are_told_the_ways(tmp_path: Path) -> None:
    pictures(tmp_path, "cat/a.png", "dog/b.png")
    with pytest.raises(RecipeError) as error:
        load_rows(recipe(tmp_path))
    for way in (".txt file", "metadata.jsonl", "--caption_from", "'a photo of a {label}' (label: cat, dog)"):
        assert way in str(error.value)
    (tmp_path / "captions.txt").write_text("a.png\ta cat\n")
    with pytest.raises(RecipeError, match=r"no picture lies beside captions\.txt; a table has to be called \.csv"):
        load_rows(recipe(tmp_path))


def test_split_folders_are_splits(tmp_path: Path) -> None:
    pictures(tmp_path, "train/a.png", "train/b.png", "Test/c.png", "val/d.png", "extra/e.png")
    for path in tmp_path.rglob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)
    found = source(tmp_path)
    assert found.rows["text"][:] == ["a", "b"]
    assert found.recognised.notes == [
        "1 pictures lie beside the folder for training and are not used: extra/e.png",
        "split train; not trained on: test, validation",
    ]
    assert load_held_out_rows(recipe(tmp_path), "val", None)["text"][:] == ["d"]
    assert load_rows(recipe(tmp_path, train_split="test"))["text"][:] == ["c"]
    with pytest.raises(RecipeError, match=r"has no split 'other': it has \['test', 'train', 'validation'\]"):
        load_rows(recipe(tmp_path, train_split="other"))


def test_links_are_followed_once_and_not_out_of_the_folder(tmp_path: Path) -> None:
    inside, outside = pictures(tmp_path / "data", "a.png", "deep/b.png"), pictures(tmp_path / "outside", "c.png")
    for path in tmp_path.rglob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)
    (inside / "deep" / "loop").symlink_to(inside)
    (inside / "again").symlink_to(inside / "deep")
    (inside / "copy.png").symlink_to(inside / "a.png")
    (inside / "out").symlink_to(outside)
    found = source(inside)
    assert sorted(found.rows["text"][:]) == ["a", "b"]
    assert found.recognised.notes == [
        "3 links to what is there already are passed over",
        "1 links lead out of the folder and are not followed (--follow_links): out",
    ]
    assert sorted(source(inside, follow_links=True).rows["text"][:]) == ["a", "b", "c"]


def test_what_is_hidden_or_a_systems_is_passed_over(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", ".thumbnails/a.png", "__MACOSX/a.png")
    beside(tmp_path, ".txt", a="an a")
    (tmp_path / "._a.png").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "Thumbs.db").write_bytes(b"")
    found = source(tmp_path)
    assert found.rows["text"][:] == ["an a"]
    assert "2 hidden folders are passed over" in found.recognised.notes
    assert "2 files of macOS or Windows are passed over" in found.recognised.notes


def table(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_table_of_any_name_that_fits_is_taken(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "captions.csv").write_text('image, caption\na.png, a knight\nb.png, "a cat, asleep"\n')
    (tmp_path / "notes.csv").write_text("who,when\nme,now\n")
    found = source(tmp_path, caption_column="caption")
    assert found.rows["caption"][:] == ["a knight", "a cat, asleep"]
    assert found.recognised.captions == "the table captions.csv"
    assert "1 tables do not fit and are passed over" in found.recognised.notes[0]
    with pytest.raises(RecipeError, match=r"captions.csv, asked for the column 'text', has the columns \['image', 'ca"):
        load_rows(recipe(tmp_path))


def test_two_tables_that_fit_are_both_named(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text("file,text\na.png,x\n")
    with pytest.raises(RecipeError, match=r"one\.csv and .*two\.csv both say .* --dataset_name .*one\.csv"):
        load_rows(recipe(tmp_path))


def test_tables_named_after_splits_are_splits(tmp_path: Path) -> None:
    pictures(tmp_path, "images/a.png", "images/b.png")
    (tmp_path / "train.csv").write_text("path,text\nimages/a.png,x\n")
    (tmp_path / "test.csv").write_text("path,text\nimages/b.png,y\n")
    assert load_rows(recipe(tmp_path))["text"][:] == ["x"]
    assert load_held_out_rows(recipe(tmp_path), "test", None)["text"][:] == ["y"]


def test_metadata_needs_the_column_of_datasets(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("image,text\na.png,x\n")
    with pytest.raises(RecipeError, match=r"metadata.csv has no column `file_name`"):
        load_rows(recipe(tmp_path))


def test_paths_begin_at_image_root(tmp_path: Path) -> None:
    pictures(tmp_path, "images/a.png")
    (tmp_path / "captions.csv").write_text("image,text\na.png,x\n")
    with pytest.raises(RecipeError, match=rf"captions.csv: none of its 1 rows .* --image_root {tmp_path}/images"):
        load_rows(recipe(tmp_path))
    assert load_rows(recipe(tmp_path, image_root=str(tmp_path / "images")))["text"][:] == ["x"]
    with pytest.raises(RecipeError, match="--image_root nowhere: no such folder"):
        load_rows(recipe(tmp_path, image_root="nowhere"))


def test_a_table_with_links_out_of_the_folder(tmp_path: Path) -> None:
    outside = pictures(tmp_path / "outside", "a.png")
    inside = pictures(tmp_path / "data", "b.png")
    (inside / "a.png").symlink_to(outside / "a.png")
    table(inside / "metadata.jsonl", {"file_name": "a.png", "text": "x"}, {"file_name": "b.png", "text": "y"})
    rows = load_rows(recipe(inside))
    with pytest.raises(ValueError, match="a link out of the folder, which --follow_links would follow"):
        make_caption(rows[0], recipe(inside), FIRST)
    assert captions(inside, follow_links=True) == {"a.png": ["x"], "b.png": ["y"]}


def test_a_source_has_its_own_caption_and_repeats(tmp_path: Path) -> None:
    pictures(tmp_path / "one", "a.png", "b.png")
    pictures(tmp_path / "two", "c.png")
    beside(tmp_path / "one", ".txt", a="an a")
    sources = [
        {"train_data_dir": str(tmp_path / "one"), "caption": "sks dog", "weight": "rows", "repeats": 3},
        {"train_data_dir": str(tmp_path / "two"), "caption": "dog", "weight": "rows"},
    ]
    rows = load_rows(Recipe(pretrained_model_name_or_path="-", data_sources=sources))
    assert rows["text"][:] == ["an a"] * 3 + ["sks dog"] * 3 + ["dog"]


def test_names_that_are_not_utf8_are_told(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    beside(tmp_path, ".txt", a="an a")
    os.rename(os.fsencode(pictures(tmp_path, "x.png") / "x.png"), os.fsencode(tmp_path) + b"/\xe9.png")
    found = source(tmp_path)
    assert len(found.rows) == 1
    assert "1 pictures have names that are not UTF-8 and are not used" in found.recognised.notes[0]


def test_split_folders_may_lie_deeper_and_are_no_labels(tmp_path: Path) -> None:
    pictures(tmp_path, "images/train/a.png", "images/test/b.png", "images/train/cat/c.png")
    for path in tmp_path.rglob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)
    assert source(tmp_path).rows["text"][:] == ["a", "c"]
    labels = load_rows(recipe(tmp_path, caption_template="a {label}"))["label"][:]
    assert labels == [None, "cat"]


def test_a_label_in_a_table_is_preferred_to_the_folders_name(tmp_path: Path) -> None:
    pictures(tmp_path, "images/a.png", "images/b.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\nimages/a.png,cat\nimages/b.png,dog\n")
    assert captions(tmp_path, caption_template="a {label}") == {"images/a.png": ["a cat"], "images/b.png": ["a dog"]}


def test_an_extension_that_is_given_is_preferred_to_a_table(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "captions.csv").write_text("image,text\na.png,of the table\n")
    beside(tmp_path, ".txt", a="of the file")
    found = source(tmp_path)
    assert found.rows["text"][:] == ["of the table"]
    assert "1 caption files beside the pictures are passed over for the table" in found.recognised.notes[0]
    found = source(tmp_path, caption_extension=".txt")
    assert found.rows["text"][:] == ["of the file"]
    assert found.recognised.notes == ["1 tables are passed over: captions.csv"]
    with pytest.raises(RecipeError, match=r"the column `text`, and is asked for 'titel': ask for `text`"):
        load_rows(recipe(tmp_path, caption_template="a {titel}"))


def test_a_picture_that_two_tables_name_is_told(tmp_path: Path) -> None:
    pictures(tmp_path, "sub/a.png", "b.png")
    (tmp_path / "captions.csv").write_text("image,text\nsub/a.png,x\nb.png,y\n")
    (tmp_path / "sub" / "captions.csv").write_text("image,text\na.png,z\n")
    with pytest.raises(RecipeError, match=r"both name .*sub/a\.png: choose one of the tables"):
        load_rows(recipe(tmp_path))


def test_repeats_leave_labels_as_they_are(tmp_path: Path) -> None:
    pictures(tmp_path, "train/10_cat/a.png", "test/10_cat/b.png")
    config = recipe(tmp_path, caption_template="a {label}")
    rows = [*load_rows(config), *load_held_out_rows(config, "test", None)]
    assert {make_caption(row, config, FIRST) for row in rows} == {"a cat"}
    assert len(load_held_out_rows(config, "test", None)) == 1


def test_sources_with_one_and_with_several_captions_are_mixed(tmp_path: Path) -> None:
    for name, text in (("one", "only"), ("two", "first\nsecond")):
        pictures(tmp_path / name, "a.png")
        beside(tmp_path / name, ".txt", a=text)
    for names in (("one", "two"), ("two", "one")):
        sources = [{"train_data_dir": str(tmp_path / name)} for name in names]
        rows = load_rows(Recipe(pretrained_model_name_or_path="-", data_sources=sources))
        assert sorted(rows["text"][:]) == [["first", "second"], ["only"]]


def test_names_of_files_are_no_captions_of_tables(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "rows.csv").write_text("image,text\na.png,x\n")
    with pytest.raises(RecipeError, match="--caption_from file takes names of picture files"):
        load_rows(Recipe(pretrained_model_name_or_path="-", dataset_name=f"{tmp_path}/rows.csv", caption_from="file"))


def test_caption_files_in_another_case_or_form(tmp_path: Path) -> None:
    pictures(tmp_path, "A.JPG", unicodedata.normalize("NFD", "é.png"))
    beside(tmp_path, ".txt", a="an a", é="an é")
    assert sorted(source(tmp_path).rows["text"][:]) == ["an a", "an é"]


def test_a_pipe_is_passed_over(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    beside(tmp_path, ".txt", a="x")
    os.mkfifo(tmp_path / "b.txt")
    assert source(tmp_path).rows["text"][:] == ["x"]
