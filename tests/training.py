"""Training runs inside a test's process, through the real build and the real loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline

from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import start_accelerator
from sd_recipes.training.build import Training, build_training
from sd_recipes.training.loop import fit


def forget_accelerator() -> None:
    """Let accelerate take a run's precision and device anew; what it offers for its own tests (1.15)."""
    AcceleratorState._reset_state(reset_partial_state=True)


def train(settings: dict[str, Any], **changes: Any) -> Training:
    recipe = Recipe(**{**settings, **changes})
    forget_accelerator()
    training = build_training(recipe, start_accelerator(recipe))
    fit(training)
    return training


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in training.components.unet.state_dict().items()}


def losses(training: Training) -> list[float]:
    lines = (Path(training.recipe.output_dir) / "metrics.jsonl").read_text().splitlines()
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
