"""kohya's dataset.toml as a recipe."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from PIL import Image
from training_runs import forget_accelerator, train

from sd_recipes.commands.inspect import read_settings
from sd_recipes.commands.train import run
from sd_recipes.errors import RecipeError
from sd_recipes.flags import load_recipe, recipe_text
from sd_recipes.kohya import NOT_MAPPED, OF_DATASETS, OF_ONE_SUBSET, OF_SUBSETS, OF_THE_RUN, read_dataset_config

MODEL = ["--pretrained_model_name_or_path", "model"]
SUBSET = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'portraits'\n"
PORTRAITS = {"weight": "rows", "repeats": 1, "train_data_dir": "portraits"}


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of pictures in the current one: with captions beside them, without, and with a metadata file."""
    monkeypatch.chdir(tmp_path)
    for name in ("portraits", "garden", "people", "scans"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (16, 16)).save(f"{name}/{number}.png")
            if name in ("portraits", "garden"):
                Path(f"{name}/{number}.txt").write_text(f"{name} {number}")
    Path("scans.json").write_text(json.dumps({"0": {"caption": "a scan", "tags": "gray, flat"}, "1": {"caption": "b"}}))
    Path("tags.json").write_text(json.dumps({"scans/0.png": {"tags": "gray, flat"}}))


def read(text: str) -> tuple[dict[str, Any], list[str]]:
    Path("dataset.toml").write_text(text)
    return read_dataset_config("dataset.toml")


def test_a_dreambooth_config_with_all_that_maps() -> None:
    settings, lines = read("""
        [general]
        enable_bucket = true
        caption_extension = ".txt"
        shuffle_caption = true
        keep_tokens = 1

        [[datasets]]
        resolution = [768, 768]
        batch_size = 4
        bucket_no_upscale = true
        bucket_reso_steps = 32
        flip_aug = true
        random_crop = true
        color_aug = false
        resize_interpolation = "area"
        caption_separator = ";"
        caption_dropout_rate = 0.1

          [[datasets.subsets]]
          image_dir = "portraits"
          num_repeats = 10
          class_tokens = "sks person"

          [[datasets.subsets]]
          image_dir = "garden"
    """)
    assert settings == {
        "data_sources": [
            PORTRAITS | {"repeats": 10, "caption_extension": ".txt", "caption": "sks person"},
            {"weight": "rows", "repeats": 1, "train_data_dir": "garden", "caption_extension": ".txt"},
        ],
        "folder_repeats": False,
        "resolution": 768,
        "train_batch_size": 4,
        "aspect_ratio_buckets": True,
        "bucket_step": 32,
        "max_upscale": 1.0,
        "random_flip": True,
        "crop": "random",
        "image_interpolation_mode": "box",
        "shuffle_tags": True,
        "keep_tags": 1,
        "tag_separator": ";",
        "caption_dropout": 0.1,
    }
    assert lines == []


def test_the_tools_for_captions_keep_their_names() -> None:
    tools: dict[str, Any] = {
        "caption_dropout_every_n_epochs": 2, "caption_prefix": "masterpiece, ", "caption_suffix": ", best",
        "caption_tag_dropout_rate": 0.1, "enable_wildcard": True, "keep_tokens_separator": "|||",
        "secondary_separator": ";;;",
    }  # fmt: skip
    written = "".join(f"{key} = {json.dumps(value)}\n" for key, value in tools.items())
    settings, lines = read(SUBSET.replace("[[datasets]]\n", f"[[datasets]]\nkeep_tokens = 1\n{written}"))
    assert settings == {"data_sources": [PORTRAITS], "folder_repeats": False, "keep_tags": 1, **tools}
    assert lines == []
    recipe = load_recipe([*MODEL, "--dataset_config", "dataset.toml"])
    assert {key: getattr(recipe, key) for key in tools} == tools
    settings, lines = read(SUBSET + "caption_prefix = ''\nkeep_tokens_separator = ''\nenable_wildcard = false\n")
    assert (settings["caption_prefix"], settings["keep_tokens_separator"], lines) == (None, None, [])


