"""--vae is one of the model's own family: the other's latents have another scale, and the same shapes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from single_files import part_of, single_file

from sd_recipes.errors import RecipeError
from sd_recipes.model.components import load_vae
from sd_recipes.model.families import family_of
from sd_recipes.recipe import ModelConfig


@pytest.fixture
def models(tiny_pipeline: Path, tiny_xl_pipeline: Path, tmp_path: Path) -> dict[str, Path]:
    found = {"SD": shutil.copytree(tiny_pipeline, tmp_path / "sd"),
             "XL": shutil.copytree(tiny_xl_pipeline, tmp_path / "xl")}  # fmt: skip
    for name, scale in (("SD", None), ("XL", 0.13025)):  # those of Stable Diffusion are older than the setting
        path = found[name] / "vae" / "config.json"
        settings = {**json.loads(path.read_text()), "scaling_factor": scale}
        path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return found


def whole_file(model: Path, generation: str) -> Path:
    return single_file(model.with_suffix(".safetensors"), model, generation="XL" if generation == "XL" else 1)


FORMS: dict[str, Callable[[Path, str], Path]] = {
    "pipeline": lambda model, generation: model,
    "folder of a VAE": lambda model, generation: model / "vae",
    "file": whole_file,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_vae_of_the_other_family_is_refused(models: dict[str, Path], form: str) -> None:
    for generation, other, words in (
        ("SD", "XL", "SDXL (scaling_factor 0.13025)"),
        ("XL", "SD", "Stable Diffusion 1 and 2 (scaling_factor 0.18215)"),
    ):
        model, vae = str(models[generation]), str(FORMS[form](models[other], other))
        with pytest.raises(RecipeError) as error:
            family_of(ModelConfig(pretrained_model_name_or_path=model, vae=vae))
        assert str(error.value).startswith(f"--vae {vae} is a VAE of {words}, and --pretrained_model_name_or_path ")
        assert str(error.value).endswith("or drop --vae")
        own = str(FORMS[form](models[generation], generation))
        family_of(ModelConfig(pretrained_model_name_or_path=model, vae=own))


def test_a_hub_id_is_looked_at(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--someone--vae"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(models["XL"] / "vae", repository / "snapshots" / ("0" * 40))
    flags = {"vae": "someone/vae", "cache_dir": str(tmp_path / "hub")}
    with pytest.raises(RecipeError, match="--vae someone/vae is a VAE of SDXL"):
        family_of(ModelConfig(pretrained_model_name_or_path=str(models["SD"]), **flags))
    family_of(ModelConfig(pretrained_model_name_or_path=str(models["XL"]), **flags))


def test_a_factor_of_its_own_is_anybodys(models: dict[str, Path]) -> None:
    path = models["XL"] / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.5}))
    family_of(ModelConfig(pretrained_model_name_or_path=str(models["SD"]), vae=str(models["XL"] / "vae")))


@pytest.mark.parametrize("generation", ["SD", "XL"])
def test_a_vae_alone_in_a_file_is_taken_for_the_models_kind(models: dict[str, Path], generation: str) -> None:
    """Also where the model has none of its own: the tensors' names and shapes do not tell."""
    file, model = models["SD"].with_name("vae.safetensors"), models[generation]
    save_file(part_of(models["SD"], "vae"), file)
    config = ModelConfig(pretrained_model_name_or_path=str(model), vae=str(file))
    family_of(config)
    assert load_vae(config).config.scaling_factor == (0.13025 if generation == "XL" else 0.18215)
