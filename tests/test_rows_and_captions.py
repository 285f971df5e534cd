from pathlib import Path

import datasets
import pytest
from PIL import Image
from tiny_models import tiny_tokenizer

from sd_recipes.data.captions import CaptionError, choose_caption, tokenize
from sd_recipes.data.images import open_image
from sd_recipes.data.rows import load_rows
from sd_recipes.recipe import DataConfig, RecipeError


def test_an_image_folder_gives_encoded_images_and_captions(image_folder: Path) -> None:
    rows = load_rows(DataConfig(train_data_dir=str(image_folder)))
    assert rows.column_names == ["image", "text"]
    assert len(rows) == 8
    assert set(rows[0]["image"]) == {"bytes", "path"}
    assert rows[0]["text"] == "disc number 0"


def test_a_parquet_file_and_the_embedded_data_are_read(tmp_path: Path, image_folder: Path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.load_dataset("imagefolder", data_dir=str(image_folder))["train"].to_parquet(path)
    rows = load_rows(DataConfig(dataset_name=str(path)))
    assert len(rows) == 8
    assert open_image(rows[0]["image"]).size == (40, 32)
    emoji = load_rows(DataConfig(dataset_name="sd-recipes/emoji", train_split="flags"))
    assert (len(emoji), "flag of France" in emoji["text"]) == (254, True)


def test_max_train_samples_draws_rows_by_the_seed(image_folder: Path) -> None:
    config = DataConfig(train_data_dir=str(image_folder), max_train_samples=3)
    chosen = {seed: load_rows(config, seed=seed)["text"][:] for seed in (0, 1)}
    assert [len(texts) for texts in chosen.values()] == [3, 3]
    assert chosen[0] == load_rows(config, seed=0)["text"][:]
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"caption_column": "txt"}, "has the columns ['image', 'text']; nearest: text"),
        ({"image_column": "imgae"}, "nearest: image"),
        ({"image_column": "text"}, "not images"),
        ({"train_split": "trian"}, "it has ['train']"),
    ],
)
def test_wrong_columns_and_splits_are_named(image_folder: Path, settings: dict, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_rows(DataConfig(train_data_dir=str(image_folder), **settings))
    assert words in str(error.value)


def test_missing_and_empty_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such folder"):
        load_rows(DataConfig(train_data_dir=str(tmp_path / "absent")))
    with pytest.raises(RecipeError, match="is empty"):
        load_rows(DataConfig(train_data_dir=str(tmp_path)))
    with pytest.raises(RecipeError, match="cannot be read"):
        load_rows(DataConfig(dataset_name=str(tmp_path / "absent.parquet")))
    datasets.Dataset.from_dict({"image": [], "text": []}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(RecipeError, match=r"no rows|cannot be read"):
        load_rows(DataConfig(dataset_name=str(tmp_path / "none.parquet")))


def test_a_folder_without_metadata_is_told_what_to_add(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(RecipeError, match=r"metadata\.jsonl"):
        load_rows(DataConfig(train_data_dir=str(tmp_path)))


def test_one_of_several_captions_is_chosen_by_the_draw() -> None:
    assert choose_caption("a", 0.9) == "a"
    assert [choose_caption(["a", "b"], u) for u in (0.0, 0.49, 0.5, 0.99)] == ["a", "a", "b", "b"]
    for bad in (None, 3, [], [None]):
        with pytest.raises(CaptionError):
            choose_caption(bad, 0.0)


def test_captions_are_padded_and_cut() -> None:
    tokenizer = tiny_tokenizer(max_length=16)
    ids = tokenize(tokenizer, ["ab", "a" * 99, ""])
    assert ids.shape == (3, 16)
    assert ids[0].tolist()[0] == tokenizer.bos_token_id
    assert ids[1].tolist()[-1] == tokenizer.eos_token_id
    assert ids[2].tolist() == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * 15