def test_a_config_for_fine_tuning_reads_the_metadata_file() -> None:
    settings, lines = read("""
        [general]
        caption_extension = ".txt"
        [[datasets]]
        [[datasets.subsets]]
        metadata_file = "scans.json"
        image_dir = "scans"
        [[datasets.subsets]]
        metadata_file = "tags.json"
        class_tokens = "sks"
    """)
    table = {"weight": "rows", "repeats": 1}
    assert settings["data_sources"] == [
        table | {"dataset_name": "scans.json", "caption_column": "caption", "image_root": "scans"},
        table | {"dataset_name": "tags.json", "caption_column": "tags"},
    ]
    assert lines == [
        "datasets[0].subsets[0].metadata_file: not mapped: "
        "captions are its `caption`; its `tags` are not added to them",
        "datasets[0].subsets[1].class_tokens: not mapped: captions are those of the metadata_file",
    ]


def test_regularisation_pictures_are_a_source_without_files_of_captions() -> None:
    settings, lines = read(
        "[general]\ncaption_extension = '.txt'\n" + SUBSET
        + "[[datasets.subsets]]\nis_reg = true\nimage_dir = 'people'\nclass_tokens = 'person'\n"
    )  # fmt: skip
    assert settings["data_sources"][1] == {
        "weight": "rows", "repeats": 1, "train_data_dir": "people", "caption": "person", "is_reg": True,
    }  # fmt: skip
    assert lines == []


def test_what_is_said_of_one_trained_subset_is_kept_beside_class_pictures() -> None:
    settings, lines = read(
        SUBSET + "caption_prefix = 'sks,'\nshuffle_caption = true\nkeep_tokens = 2\ncaption_tag_dropout_rate = 0.2\n"
        "[[datasets.subsets]]\nis_reg = true\nimage_dir = 'people'\nclass_tokens = 'person'\ncaption_suffix = 'x'\n"
    )
    kept = {"caption_prefix": "sks,", "shuffle_tags": True, "keep_tags": 2, "caption_tag_dropout_rate": 0.2}
    assert settings == {"data_sources": settings["data_sources"], "folder_repeats": False, **kept}
    assert lines == [
        "datasets[0].subsets[1].caption_suffix: not mapped: class pictures get no prefix and suffix",
        "datasets[0].subsets[1].caption_tag_dropout_rate: not mapped: 0.2 holds for class pictures too",
        "datasets[0].subsets[1].keep_tokens: not mapped: 2 holds for class pictures too",
        "datasets[0].subsets[1].shuffle_caption: not mapped: true holds for class pictures too",
    ]
    _, lines = read(
        "[general]\ncaption_prefix = 'a'\n" + SUBSET + "[[datasets.subsets]]\nis_reg = true\nimage_dir = 'people'\n"
    )
    assert lines == ["datasets[0].subsets[1].caption_prefix: not mapped: class pictures get no prefix and suffix"]


def test_what_differs_between_subsets_is_listed_with_its_values() -> None:
    settings, lines = read("""
        [[datasets]]
        resolution = 512
        [[datasets.subsets]]
        image_dir = "portraits"
        flip_aug = true
        shuffle_caption = true
        [[datasets.subsets]]
        image_dir = "garden"
        shuffle_caption = true

        [[datasets]]
        resolution = [768, 768]
        skip_image_resolution = 512
        [[datasets.subsets]]
        image_dir = "portraits"
        shuffle_caption = true
    """)
    assert [source["train_data_dir"] for source in settings["data_sources"]] == ["portraits", "garden", "portraits"]
    assert settings.keys() == {"data_sources", "folder_repeats", "shuffle_tags"}
    once = "is one setting for the whole run: give the flag"
    assert lines == [
        "datasets[1].skip_image_resolution: not mapped: "
        "small pictures are not skipped; `sd-recipes inspect` lists them",
        "flip_aug: not mapped: true in datasets[0].subsets[0], false in datasets[0].subsets[1], "
        f"false in datasets[1].subsets[0]; --random_flip {once}",
        f"resolution: not mapped: 512 in datasets[0], [768, 768] in datasets[1]; --resolution {once}",
    ]


