"""Models on the Hub: which files are asked for, and what is said of a repository that holds something else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline
from loopback_hub import LoopbackHub
from safetensors.torch import load, load_file
from test_script import environment

# One process for all cases, since it takes seconds to import; the clients read the endpoint's address at import.
LOAD = """
import json, logging, sys
from sd_recipes.errors import RecipeError
from sd_recipes.model.components import load_scheduler
from sd_recipes.model.families import family_of
from sd_recipes.recipe import ModelConfig
from safetensors.torch import save_file
said = []
class Keep(logging.Handler):
    def emit(self, record): said.append(record.getMessage())
logging.getLogger("sd_recipes").addHandler(Keep())
logging.getLogger("sd_recipes").setLevel(logging.INFO)
answers = {}
for name, settings in json.loads(sys.argv[1]).items():
    said.clear()
    try:
        config = ModelConfig(**settings)
        family = family_of(config)
        parts = family.load(config, load_scheduler(config), family.load_tokenizers(config))
        for part in ("unet", "vae", "text_encoder"):
            save_file(getattr(parts, part).state_dict(), f"{name}-{part}.safetensors")
        answers[name] = ["loaded", *said]
    except RecipeError as error:
        answers[name] = [str(error)]
print(json.dumps(answers))
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def loaded(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("hub_models")
    plain = files_of(tiny_pipeline)
    half = StableDiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float16)
    half.save_pretrained(folder / "fp16", variant="fp16")
    with LoopbackHub() as hub:
        hub.models["someone/fp16"].commit(files_of(folder / "fp16"))
        hub.models["someone/model"].commit(plain)
        hub.models["someone/notes"].commit({"README.md": b""})
        hub.models["someone/vae"].commit(files_of(folder / "fp16" / "vae"))
        hub.models["someone/file"].commit({"some model.safetensors": b"", "README.md": b""})
        hub.models["someone/lora"].commit({"pytorch_lora_weights.safetensors": b""})
        index = json.loads(plain["model_index.json"]) | {"_class_name": "StableDiffusionXLPipeline"}
        hub.models["someone/xl"].commit({**plain, "model_index.json": json.dumps(index).encode()})
        cases = {
            "fp16": {"pretrained_model_name_or_path": "someone/fp16"},
            "vae": {"pretrained_model_name_or_path": "someone/model", "vae": "someone/vae"},
            "notes": {"pretrained_model_name_or_path": "someone/notes"},
            "file": {"pretrained_model_name_or_path": "someone/file"},
            "lora": {"pretrained_model_name_or_path": "someone/lora"},
            "xl": {"pretrained_model_name_or_path": "someone/xl"},
            "absent": {"pretrained_model_name_or_path": "someone/absent"},
        }
        done = subprocess.run(
            [sys.executable, "-c", LOAD, json.dumps(cases)], cwd=folder, capture_output=True, text=True, timeout=300,
            env=environment(PYTHONPATH=str(ROOT), **hub.environment(folder / "home")) | {"HF_HUB_OFFLINE": "0"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_the_only_variant_of_a_repository_is_taken(
    loaded: tuple[Path, dict[str, list[str]]], tiny_pipeline: Path
) -> None:
    folder, answers = loaded
    said = "--pretrained_model_name_or_path someone/fp16: of the {} there are only fp16 weights: --variant fp16."
    assert answers["fp16"] == ["loaded", *(said.format(part) for part in ("text_encoder", "vae", "unet"))]
    given = load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    found = load((folder / "fp16-unet.safetensors").read_bytes())
    assert all(torch.equal(found[name], given[name].half().float()) for name in given)


def test_a_vae_of_its_own_repository(loaded: tuple[Path, dict[str, list[str]]], tiny_pipeline: Path) -> None:
    folder, answers = loaded
    assert answers["vae"][0] == "loaded"
    given = load_file(tiny_pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    found = load((folder / "vae-vae.safetensors").read_bytes())
    assert all(torch.equal(found[name], given[name].half().float()) for name in given)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("notes", "someone/notes is a repository without a model"),
        ("file", "`hf download someone/file 'some model.safetensors' --local-dir .` and name it"),
        ("lora", "someone/lora is a LoRA: name the model that it was trained on"),
        ("xl", "someone/xl is a pipeline and lacks the folders text_encoder_2/, tokenizer_2/: add --base NAME"),
        ("absent", "someone/absent: cannot load"),
    ],
)
def test_a_repository_that_holds_something_else(
    loaded: tuple[Path, dict[str, list[str]]], name: str, words: str
) -> None:
    (said,) = loaded[1][name]
    assert words in said
    assert "\n" not in said
