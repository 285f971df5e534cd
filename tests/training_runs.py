"""Training runs inside a test's process, through the real build and the real loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from sd_recipes.checkpoints.saver import BackgroundSaver
from sd_recipes.commands.train import memory_given_back, resolve, restore, train_to_end
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import forget_accelerator, start_accelerator
from sd_recipes.runtime.output_dir import check_output_dir
from sd_recipes.training.build import build_run
from sd_recipes.training.ema import AveragedWeights
from sd_recipes.training.run import Run


def build(settings: dict[str, Any], **changes: Any) -> Run:
    """The run of these settings, put together and not begun."""
    recipe = Recipe(**{**settings, **changes})
    check_output_dir(Path(recipe.output_dir), writes=not recipe.dry_run)
    forget_accelerator()
    accelerator = start_accelerator(recipe)
    recipe, checkpoint = resolve(recipe, accelerator, recipe.resume_from_checkpoint)
    return build_run(recipe, accelerator, checkpoint)


def fit_from(run: Run) -> BackgroundSaver:
    """Restore the checkpoint of a run that was put together, if there is one, and train to the end."""
    with memory_given_back(run):
        restore(run)
        return train_to_end(run)


def train(settings: dict[str, Any], **changes: Any) -> Run:
    run = build(settings, **changes)
    fit_from(run)
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in run.model.components.unet.state_dict().items()}


def average(run: Run) -> AveragedWeights:
    """Of the UNet, with use_ema."""
    found = run.state.parts["unet"].average
    assert found is not None
    return found


def losses(run: Run) -> list[float]:
    lines = (Path(run.recipe.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_loss"] for line in lines if "train_loss" in line]


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


def assert_leaves_as_it_came(folder: Path, base: Path, variant: str | None = None) -> None:
    """A pipeline for stock diffusers, without another word: all float32, its frozen parts `base`'s, and it draws."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    loaded_base = StableDiffusionPipeline.from_pretrained(base, variant=variant, dtype=torch.float32)
    for part in ("vae", "text_encoder"):
        assert_equal(getattr(pipeline, part).state_dict(), getattr(loaded_base, part).state_dict())
    for part in ("vae", "text_encoder", "unet"):
        assert {parameter.dtype for parameter in getattr(pipeline, part).parameters()} == {torch.float32}, part
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("disc number 2", num_inference_steps=2, height=32, width=32, output_type="np").images[0]
    assert picture.shape == (32, 32, 3)
    assert np.isfinite(picture).all()
