"""accelerate's Accelerator for a recipe: hardware, precision and number of processes."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration

from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.agreement import STEP_WAIT, open_host_group
from sd_recipes.runtime.fsdp import fsdp_plugin, turn_on
from sd_recipes.runtime.trackers import check_tracker

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def allow_tf32(allowed: bool) -> None:
    """Set whether a GPU may round float32 to TF32, in matrix products and convolutions alike.

    By default torch allows it in convolutions only.
    """
    # Not with torch's newer `fp32_precision`: accelerate sets these flags, and reading a mixture of both is an error.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def start_accelerator(recipe: Recipe) -> Accelerator:
    """accelerate's Accelerator for this recipe. Raises RecipeError if the hardware asked for is absent."""
    has_cuda = torch.cuda.is_available()
    accelerate_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    on_cpu = recipe.device == "cpu" or accelerate_on_cpu
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()  # what `accelerate launch --gpu_ids` sets
    asked_for_cuda = recipe.device == "cuda" or (not on_cpu and visible not in ("", "-1"))
    if recipe.device == "cuda" and accelerate_on_cpu:
        raise RecipeError("--device cuda contradicts accelerate's configuration, which says CPU: change one of them")
    if asked_for_cuda and not has_cuda:
        raise RecipeError(
            "CUDA was asked for (--device cuda, or CUDA_VISIBLE_DEVICES) and torch sees no GPU: install a CUDA build "
            "of torch and a driver, or train on the CPU with --device cpu"
        )
    mixed_precision = recipe.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision not in DTYPES:
        raise RecipeError(f"mixed precision {mixed_precision!r} in accelerate's configuration: use one of {[*DTYPES]}")
    has_accelerator = has_cuda or torch.backends.mps.is_available()
    if mixed_precision == "fp16" and (on_cpu or not has_accelerator):
        raise RecipeError("--mixed_precision fp16 needs a GPU: use bf16 or no on the CPU")
    plugin = fsdp_plugin(recipe, mixed_precision)
    check_tracker(recipe.report_to)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=recipe.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=None if recipe.report_to == "none" else recipe.report_to,
        project_config=ProjectConfiguration(
            project_dir=recipe.output_dir, logging_dir=str(Path(recipe.output_dir) / recipe.logging_dir)
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=step_wait(recipe))],
        fsdp_plugin=plugin,
    )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and accelerator.num_processes == 1:
        raise RecipeError(
            f"{started} processes were started for GPUs and torch sees none: train on the CPU with --config_file "
            "accelerate_configs/cpu.yaml"
        )
    open_host_group()
    if plugin is not None:
        turn_on(accelerator, plugin)
    allow_tf32(recipe.allow_tf32)
    return accelerator


def step_wait(recipe: Recipe) -> timedelta:
    """How long processes wait for each other within a step: one of them may wait for its stream to come back."""
    outage = recipe.stream_outage_minutes if recipe.streaming else 0
    return STEP_WAIT + timedelta(minutes=outage)
