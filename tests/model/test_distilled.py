"""Models that draw in a few steps: how they are known, who refuses them, and the way out for what is only called so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from single_files import single_file

from sd_recipes.commands.cache import fill_cache
from sd_recipes.commands.of_run import load_model
from sd_recipes.commands.plan import plan
from sd_recipes.commands.plan_settings import PlanSettings
from sd_recipes.commands.train import run
from sd_recipes.errors import RecipeError
from sd_recipes.flags import RESOLVED
from sd_recipes.model.distilled import kind_by_name
from sd_recipes.model.families import check_trainable
from sd_recipes.recipe import ModelConfig, Recipe
from sd_recipes.runtime.accelerator import forget_accelerator

KINDS = {
    "a Turbo model": ["sdxl_turbo_fp16", "dreamerXL_v21TurboDPMSDE", "stable-diffusion-xl-turbo-v1", "SDXL Turbo",
                      "sd-turbo", "SDTurbo", "sdturbo", "SDXLTurbo", "xlturbo", "dreamshaperxlturbo", "turboXL_v2"],
    "a Lightning model": ["sdxl_lightning_4step", "SDXLLightning", "sdxllightning_4step", "juggernautXLv9Lightning",
                          "RealVisXL_V4.0_Lightning", "storm-lightning"],
    "a latent consistency model (LCM)": ["my-LCM", "dreamshaper8_lcm", "LCM_Dreamshaper_v7"],
    "a Hyper-SD model": ["Hyper-SDXL-8steps", "HyperSD15", "hyper_sd"],
    "a DMD model": ["dmd2_sdxl_4step_unet", "modelDMD2", "DMDXL"],
    None: ["turbojet_turbostyle", "Enlightning", "lightnings", "hyperreal", "stable-diffusion-xl-base-1.0", "admd"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "words"), [(name, words) for words, names in KINDS.items() for name in names])
def test_a_name_tells_the_kind(name: str, words: str | None) -> None:
    assert kind_by_name(name) == words


def refused(name: Path | str, **flags: Any) -> str:
    with pytest.raises(RecipeError) as error:
        check_trainable(ModelConfig(pretrained_model_name_or_path=str(name), **flags))
    said, place = str(error.value), f"--pretrained_model_name_or_path {name} is by its "
    assert "\n" not in said
    assert said.startswith(place)
    assert ", distilled to draw in a few steps: training would undo that: choose the model that it was made" in said
    return said.removeprefix(place)


def accepted(name: Path, **flags: Any) -> None:
    check_trainable(ModelConfig(pretrained_model_name_or_path=str(name), **flags))


def test_a_folder(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(shutil.copytree(tiny_pipeline, tmp_path / "sd-turbo"))
    said = refused(model)
    assert said.startswith("name a Turbo model")
    assert said.endswith("or, if it is none, rename the folder")
    monkeypatch.chdir(model)
    assert refused(".").startswith("name a Turbo model")
    accepted(model, train_from_scratch=True)
    cached = tmp_path / "models--stabilityai--sdxl-turbo" / "snapshots" / "0123abc"
    shutil.copytree(model, cached)
    assert refused(cached).startswith("name a Turbo model")
    (model / "recipe.yaml").write_text(RESOLVED)
    accepted(model)
    scheduler = model / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "_class_name": "LCMScheduler"}))
    said = refused(model)
    assert said.startswith("sampler, LCMScheduler, a latent consistency model (LCM)")
    assert said.endswith("or, if it is none, set another _class_name in its scheduler_config.json")


def test_a_file(tiny_pipeline: Path, tmp_path: Path) -> None:
    file = single_file(tmp_path / "stormLightning_v2.safetensors", tiny_pipeline)
    said = refused(file)
    assert said.startswith("name a Lightning model")
    assert said.endswith("or, if it is none, rename the file")
    tensors = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}
    titled = tmp_path / "my storm.safetensors"
    save_file(tensors, titled, {"modelspec.title": "Storm Turbo"})
    said = refused(titled)
    assert said.startswith("modelspec.title a Turbo model")
    assert said.endswith(
        f"or, if it is none, write it anew with `sd-recipes export '{titled}' --to single_file --output "
        f"{tmp_path}/another_name.safetensors`"
    )
    save_file(tensors, titled, {"modelspec.architecture": "stable-diffusion-xl-turbo-v1"})
    assert refused(titled).startswith("modelspec.architecture a Turbo model")
    save_file(tensors, titled, {"modelspec.title": "Storm Turbo", "base_model": "x", "recipe": "y"})
    accepted(titled)
    (tmp_path / "recipe.yaml").write_text(RESOLVED)
    accepted(file)


def test_only_training_refuses_it(settings: dict[str, Any], tiny_pipeline: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_pipeline, tmp_path / "SDXLTurbo")
    recipe = Recipe(**{**settings, "pretrained_model_name_or_path": str(model), "center_crop": True})
    forget_accelerator()
    for refuses in (run, fill_cache, lambda recipe: plan(PlanSettings(recipe, None, None, 1, None, as_json=True))):
        with pytest.raises(RecipeError, match="is by its name a Turbo model"):
            refuses(recipe)
    assert load_model(str(model), None, {}).family
