"""A recipe to everything that the loop needs, checked from the cheapest to the dearest."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, broadcast_object_list

from sd_recipes.data.batches import BatchBuilder, TrainingBatches
from sd_recipes.data.order import Order
from sd_recipes.data.rows import load_rows
from sd_recipes.ema import AveragedWeights
from sd_recipes.metrics import ImageTextScore
from sd_recipes.model.components import Components, load_components
from sd_recipes.model.placement import DTYPES, place
from sd_recipes.objective import DenoisingLoss
from sd_recipes.optim import build_optimizer, build_schedule
from sd_recipes.recipe import ObjectiveConfig, Recipe, RecipeError
from sd_recipes.tracking import Tracker, check_tracker
from sd_recipes.validation import Validator

logger = logging.getLogger(__name__)


@dataclass
class Training:
    """All parts of a run, put together."""

    recipe: Recipe
    accelerator: Accelerator
    components: Components
    unet: torch.nn.Module  # as the loop calls it: components.unet, wrapped where there are several processes
    objective: DenoisingLoss
    held_out_objective: DenoisingLoss
    optimizer: Any  # accelerate's wrapper
    schedule: torch.optim.lr_scheduler.LRScheduler
    ema: AveragedWeights | None
    order: Order
    batches: TrainingBatches
    validator: Validator
    tracker: Tracker
    weight_dtype: torch.dtype  # of the frozen models
    max_train_steps: int
    seed: int

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """Within it the UNet has the weights that are judged and exported: the average, if there is one."""
        if self.ema is None:
            yield
        else:
            with self.ema.applied():
                yield


def start_accelerator(recipe: Recipe) -> Accelerator:
    """accelerate's Accelerator for this recipe. Raises RecipeError if the hardware asked for is absent."""
    has_cuda = torch.cuda.is_available()
    on_cpu = recipe.device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()  # what `accelerate launch --gpu_ids` sets
    asked_for_cuda = recipe.device == "cuda" or (not on_cpu and visible not in ("", "-1"))
    if asked_for_cuda and not has_cuda:
        raise RecipeError(
            "CUDA was asked for (--device cuda, or CUDA_VISIBLE_DEVICES) and torch sees no GPU: install a CUDA build "
            "of torch and a driver, or train on the CPU with --device cpu"
        )
    mixed_precision = recipe.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    has_accelerator = has_cuda or torch.backends.mps.is_available()
    if mixed_precision == "fp16" and (on_cpu or not has_accelerator):
        raise RecipeError("--mixed_precision fp16 needs a GPU: use bf16 or no on the CPU")
    check_tracker(recipe.report_to)
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=recipe.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=None if recipe.report_to == "none" else recipe.report_to,
        project_config=ProjectConfiguration(
            project_dir=recipe.output_dir, logging_dir=str(Path(recipe.output_dir) / recipe.logging_dir)
        ),
    )