def test_a_subset_wins_over_its_dataset_and_that_over_general() -> None:
    general, dataset, subset = (
        "[general]\nkeep_tokens = 1\nshuffle_caption = true\n",
        "keep_tokens = 2\n",
        "keep_tokens = 3\n",
    )
    middle = SUBSET.replace("[[datasets]]\n", f"[[datasets]]\n{dataset}")
    kept = [read(text)[0]["keep_tags"] for text in (general + SUBSET, general + middle, general + middle + subset)]
    assert kept == [1, 2, 3]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("resolution = [512, 768]", r"resolution: .*\[512, 768\] has two sides.* 624 has about as many pixels"),
        ("bucket_no_upscale = false", "bucket_no_upscale: .*--max_upscale"),
        ("keep_tokens = 2", "keep_tokens: .*without shuffle_caption"),
        ("color_aug = true", r"datasets\[0\]\.color_aug: .*colours"),
        ("face_crop_aug_range = [1.0, 3.0]", r"datasets\[0\]\.face_crop_aug_range: .*faces"),
        ("max_bucket_reso = 1024", r"datasets\[0\]\.max_bucket_reso: .*--bucket_step"),
        ("custom_attributes = {a = 1}", r"datasets\[0\]\.custom_attributes: "),
        ("token_warmup_step = 0.5", r"datasets\[0\]\.token_warmup_step: "),
        ("validation_split = 0.1", r"datasets\[0\]\.validation_split: .*--validation_split 0.1$"),
    ],
)
def test_a_key_without_a_counterpart_is_listed_with_the_reason(key: str, reason: str) -> None:
    settings, (line,) = read(SUBSET.replace("[[datasets]]\n", f"[[datasets]]\n{key}\n"))
    assert settings == {"data_sources": [PORTRAITS], "folder_repeats": False}
    assert re.match(reason, line), line
    assert ": not mapped: " in line


def test_every_key_is_mapped_or_has_its_reason() -> None:
    known = {key for keys in (OF_DATASETS, OF_SUBSETS, OF_ONE_SUBSET) for names in keys.values() for key in names}
    of_a_source = {"caption_extension", "class_tokens", "image_dir", "is_reg", "metadata_file", "num_repeats"}
    assert known == OF_THE_RUN.keys() | NOT_MAPPED.keys() | of_a_source
    page = (ROOT / "docs" / "data.md").read_text().partition("## kohya's dataset.toml")[2]
    assert [key for key in sorted(known) if f"`{key}`" not in page] == []


def test_what_kohya_leaves_out_is_left_out_and_told() -> None:
    again = "[[datasets.subsets]]\nimage_dir = 'portraits'\nnum_repeats = 3\n"
    never = "[[datasets.subsets]]\nimage_dir = 'garden'\nnum_repeats = 0\n"
    settings, lines = read(SUBSET + again + never)
    assert settings["data_sources"] == [PORTRAITS]
    assert [line.partition(":")[0] for line in lines] == [
        "datasets[0].subsets[1].image_dir", "datasets[0].subsets[2].num_repeats",
    ]  # fmt: skip


