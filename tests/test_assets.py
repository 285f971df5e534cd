"""The embedded default is real, small, and good enough to start from."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline
from PIL import Image
from test_script import environment

from sd_recipes import assets
from sd_recipes.data.images import fit_image, open_image
from sd_recipes.data.rows import load_rows
from sd_recipes.evaluation.metrics import ImageTextScore
from sd_recipes.flags import load_recipe
from sd_recipes.model.latents import encode_pixels, to_pixel_values
from sd_recipes.recipe import Recipe


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(
        assets.resolve("sd-recipes/tiny-emoji"), dtype=torch.float32, safety_checker=None
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def rows_of(split: str, number: int) -> list[dict]:
    rows = load_rows(Recipe(pretrained_model_name_or_path="-", dataset_name="sd-recipes/emoji", train_split=split))
    return [rows[index] for index in np.linspace(0, len(rows) - 1, number).astype(int).tolist()]


def pictures(rows: list[dict]) -> list[Image.Image]:
    return [open_image(row["image"]) for row in rows]


def test_the_base_fits_in_25_megabytes_and_has_its_licence_and_card() -> None:
    base = Path(assets.resolve("sd-recipes/tiny-emoji"))
    assert sum(path.stat().st_size for path in base.rglob("*") if path.is_file()) < 25e6
    card = (base / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "{" not in card, "a figure was not filled in"
    assert not [path for path in base.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_defect_10_the_base_is_loaded_in_one_type_without_another_word() -> None:
    base = StableDiffusionPipeline.from_pretrained(assets.resolve("sd-recipes/tiny-emoji"))
    base.set_progress_bar_config(disable=True)
    for part in (base.unet, base.vae, base.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert base("a cat", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)


@pytest.mark.parametrize("split", ["train", "flags"])
def test_the_vae_reconstructs_cleanly(pipeline: StableDiffusionPipeline, split: str) -> None:
    pixels = np.stack([
        fit_image(picture, (64, 64), interpolation="lanczos", crop_u=(0.5, 0.5), flip=False)
        for picture in pictures(rows_of(split, 32))
    ])  # fmt: skip
    pixel_values = to_pixel_values(torch.from_numpy(pixels), torch.float32)
    moments = encode_pixels(pipeline.vae, pixel_values)
    mean = moments.chunk(2, dim=1)[0]
    with torch.no_grad():
        decoded = pipeline.vae.decode(mean).sample.clamp(-1, 1)
    assert (decoded - pixel_values).abs().mean() * 127.5 < 7
    assert 0.7 < (mean * pipeline.vae.config.scaling_factor).std() < 1.3


def test_the_clip_prefers_a_pictures_own_name() -> None:
    score = ImageTextScore("sd-recipes/tiny-clip", torch.device("cpu"))
    rows = rows_of("train", 24)
    names = [row["text"] for row in rows]
    right = score(pictures(rows), names)
    wrong = score(pictures(rows), names[1:] + names[:1])
    assert right > wrong + 20


def test_the_base_draws_what_it_was_trained_on(pipeline: StableDiffusionPipeline) -> None:
    """Its pictures are nearer to their prompts than to other prompts, by the CLIP that judges the quickstart."""
    recipe = load_recipe(["--config", "tiny_from_scratch"])
    prompts = recipe.validation_prompts or []
    generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    drawn = pipeline(
        prompts, num_inference_steps=20, guidance_scale=3.0, height=64, width=64, generator=generators
    ).images
    score = ImageTextScore("sd-recipes/tiny-clip", torch.device("cpu"))
    assert score(drawn, prompts) > score(drawn, prompts[1:] + prompts[:1]) + 15


def quickstart(output_dir: Path, *flags: object, recipe: str = "quickstart") -> list[dict]:
    command = [
        Path(sys.executable).parent / "accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/cpu.yaml",
        "train_text_to_image.py", "--config", recipe, "--output_dir", output_dir, *flags,
    ]  # fmt: skip
    # One thread: two of them crawl next to the tests of another worker.
    done = subprocess.run([str(part) for part in command], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "before / after" in done.stdout
    assert "held-out loss" in done.stdout
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def figures(lines: list[dict], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


@pytest.mark.slow
def test_a_short_quickstart_lowers_the_held_out_loss(tmp_path: Path) -> None:
    lines = quickstart(tmp_path / "run", "--max_train_steps", 25, "--validation_inference_steps", 4)
    losses = figures(lines, "validation_loss")
    assert len(losses) == 2  # before, and at the end
    assert losses[-1] < losses[0]
    with Image.open(tmp_path / "run" / "before_after.png") as sheet:
        assert sheet.width > 2 * 4 * 128


@pytest.mark.slow
def test_the_whole_quickstart_learns_flags(tmp_path: Path) -> None:
    lines = quickstart(tmp_path / "run")
    losses, scores = figures(lines, "validation_loss"), figures(lines, "image_text_score")
    assert losses[-1] < 0.2 * losses[0]
    assert min(losses) > 0.97 * losses[-1], "it ends at its best, but for rounding"
    assert scores[-1] > scores[0] + 8


@pytest.mark.slow
def test_the_whole_quickstart_lora_learns_flags_in_a_small_file(tmp_path: Path) -> None:
    lines = quickstart(tmp_path / "run", recipe="quickstart_lora")
    losses, scores = figures(lines, "validation_loss"), figures(lines, "image_text_score")
    assert losses[-1] < 0.25 * losses[0]
    assert scores[-1] > scores[0] + 5
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").stat().st_size < 5e6