def build_training(recipe: Recipe, accelerator: Accelerator) -> Training:
    """Load data and models and put the run together. Raises RecipeError for what a person can mend."""
    output_dir = Path(recipe.output_dir)
    check_output_dir(output_dir)
    seed = _agree_on_seed(recipe.seed)
    recipe.seed = seed

    rows = load_rows(recipe, cache_dir=recipe.cache_dir, seed=seed)
    global_batch_size = recipe.train_batch_size * recipe.gradient_accumulation_steps * accelerator.num_processes
    if global_batch_size > len(rows):
        raise RecipeError(
            f"the global batch is {global_batch_size} (--train_batch_size {recipe.train_batch_size} x "
            f"--gradient_accumulation_steps {recipe.gradient_accumulation_steps} x {accelerator.num_processes} "
            f"processes) and the data set has {len(rows)} rows: lower one of them"
        )
    order = Order(len(rows), global_batch_size, seed)
    max_train_steps = recipe.max_train_steps or recipe.num_train_epochs * order.steps_per_epoch

    torch.manual_seed(seed)  # initial weights of a UNet from scratch, and its dropout
    components = load_components(recipe)
    if recipe.resolution % components.vae_scale_factor:
        lower = recipe.resolution - recipe.resolution % components.vae_scale_factor
        raise RecipeError(
            f"--resolution {recipe.resolution} is not a multiple of the VAE's factor {components.vae_scale_factor}: "
            f"use {lower or components.vae_scale_factor} or {lower + components.vae_scale_factor}"
        )
    if (
        recipe.dream_training
        and components.scheduler.config.prediction_type != "epsilon"
        and not recipe.prediction_type
    ):
        raise RecipeError("--dream_training is defined for epsilon, and this model predicts something else: drop it")
    prediction_type = recipe.prediction_type or components.scheduler.config.prediction_type
    components.set_prediction_type(prediction_type)

    device = accelerator.device
    weight_dtype = DTYPES[accelerator.mixed_precision]
    torch.backends.cuda.matmul.allow_tf32 = recipe.allow_tf32
    place(components, recipe, device, weight_dtype)
    unet = components.unet
    unet.train()
    learning_rate = recipe.learning_rate * (global_batch_size if recipe.scale_lr else 1)
    fused = accelerator.mixed_precision != "fp16"
    optimizer = build_optimizer(unet.parameters(), recipe, learning_rate=learning_rate, fused=fused)
    schedule = build_schedule(optimizer, recipe, max_train_steps)
    ema = AveragedWeights(unet, recipe) if recipe.use_ema else None
    prepared_unet, prepared_optimizer = accelerator.prepare(unet, optimizer)

    latents = {
        "latent_shape": components.latent_shape(recipe.resolution),
        "num_train_timesteps": components.scheduler.config.num_train_timesteps,
    }
    builder = BatchBuilder(
        rows,
        components.tokenizer,
        recipe,
        seed=seed,
        noise_offset=recipe.noise_offset,
        input_perturbation=recipe.input_perturbation,
        **latents,
    )
    return Training(
        recipe=recipe,
        accelerator=accelerator,
        components=components,
        unet=prepared_unet,
        objective=DenoisingLoss(components.scheduler, recipe, device),
        # Plain, so that runs with other weightings and tricks can be compared by it.
        held_out_objective=DenoisingLoss(
            components.scheduler, ObjectiveConfig(prediction_type=prediction_type), device
        ),
        optimizer=prepared_optimizer,
        schedule=schedule,
        ema=ema,
        order=order,
        batches=TrainingBatches(
            builder,
            order,
            micro_batch_size=recipe.train_batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=recipe.dataloader_num_workers,
            pin_memory=device.type == "cuda",
        ),
        validator=_build_validator(recipe, components, latents),
        tracker=Tracker(accelerator, recipe),
        weight_dtype=weight_dtype,
        max_train_steps=max_train_steps,
        seed=seed,
    )


def check_output_dir(output_dir: Path) -> None:
    """Make the folder and write into it once. Raises RecipeError."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"0")
    except OSError as error:
        raise RecipeError(f"--output_dir {output_dir} cannot be written: {error.strerror}; choose another") from None


def _agree_on_seed(seed: int | None) -> int:
    """The seed, or one drawn by the first process for all."""
    drawn = int(np.random.SeedSequence().generate_state(1, np.uint32)[0]) if seed is None else seed
    return broadcast_object_list([drawn])[0]


def _build_validator(recipe: Recipe, components: Components, latents: dict[str, Any]) -> Validator:
    held_out = None
    if recipe.validation_split:
        rows = load_rows(recipe, split=recipe.validation_split, cache_dir=recipe.cache_dir)
        config = recipe.model_copy(update={"center_crop": True, "random_flip": False, "caption_dropout": 0.0})
        held_out = BatchBuilder(rows, components.tokenizer, config, seed=0, **latents)
    score = None
    if recipe.validation_clip_model:
        score = ImageTextScore(recipe.validation_clip_model, recipe.cache_dir)
    return Validator(held_out, score)


def describe(training: Training) -> str:
    """The run in a few lines: data, steps, batch, parameters."""
    recipe, order, accelerator = training.recipe, training.order, training.accelerator
    trainable = sum(parameter.numel() for parameter in training.components.unet.parameters() if parameter.requires_grad)
    epochs = training.max_train_steps / order.steps_per_epoch
    lines = {
        "rows": f"{order.num_rows:,}",
        "global batch": f"{order.global_batch_size} = {recipe.train_batch_size} a device x "
        f"{recipe.gradient_accumulation_steps} accumulated x {accelerator.num_processes} processes",
        "optimizer steps": f"{training.max_train_steps:,} ({order.steps_per_epoch:,} an epoch, {epochs:.4g} epochs)",
        "trainable parameters": f"{trainable:,} (UNet)",
        "predicts": training.objective.prediction_type,
        "device": f"{accelerator.device}, {accelerator.mixed_precision} mixed precision",
        "seed": training.seed,
    }
    return "\n".join(f"  {name:<21}{value}" for name, value in lines.items())
