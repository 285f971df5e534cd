"""Build the model of a run: its parts where they are needed, and how a training step calls them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from sd_recipes.model.compilation import compile_unet, in_steps
from sd_recipes.model.components import Components
from sd_recipes.model.conditioning import CachedText
from sd_recipes.model.family import Family, TextStates
from sd_recipes.model.latents import LatentEncoder, decode_without_autocast
from sd_recipes.model.placement import apply_memory_format, move_models
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import DTYPES
from sd_recipes.runtime.gradients import GradientExchange
from sd_recipes.training.build_parts import UNCERTAINTY, part_of, trained_parts
from sd_recipes.training.build_state import build_state
from sd_recipes.training.dropout import has_dropout
from sd_recipes.training.frozen_model import frozen_model
from sd_recipes.training.objective import DenoisingLoss
from sd_recipes.training.run import Model
from sd_recipes.training.state import TrainState
from sd_recipes.training.utilisation import Utilisation

logger = logging.getLogger(__name__)


def convert(recipe: Recipe, components: Components, *, is_new: bool) -> None:
    """Make training and sampling schedules what the recipe says; tell of a new run whose UNet has to learn to fit."""
    given = components.scheduler.config.prediction_type
    wanted = recipe.prediction_type or given
    if wanted != given and is_new and not recipe.train_from_scratch:
        logger.warning(
            "The model predicts %s and is trained to predict %s from here on: until it has learned to, which takes "
            "thousands of steps, its pictures are noise. The exported scheduler says %s.",
            given, wanted, wanted,
        )  # fmt: skip
    components.set_prediction_type(wanted)
    if recipe.rescale_betas_zero_snr:
        components.rescale_to_zero_snr()


def build_model(
    recipe: Recipe,
    family: Family,
    components: Components,
    accelerator: Accelerator,
    *,
    vae_dtype: torch.dtype,
    batch_size: int,
    num_steps: int,
    num_rows: int | None,
    num_sizes: int = 1,
) -> tuple[Model, TrainState]:
    """Put the models where the run needs them; returns them, and what is trained of them.

    `num_sizes` is of pictures.
    """
    device, dtype = accelerator.device, DTYPES[accelerator.mixed_precision]
    # bitsandbytes makes parameters contiguous at their first step, after its state has taken on their layout, and FSDP
    # shards only contiguous ones. What optimizers of other packages take for granted is not known.
    contiguous = recipe.needs_contiguous_weights or accelerator.is_fsdp2
    encoder = build_encoder(recipe, components.vae, accelerator, vae_dtype)
    frozen = frozen_model(recipe, family, components, device, dtype) if recipe.prior_preservation == "model" else None
    move_models(family, components, recipe, device, dtype, contiguous_unet=contiguous)
    if recipe.compile:
        # Without gradients, and without the LoRA, it has programs of its own.
        is_own_teacher = recipe.trains_lora and recipe.prior_preservation == "model"
        num_passes = 1 + recipe.dream_training + is_own_teacher
        compile_unet(components.unet, recipe.compile, num_sizes=num_sizes, num_passes=num_passes)
    parts = trained_parts(recipe, family, components, batch_size)
    state = build_state(
        recipe,
        components,
        parts,
        accelerator,
        batch_size=batch_size,
        num_steps=num_steps,
        num_rows=num_rows,
    )
    encode_text = text_encoding(recipe, family, components, state)
    unet = part_of(parts, "unet").prepared
    model = Model(
        family=family,
        components=components,
        unet=in_steps(unet) if recipe.compile == "graphs" else unet,
        exchange=GradientExchange(
            [parameter for part in parts.values() for parameter in part.parameters.values()],
            is_needed=accelerator.num_processes > 1 and not accelerator.is_fsdp2,
        ),
        encoder=encoder,
        encode_text=CachedText(encode_text) if recipe.cache_text else encode_text,
        dropout_seed=recipe.seed if has_dropout(part.module for part in parts.values()) else None,
        objective=DenoisingLoss(
            components.scheduler, recipe, device, parts[UNCERTAINTY].prepared if UNCERTAINTY in parts else None
        ),
        quiet_loss=state.quiet_loss,
        timestep_errors=state.timestep_errors,
        steps_in_backward=recipe.fused_backward_pass,
        frozen=frozen and frozen.called_as(part_of(parts, "unet").prepared),
        utilisation=(
            Utilisation(components.unet, accelerator, allow_tf32=recipe.allow_tf32)
            if device.type == "cuda" or recipe.profile_steps
            else None
        ),
    )
    return model, state


def build_encoder(recipe: Recipe, vae: AutoencoderKL, accelerator: Accelerator, dtype: torch.dtype) -> LatentEncoder:
    """The VAE in that type, as `bearable_dtype` found it."""
    if recipe.vae_slicing:
        vae.enable_slicing()
    if recipe.vae_tiling:
        vae.enable_tiling()
        logger.warning(
            "--vae_tiling: images of more than %d pixels a side are encoded and decoded in tiles, and differ a little "
            "from whole ones; smaller ones are not.", vae.tile_sample_min_size,
        )  # fmt: skip
    if dtype != DTYPES[accelerator.mixed_precision]:
        decode_without_autocast(vae)
    encoder = LatentEncoder(vae, accelerator.device, dtype)
    apply_memory_format(vae, recipe, accelerator.device, dtype)
    return encoder


def text_encoding(
    recipe: Recipe, family: Family, components: Components, state: TrainState
) -> Callable[[torch.Tensor], TextStates]:
    """How a training step encodes its captions: with a graph while the text encoder is trained.

    A frozen one gets no gradients, so that no optimizer steps it; its average goes on, towards where it stands.
    """
    if not (recipe.train_text_encoder or recipe.lora_text_encoder):
        return partial(family.encode_text, components)
    prepared: dict[str, Any] = {name: part_of(state.parts, name).prepared for name in family.text_models}
    trained = replace(components, **prepared)

    def encode(input_ids: torch.Tensor) -> TextStates:
        if recipe.text_encoder_steps is None or state.progress.global_step < recipe.text_encoder_steps:
            return family.encode_text(trained, input_ids)
        with torch.no_grad():
            return family.encode_text(components, input_ids)

    return encode
