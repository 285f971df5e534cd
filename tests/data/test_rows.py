import gc
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from sd_recipes.data.images import open_image
from sd_recipes.data.rows import load_held_out_rows, load_rows, load_sources, load_streams
from sd_recipes.data.sizes import check_held_out_sizes
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe


def recipe(**settings: Any) -> Recipe:
    return Recipe(pretrained_model_name_or_path="-", **settings)


@pytest.mark.parametrize(("name", "text"), [("rows.jsonl", ""), ("rows.csv", "image,text\n")])
def test_a_stream_without_rows_says_so(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match="has a file without rows"):
        load_streams(recipe(dataset_name=str(tmp_path), streaming=True, max_train_steps=1))


def test_an_image_folder_gives_encoded_images_and_captions(image_folder: Path) -> None:
    rows = load_rows(recipe(train_data_dir=str(image_folder)))
    assert rows.column_names == ["image", "text"]
    assert len(rows) == 8
    assert set(rows[0]["image"]) == {"bytes", "path"}
    assert rows[0]["text"] == "disc number 0"


def test_a_parquet_file_and_the_embedded_data_are_read(tmp_path: Path, image_folder: Path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.load_dataset("imagefolder", data_dir=str(image_folder))["train"].to_parquet(path)
    rows = load_rows(recipe(dataset_name=str(path)))
    assert len(rows) == 8
    assert open_image(rows[0]["image"]).size == (40, 32)
    emoji = load_rows(recipe(dataset_name="sd-recipes/emoji", train_split="flags"))
    assert (len(emoji), "flag of France" in emoji["text"]) == (254, True)


@pytest.mark.parametrize("flag", ["dataset_revision", "dataset_config_name"])
def test_defect_32_files_of_this_machine_have_no_revisions(tmp_path: Path, image_folder: Path, flag: str) -> None:
    path = tmp_path / "rows" / "train.parquet"
    datasets.load_dataset("imagefolder", data_dir=str(image_folder))["train"].to_parquet(path)
    with pytest.raises(RecipeError, match=f"train.parquet names files, which --{flag} contradicts: drop one"):
        load_rows(recipe(dataset_name=str(path), **{flag: "abc"}))
    if flag == "dataset_revision":
        with pytest.raises(RecipeError, match=r"rows is on this machine and has no revisions: drop --dataset_revision"):
            load_rows(recipe(dataset_name=str(path.parent), dataset_revision="abc"))


def test_defect_25_held_out_moments_are_of_the_size_of_the_held_out_loss() -> None:
    rows = datasets.Dataset.from_dict({"moments": [b"", b""], "height": [32, 32], "width": [32, 48]})
    config = recipe(dataset_name="x", validation_split="test", resolution=32)
    check_held_out_sizes(rows.select([0]), config)
    buckets = {"aspect_ratio_buckets": True, "bucket_step": 16}
    check_held_out_sizes(rows.select([0]), config.model_copy(update={"resolution": 40, **buckets}))
    with pytest.raises(RecipeError, match=r"--validation_split test holds moments of 32 x 48 pixels, and .* 32 x 32"):
        check_held_out_sizes(rows, config)


def test_max_train_samples_draws_rows_by_the_seed(image_folder: Path) -> None:
    config = recipe(train_data_dir=str(image_folder), max_train_samples=3)
    chosen = {seed: load_rows(config, seed=seed)["text"][:] for seed in (0, 1)}
    assert [len(texts) for texts in chosen.values()] == [3, 3]
    assert chosen[0] == load_rows(config, seed=0)["text"][:]
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"caption_column": "txt"}, "asked for the column 'txt', has the columns ['file_name', 'text']; nearest: text"),
        ({"image_column": "imgae"}, "nearest: image"),
        ({"image_column": "text"}, "its pictures are files: drop --image_column"),
        ({"train_split": "trian"}, "it has ['train']"),
    ],
)
def test_wrong_columns_and_splits_are_named(image_folder: Path, settings: dict, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_rows(recipe(train_data_dir=str(image_folder), **settings))
    assert words in str(error.value)


def test_missing_and_empty_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file or folder"):
        load_rows(recipe(train_data_dir=str(tmp_path / "absent")))
    with pytest.raises(RecipeError, match="is empty"):
        load_rows(recipe(train_data_dir=str(tmp_path)))
    with pytest.raises(RecipeError, match="no such file"):
        load_rows(recipe(dataset_name=str(tmp_path / "absent.parquet")))
    datasets.Dataset.from_dict({"image": [], "text": []}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(RecipeError, match=r"no rows|cannot be read"):
        load_rows(recipe(dataset_name=str(tmp_path / "none.parquet")))


def test_a_folder_without_metadata_is_told_what_to_add(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(RecipeError, match=r"metadata\.jsonl"):
        load_rows(recipe(train_data_dir=str(tmp_path)))


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "metadata.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith("csv"):
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        (folder / name).write_text("\n".join(lines) + "\n")
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        (folder / row["file_name"]).parent.mkdir(exist_ok=True)
        if ".." not in row["file_name"]:
            Image.new("RGB", (8, 8)).save(folder / row["file_name"])
    return folder


# datasets' reader of a metadata.csv leaves the file to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_is_read_as_datasets_reads_it(tmp_path: Path, name: str) -> None:
    rows = [{"file_name": f"deeper/{number}.png", "text": f"number {number}"} for number in (3, 1, 2)]
    folder = write_rows(tmp_path / "pictures", rows, name)
    ours = load_rows(recipe(train_data_dir=str(folder)))
    theirs = datasets.load_dataset("imagefolder", data_files={"train": f"{folder}/**"}, split="train")
    theirs = theirs.cast_column("image", datasets.Image(decode=False))

    def pairs(found: datasets.Dataset) -> set[tuple[str, str]]:
        return {(Path(row["image"]["path"]).name, row["text"]) for row in found}

    gc.collect()
    assert pairs(ours) == pairs(theirs) == {(f"{number}.png", f"number {number}") for number in (1, 2, 3)}


def test_images_without_a_row_and_rows_without_an_image_are_told(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "pictures", [{"file_name": f"{number}.png", "text": "a"} for number in range(3)])
    (folder / "1.png").unlink()
    Image.new("RGB", (8, 8)).save(folder / "forgotten.png")
    source = load_sources(recipe(train_data_dir=str(folder)))[0]
    assert len(source.rows) == 3
    assert source.recognised.notes == [
        "1 pictures have no row in a table and are not used: forgotten.png",
        "1 rows of a table have no picture: 1.png",
    ]


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "a/../../outside.png"])
def test_metadata_may_not_name_files_outside_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}) + "\n")
    with pytest.raises(RecipeError, match="outside of"):
        load_rows(recipe(train_data_dir=str(tmp_path / "pictures")))


