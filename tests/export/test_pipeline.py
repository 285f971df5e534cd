"""What a run leaves is loaded by stock diffusers, with nothing said but the folder, and draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from training_runs import assert_leaves_as_it_came, forget_accelerator

from sd_recipes.commands.train import run
from sd_recipes.recipe import Recipe

CACHED = {"cache_latents": "disk", "center_crop": True, "random_flip": True}
BUCKETS = {"aspect_ratio_buckets": True, "bucket_step": 8}


@pytest.fixture(autouse=True)
def _no_precision_is_left() -> Iterator[None]:
    yield
    forget_accelerator()


def run_in_bf16(settings: dict[str, Any], **changes: Any) -> Path:
    forget_accelerator()
    recipe = Recipe(**{**settings, "mixed_precision": "bf16", "max_train_steps": 3, **changes})
    run(recipe)
    return Path(recipe.output_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adamw8bit"},
        {"optimizer": "sgd"},
        {"optimizer": "adafactor"},
        {"use_ema": True, "validation_prompts": ["a disc"], "validation_inference_steps": 1},
        CACHED,
        {**CACHED, "cache_latents": "memory", "max_train_steps": 5},  # the VAE is set free after an epoch
        BUCKETS,
        {"train_from_scratch": True, "gradient_checkpointing": True},
        {"mixed_precision": "no"},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items() if name != "validation_prompts"),
)
def test_defect_10_frozen_parts_leave_a_run_as_they_came(
    settings: dict[str, Any], tiny_pipeline: Path, changes: dict[str, Any]
) -> None:
    assert_leaves_as_it_came(run_in_bf16(settings, **changes), tiny_pipeline)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_defect_10_a_base_in_float16_leaves_in_one_type(
    settings: dict[str, Any], tiny_pipeline: Path, tmp_path: Path, variant: str | None, mixed_precision: str
) -> None:
    base = tmp_path / "base"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float16)
    pipeline.save_pretrained(base, variant=variant)
    changes = {"pretrained_model_name_or_path": str(base), "variant": variant, "mixed_precision": mixed_precision}
    assert_leaves_as_it_came(run_in_bf16(settings, **changes), base, variant=variant)
