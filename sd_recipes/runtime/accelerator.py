"""accelerate's Accelerator for a recipe: hardware, precision and number of processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import (
    AutocastKwargs,
    DynamoBackend,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)

from sd_recipes.errors import RecipeError, one_line
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.agreement import STEP_WAIT, open_host_group
from sd_recipes.runtime.fsdp import fsdp_plugin, turn_on
from sd_recipes.runtime.launcher import DYNAMO, MIXED_PRECISION, configuration, launcher_arguments, precision_in_words
from sd_recipes.runtime.trackers import check_tracker

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def allow_tf32(allowed: bool) -> None:
    """Set whether a GPU may round float32 to TF32, in matrix products and convolutions alike.

    By default torch allows it in convolutions only.
    """
    # Not with torch's newer `fp32_precision`: accelerate sets these flags, and reading a mixture of both is an error.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def check_weights_dtype(recipe: Recipe, mixed_precision: str) -> None:
    """Raises RecipeError if the weights have a type that the UNet does not compute in."""
    if recipe.weights_dtype == "bf16" and mixed_precision != "bf16":
        raise RecipeError(
            "--weights_dtype bf16 is for a UNet that computes in bf16, and mixed precision is "
            f"{mixed_precision}: add --mixed_precision bf16, or drop --weights_dtype"
        )


def start_accelerator(recipe: Recipe) -> Accelerator:
    """accelerate's Accelerator for this recipe. Raises RecipeError if the hardware asked for is absent."""
    has_cuda = torch.cuda.is_available()
    accelerate_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    on_cpu = recipe.device == "cpu" or accelerate_on_cpu
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()  # what `accelerate launch --gpu_ids` sets
    asked_for_cuda = recipe.device == "cuda" or (not on_cpu and visible not in ("", "-1"))
    if recipe.device == "cuda" and accelerate_on_cpu:
        raise RecipeError(f"--device cuda contradicts {configuration()}, which says CPU: change one of them")
    if asked_for_cuda and not has_cuda:
        asked = "--device cuda" if recipe.device == "cuda" else f"CUDA_VISIBLE_DEVICES={visible}"
        if recipe.device != "cuda" and launcher_arguments() is not None:
            asked += f", which may be the gpu_ids of {configuration()}"
        raise RecipeError(
            f"CUDA was asked for ({asked}) and torch sees no GPU: install a CUDA build of torch and a driver, or train "
            "on the CPU with --device cpu"
        )
    mixed_precision = recipe.mixed_precision or os.environ.get(MIXED_PRECISION, "no")
    origin = precision_in_words(recipe.mixed_precision, mixed_precision)
    if mixed_precision not in DTYPES:
        raise RecipeError(f"{origin} is not supported: add --mixed_precision with one of {', '.join(DTYPES)}")
    has_accelerator = has_cuda or torch.backends.mps.is_available()
    if mixed_precision == "fp16" and (on_cpu or not has_accelerator):
        way_out = "use bf16 or no on the CPU" if recipe.mixed_precision else "add --mixed_precision no to override it"
        raise RecipeError(f"{origin} needs a GPU: {way_out}")
    check_weights_dtype(recipe, mixed_precision)
    backend = os.environ.get(DYNAMO, "no")
    if backend.upper() not in DynamoBackend.__members__:
        known = ", ".join(DynamoBackend.__members__)
        raise RecipeError(f"{DYNAMO}={backend}, or dynamo_backend of {configuration()}, is not one of: {known}")
    plugin = fsdp_plugin(recipe, mixed_precision)
    check_tracker(recipe.report_to)
    if is_initialized():
        _check_fits(recipe, AcceleratorState(), on_cpu=on_cpu)
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
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=step_wait(recipe)),
            # The cache would keep rounded copies of all weights until the end of a forward pass, or of a picture's
            # drawing; each is used once in a pass.
            AutocastKwargs(cache_enabled=False),
        ],
        fsdp_plugin=plugin,
    )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and accelerator.num_processes == 1:
        raise RecipeError(
            f"{started} processes were started for GPUs, by {configuration()} or its launcher's flags, and torch sees "
            "none: train on the CPU with `accelerate launch --config_file accelerate_configs/cpu.yaml`"
        )
    open_host_group()
    if plugin is not None:
        turn_on(accelerator, plugin)
    allow_tf32(recipe.allow_tf32)
    torch.backends.cudnn.benchmark = recipe.cudnn_benchmark
    return accelerator


def _check_fits(recipe: Recipe, state: AcceleratorState, *, on_cpu: bool) -> None:
    """Raises RecipeError if this process, a notebook's, has an Accelerator with other settings than the run's."""
    other_precision = recipe.mixed_precision not in (None, state.mixed_precision)
    if other_precision or (on_cpu and state.device.type != "cpu"):
        raise RecipeError(
            f"this process has made an Accelerator of its own, with {state.mixed_precision} mixed precision on "
            f"{state.device}, and accelerate has one for a whole process: restart the notebook's kernel, or drop "
            "--mixed_precision and --device"
        )


@contextmanager
def compiler_explained(recipe: Recipe) -> Iterator[None]:
    """Turn what torch's compiler raises into a RecipeError that says who asked for it; steps compile when first run."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        way_out = "drop --compile_unet" if recipe.compile_unet else f"drop --compile {recipe.compile}"
        if not recipe.compile:
            way_out = f"set dynamo_backend to NO in {configuration()}, or {DYNAMO}=NO in the environment"
        raise RecipeError(f"the UNet cannot be compiled ({one_line(error, 200)}): {way_out}") from error


@contextmanager
def accelerate_left_unused() -> Iterator[None]:
    """After this context accelerate has forgotten its state, unless someone else had made an Accelerator before.

    So that the next run of this process, such as a notebook, may have another precision, or be launched.
    """
    was_used = is_initialized()
    try:
        yield
    finally:
        if not was_used:
            forget_accelerator()


def forget_accelerator() -> None:
    """Let accelerate take precision, device and processes anew, by what it offers for its own tests (1.15)."""
    AcceleratorState._reset_state(reset_partial_state=True)


def step_wait(recipe: Recipe) -> timedelta:
    """How long processes wait for each other within a step: one of them may wait for its stream to come back."""
    outage = recipe.stream_outage_minutes if recipe.streaming else 0
    return STEP_WAIT + timedelta(minutes=outage)