def test_json_says_the_same() -> None:
    Path("dataset.json").write_text(
        json.dumps({"datasets": [{"resolution": 64, "subsets": [{"image_dir": "portraits"}]}]})
    )
    settings, lines = read_dataset_config("dataset.json")
    assert (settings, lines) == ({"data_sources": [PORTRAITS], "folder_repeats": False, "resolution": 64}, [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[general]\nshufle_caption = true\n" + SUBSET, r"unknown key general\.shufle_caption \(nearest: shuffle_cap"),
        ("learning_rate = 1e-4\n" + SUBSET, "unknown key learning_rate: settings of the run are flags of their own"),
        (SUBSET + "num_repeats = '3'", r"datasets\[0\]\.subsets\[0\]\.num_repeats must be a whole number, not '3'"),
        (SUBSET + "num_repeats = true", r"datasets\[0\]\.subsets\[0\]\.num_repeats must be a whole number, not True"),
        (SUBSET + "flip_aug = 1", r"datasets\[0\]\.subsets\[0\]\.flip_aug must be true or false, not 1"),
        (SUBSET + "face_crop_aug_range = [1]", "must be two numbers"),
        ("[general]\nresolution = [1, 2, 3]\n" + SUBSET, r"general\.resolution must be one whole number or two"),
        (SUBSET + "resolution = 512", r"datasets\[0\]\.subsets\[0\]\.resolution belongs into \[\[datasets\]\]"),
        ("[general]\nimage_dir = 'portraits'\n" + SUBSET, r"general\.image_dir belongs into \[\[datasets\.subsets\]\]"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 2", r"datasets\[0\]\.subsets\[0\] has no image_dir"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'absent'", r"image_dir absent: no such folder"),
        ("[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'no.json'", r"metadata_file no\.json: No such file"),
        (SUBSET + "[[datasets.subsets]]\nmetadata_file = 'scans.json'", "with a metadata_file and without"),
        (SUBSET + "num_repeats = 0", "no subset is left"),
        ("[datasets]\nresolution = 64", r"write \[\[datasets\]\] with two brackets"),
        ("[[datasets]]\n[datasets.subsets]\nnum_repeats = 2", r"write \[\[datasets\.subsets\]\] with two brackets"),
        ("[[datasets]]\nresolution = 64", r"write at least one \[\[datasets\.subsets\]\]"),
        ("[general]\n", r"write at least one \[\[datasets\]\]"),
        ("general = 3\n" + SUBSET, r"general must be a table"),
        (SUBSET + "resize_interpolation = 'spline'", "resize_interpolation 'spline' is none of lanczos"),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\Users"', r"\(at line 3, .*single quotes"),
        ("[[datasets]]\nresolution = \n", r"\(at line 2, column 14\)"),
        (SUBSET + "\xff", r"\(at line 4, column 1\)"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_the_file(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=rf"^--dataset_config dataset\.toml: .*{words}") as error:
        read(text)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named() -> None:
    with pytest.raises(RecipeError, match=r"^--dataset_config absent\.toml: no such file"):
        read_dataset_config("absent.toml")
    for content, words in ((b"[]", "it holds a list"), (b"{", "line 1 column 2"), (b"\xff\xfe", "utf-8")):
        Path("bad.json").write_bytes(content)
        with pytest.raises(RecipeError, match=rf"^--dataset_config bad\.json: .*{words}"):
            read_dataset_config("bad.json")


def test_flags_win_over_the_file_and_that_over_a_recipe(caplog: pytest.LogCaptureFixture) -> None:
    read("[general]\nresolution = 64\nbatch_size = 2\ncolor_aug = true\n" + SUBSET)
    Path("recipe.yaml").write_text(
        "train_data_dir: elsewhere\nresolution: 128\nlearning_rate: 0.5\ntrain_batch_size: 8\n"
    )
    flags = [*MODEL, "--config", "recipe.yaml", "--dataset_config", "dataset.toml", "--train_batch_size", "4"]
    recipe = load_recipe(flags)
    assert (recipe.resolution, recipe.train_batch_size, recipe.learning_rate) == (64, 4, 0.5)
    assert [source.train_data_dir for source in recipe.sources] == ["portraits"]
    assert caplog.messages == [
        "--dataset_config dataset.toml: general.color_aug: not mapped: colours are left as they are"
    ]
    # What is printed and saved needs the file no more.
    Path("resolved.yaml").write_text(recipe_text(recipe))
    Path("dataset.toml").unlink()
    assert recipe_text(load_recipe(["--config", "resolved.yaml"])) == recipe_text(recipe)


def test_a_flag_decides_what_differs_and_then_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    read("""
        [[datasets]]
        resolution = 512
        [[datasets.subsets]]
        image_dir = "portraits"
        keep_tokens = 1
        [[datasets]]
        resolution = 768
        [[datasets.subsets]]
        image_dir = "garden"
        keep_tokens = 1
    """)
    recipe = load_recipe([*MODEL, "--dataset_config", "dataset.toml", "--resolution", "640", "--shuffle_tags"])
    assert (recipe.resolution, recipe.keep_tags) == (640, 1)
    assert caplog.messages == []


def test_an_inspection_takes_it_too(caplog: pytest.LogCaptureFixture) -> None:
    read("[general]\nresolution = 64\ncolor_aug = true\n" + SUBSET)
    config = read_settings(["--dataset_config", "dataset.toml"])
    assert (config.resolution, config.sources[0].train_data_dir) == (64, "portraits")
    assert len(caplog.messages) == 1


def test_two_answers_to_which_data_are_refused() -> None:
    read(SUBSET)
    Path("recipe.yaml").write_text("data_sources:\n- train_data_dir: elsewhere\n")
    file = [*MODEL, "--dataset_config", "dataset.toml"]
    with pytest.raises(RecipeError, match=r"contradicts data_sources of --config recipe\.yaml: drop one"):
        load_recipe([*file, "--config", "recipe.yaml"])
    Path("recipe.yaml").write_text("dataset_config: 3\n")
    with pytest.raises(RecipeError, match=r"key dataset_config of the recipe file: give the path .* \(it is 3\)"):
        load_recipe([*MODEL, "--config", "recipe.yaml"])
    for flag in ("--train_data_dir", "--dataset_name"):
        with pytest.raises(RecipeError, match=f"says which data to use, which {flag} contradicts: drop one"):
            load_recipe([*file, flag, "elsewhere"])


def test_a_dry_run_without_a_model_checks_the_data_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd_recipes.model.sources._open", None)  # no model is looked for
    read("[general]\nresolution = 16\nbatch_size = 2\n" + SUBSET + "num_repeats = 3\ncaption_extension = '.txt'\n")
    forget_accelerator()
    run(load_recipe(["--dataset_config", "dataset.toml", "--dry_run", "--device", "cpu", "--num_train_epochs", "2"]))
    shown = capsys.readouterr().out
    assert "a folder of 2 pictures, captions from .txt files" in shown
    assert re.search(r"optimizer steps +6\n +model +none was named, and none was checked", shown)
    assert "repeats: 3" in shown
    assert not Path("sd-model-finetuned").exists()
    Path("portraits/0.txt").write_text("")
    Path("portraits/1.txt").write_text("")
    forget_accelerator()
    with pytest.raises(RecipeError, match=r"^none of 6 rows can be used: .* no caption"):
        run(load_recipe(["--dataset_config", "dataset.toml", "--dry_run", "--device", "cpu"]))
    with pytest.raises(RecipeError, match="--pretrained_model_name_or_path is missing"):
        load_recipe(["--dataset_config", "dataset.toml"])


def test_a_value_out_of_range_is_blamed_on_the_file() -> None:
    read("[general]\nresolution = 4\n" + SUBSET)
    with pytest.raises(RecipeError, match=r"^--dataset_config dataset\.toml: resolution: .* 8 \(it is 4\)"):
        load_recipe([*MODEL, "--dataset_config", "dataset.toml"])


def test_its_subsets_are_trained_on_as_often_as_it_says(settings: dict[str, Any]) -> None:
    mapped, _ = read("""
        [general]
        caption_extension = ".txt"
        [[datasets]]
        resolution = 32
        batch_size = 6
        [[datasets.subsets]]
        image_dir = "portraits"
        num_repeats = 2
        [[datasets.subsets]]
        image_dir = "people"
        class_tokens = "a person"
        is_reg = true
        [[datasets]]
        resolution = 32
        batch_size = 6
        [[datasets.subsets]]
        image_dir = "scans"
        metadata_file = "scans.json"
    """)
    prefix = {"caption_prefix": "one,"}
    run = train({**settings, "train_data_dir": None, "max_train_steps": 1, **mapped, **prefix})
    [step] = run.batches(0, 1)
    assert [batch.weights.tolist() for batch in step] == [[1] * 6] * 2, "an epoch, and class pictures"
    found = [
        Counter(run.model.components.tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True))
        for batch in step
    ]
    assert found == [{"one , portraits 0": 2, "one , portraits 1": 2, "one , a scan": 1, "one , b": 1}, {"a person": 6}]


def test_opacity_as_a_mask_switches_masks_on() -> None:
    settings, lines = read("[general]\nalpha_mask = true\n" + SUBSET)
    assert settings["mask_from_alpha"] is True
    assert lines == []
