"""Names of other trainers: messages that name ours, and pages that show how to move in."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from sd_recipes.commands.export_settings import read_settings as read_export_settings
from sd_recipes.commands.sample_settings import read_settings as read_sample_settings
from sd_recipes.errors import RecipeError
from sd_recipes.flags import load_recipe
from sd_recipes.other_trainers import ONE_TRAINER, SD_SCRIPTS, TRAINERS
from sd_recipes.recipe import Recipe

ENOUGH = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"]


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.whose)
def test_what_an_entry_names_is_there(trainer: tuple[str, dict[str, str]]) -> None:
    for name, here in trainer[1].items():
        if "sd-recipes export" not in here:
            assert [flag for flag in re.findall(r"--(\w+)", here) if flag not in Recipe.model_fields] == [], name


def test_no_flag_of_ours_is_taken_for_another_trainers() -> None:
    assert [name for name in SD_SCRIPTS if name in Recipe.model_fields] == [], "it is here: drop its entry"


@pytest.mark.parametrize(("flags", "message"), [
    (["--network_dim", "16"], "--network_dim is sd-scripts' name: here it is --lora_rank"),
    (["--network_alpha=8"],
     "--network_alpha is sd-scripts' name: here it is --lora_alpha; if not given, it is the rank, and there 1"),
    (["--unet_lr", "1e-4", "--max_train_epochs", "3"],
     "--unet_lr is sd-scripts' name: here it is --learning_rate. --max_train_epochs is sd-scripts' name: here it is "
     "--num_train_epochs"),
    (["--no_half_vae", "--enable_bucket", "--what"],
     "--no_half_vae is sd-scripts' name, and is not here: a VAE that overflows in fp16, as SDXL's, runs in float32 by "
     "itself; all leave the run so. --enable_bucket is sd-scripts' name: here it is --aspect_ratio_buckets"),
    (["--clip_skip", "2", "--unet_lr", "1e-4"],
     "--unet_lr is sd-scripts' name: here it is --learning_rate. --clip_skip is sd-scripts' name, too: 2 there is "
     "--clip_skip 1 here; of SDXL it is ignored there, so drop it"),
    (["--learning_rate_te2", "1e-5"],
     "--learning_rate_te2 is sd-scripts' name: here it is --param_groups 'text_encoder_2.*=1e-5', with "
     "--train_text_encoder"),
    (["--layer_filter", "attn"], "--layer_filter is OneTrainer's name: here it is --lora_targets"),
    (["--leraning_rate", "1"], "unknown flag --leraning_rate (nearest: --learning_rate); --help lists all"),
    (["-network_dim", "16"], "unknown flag -network_dim; --help lists all"),
])  # fmt: skip
def test_an_unknown_flag_is_answered_with_its_name_here(flags: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe([*ENOUGH, *flags])
    assert str(error.value) == message


def test_a_command_that_lacks_the_flag_does_not_send_people_there() -> None:
    with pytest.raises(RecipeError, match=r"^unknown flag --network_dim; --help lists all$"):
        read_sample_settings(["--prompts", "a", "--network_dim", "3"])


def test_a_key_of_a_recipe_file_is_answered_too(tmp_path: Path) -> None:
    for text, message in (
        ("network_dim: 16\n", "network_dim is sd-scripts' name: here it is --lora_rank"),
        (
            '{"training_method": "LORA"}',
            "training_method is OneTrainer's name: here it is --lora_rank 16 for a LoRA",
        ),
        ("lora_rnak: 16\n", r"unknown key 'lora_rnak' \(nearest: lora_rank\)"),
    ):
        (tmp_path / "theirs.yaml").write_text(text)
        with pytest.raises(RecipeError, match=rf"^--config .*theirs.yaml: {message}"):
            load_recipe([*ENOUGH, "--config", str(tmp_path / "theirs.yaml")])


def test_all_keys_of_a_file_of_onetrainer_are_answered_at_once_and_nested_ones_too(tmp_path: Path) -> None:
    theirs = {
        "cache_dir": "cache", "learning_rate": 1e-4, "noising_weight": 0.0, "perturbation_noise_weight": 0.1,
        "optimizer": {"optimizer": "ADAMW", "beta1": 0.9}, "text_encoder": {"train": True, "include": True},
        "text_encoder_2": {"learning_rate": 1e-5}, "concepts": [{"path": "d", "text": {"keep_tags_count": 1}}] * 2,
    }  # fmt: skip
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    with pytest.raises(RecipeError) as error:
        load_recipe(["--config", str(tmp_path / "theirs.json")])
    told = [words.split(" is ")[0] for words in str(error.value).partition("theirs.json: ")[2].split(". ")]
    assert told == [
        "noising_weight", "perturbation_noise_weight", "optimizer.optimizer", "optimizer.beta1", "text_encoder.train",
        "text_encoder_2.learning_rate", "concepts", "concept.path", "concept.text.keep_tags_count", "cache_dir",
    ]  # fmt: skip
    assert (
        "--logit_std, which of LOGIT_NORMAL is noising_weight + 1. perturbation_noise_weight is OneTrainer's name, "
        "and is not here" in str(error.value)
    )


@pytest.mark.parametrize("page", ["from_kohya.md", "from_onetrainer.md"])
def test_the_command_lines_on_the_pages_are_accepted(page: str) -> None:
    text = re.sub(r"\\\n\s*", "", (ROOT / "docs" / page).read_text())
    train, export = (
        re.findall(rf"^    sd-recipes {command} (.*)", text, re.MULTILINE) for command in ("train", "export")
    )
    for line in train:
        if "their.toml" not in line:
            load_recipe(shlex.split(line))
    read_export_settings(shlex.split(export[0]))
    assert len(train) == (2 if page == "from_kohya.md" else 1)


def test_settings_of_ours_that_mean_something_else_there_are_on_the_page() -> None:
    """A name that is the same is no error: the page has to say what differs."""
    page = (ROOT / "docs" / "from_kohya.md").read_text()
    for name in ("clip_skip", "resolution", "train_batch_size", "lr_warmup_steps", "cache_latents", "validation_split"):
        assert f"| `--{name}` |" in page
    assert {"lora_rank", "resolution", "batch_size"} <= ONE_TRAINER.keys()