def test_captions_that_json_writes_as_numbers_are_text(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "pictures", [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": 3}])
    assert load_rows(recipe(train_data_dir=str(folder)))["text"][:] == ["a", "3"]


def tar_shard(path: Path, names: list[str]) -> Path:
    """A WebDataset shard: pairs of NAME.jpg and NAME.txt."""
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(picture, "JPEG")
            for suffix, content in (("jpg", picture.getvalue()), ("txt", f"caption of {name}".encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_shards_are_read(tmp_path: Path, streaming: bool) -> None:
    tar_shard(tmp_path / "0.tar", ["a", "b"])
    tar_shard(tmp_path / "1.tar", ["c"])
    settings = {"dataset_name": str(tmp_path / "*.tar"), "image_column": "jpg", "caption_column": "txt"}
    if streaming:
        rows = load_streams(recipe(**settings, streaming=True, max_train_steps=1))[0].rows
        assert rows.num_shards == 2
    else:
        rows = load_rows(recipe(**settings))
    found = list(rows)
    assert [row["txt"] for row in found] == ["caption of a", "caption of b", "caption of c"]
    assert open_image(found[0]["jpg"]).size == (8, 8)


def test_an_arrow_file_is_read(tmp_path: Path, image_folder: Path) -> None:
    loaded = datasets.load_dataset("imagefolder", data_dir=str(image_folder))["train"]
    loaded.save_to_disk(tmp_path / "saved")
    rows = load_rows(recipe(dataset_name=str(next((tmp_path / "saved").glob("*.arrow")))))
    assert len(rows) == 8


def test_a_stream_has_the_rows_of_the_file(tmp_path: Path, image_folder: Path) -> None:
    rows = load_rows(recipe(train_data_dir=str(image_folder)))
    path = tmp_path / "rows.parquet"
    datasets.load_dataset("imagefolder", data_dir=str(image_folder))["train"].to_parquet(path)
    streamed = list(load_streams(recipe(dataset_name=str(path), streaming=True, max_train_steps=1))[0].rows)
    assert [row["text"] for row in streamed] == rows["text"][:]
    assert open_image(streamed[3]["image"]).tobytes() == open_image(rows[3]["image"]).tobytes()
    with pytest.raises(RecipeError, match="nearest: text"):
        load_streams(recipe(dataset_name=str(path), streaming=True, max_train_steps=1, caption_column="txt"))


def test_several_sources_come_one_after_the_other(tmp_path: Path, image_folder: Path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.load_dataset("imagefolder", data_dir=str(image_folder))["train"].select([1, 2]).to_parquet(path)
    sources = [{"train_data_dir": str(image_folder)}, {"dataset_name": str(path), "weight": 3}]
    parts = load_sources(recipe(data_sources=sources))
    assert [len(part.rows) for part in parts] == [8, 2]
    rows = load_rows(recipe(data_sources=sources))
    assert rows[9]["text"] == "disc number 2"
    assert open_image(rows[9]["image"]).size == (40, 32)


def test_held_out_rows_of_a_stream_are_kept(tmp_path: Path) -> None:
    settings = {"dataset_name": "sd-recipes/emoji", "streaming": True, "max_train_steps": 1}
    rows = load_held_out_rows(recipe(**settings), "flags_heldout", None)
    plain = load_held_out_rows(recipe(dataset_name="sd-recipes/emoji"), "flags_heldout", None)
    assert rows["text"][:] == plain["text"][:]


def test_a_stream_comes_from_a_url(tmp_path: Path, image_folder: Path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.load_dataset("imagefolder", data_dir=str(image_folder))["train"].to_parquet(path)
    rows = list(load_streams(recipe(dataset_name=f"file://{path}", streaming=True, max_train_steps=1))[0].rows)
    assert [row["text"] for row in rows] == [f"disc number {number}" for number in range(8)]
    assert open_image(rows[0]["image"]).size == (40, 32)
