"""Put a run together from a resolved recipe: data, model, state, validation and tracking."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from sd_recipes.checkpoints.resume import finish_epoch, global_batch_size
from sd_recipes.data.latent_store import check_one_provenance, provenance_of
from sd_recipes.data.training_data import load_training_data
from sd_recipes.model.checks import check_pictures, check_recipe_fits, check_schedule
from sd_recipes.model.components import latent_shape_of, load_scheduler
from sd_recipes.model.families import family_of
from sd_recipes.model.latents import bearable_dtype
from sd_recipes.model.placement import keep_as_loaded, kept_as_loaded
from sd_recipes.recipe import Recipe, odd_settings
from sd_recipes.runtime.accelerator import DTYPES
from sd_recipes.runtime.signals import stop_request
from sd_recipes.runtime.trackers import Tracker
from sd_recipes.training.build_data import build_batches, open_store
from sd_recipes.training.build_model import build_model, convert
from sd_recipes.training.build_parts import choose_trained
from sd_recipes.training.build_validation import build_validator
from sd_recipes.training.guard import Guard
from sd_recipes.training.optimizer_check import check_optimizer
from sd_recipes.training.run import Checkpoint, Run
from sd_recipes.training.run_length import steps_of_run

logger = logging.getLogger(__name__)

NOT_BEGUN = "while it was loading, before its first step"
SIZES_OF_STREAM = 32  # of pictures that a compiled UNet meets, where nobody knows


def build_run(recipe: Recipe, accelerator: Accelerator, checkpoint: Checkpoint | None) -> Run:
    """Load data and models and put the run together. Raises RecipeError for what the user can fix.

    The recipe is resolved; the checkpoint is the one that the run resumes from.
    """
    assert recipe.seed is not None, "the recipe is resolved"
    manifest = checkpoint and checkpoint[1]
    for words in odd_settings(recipe):
        logger.warning("%s", words)
    check_optimizer(recipe, accelerator.device)
    family = family_of(recipe)
    # The smallest parts first, so that a missing model is reported soon: for tokenizers, which the data checks need,
    # transformers would keep asking an unreachable Hub for minutes.
    scheduler = load_scheduler(recipe)
    check_schedule(recipe, scheduler)
    tokenizers = family.load_tokenizers(recipe)
    batch_size = global_batch_size(recipe, accelerator.num_processes, manifest)
    data = load_training_data(
        recipe, tokenizers[0], seed=recipe.seed, global_batch_size=batch_size, rank=accelerator.process_index
    )
    if data.order and manifest:
        data.order = finish_epoch(data.order, manifest)
    num_steps = steps_of_run(recipe, data.order, manifest)

    stop_request.check(NOT_BEGUN)
    torch.manual_seed(recipe.seed)  # initial weights of a UNet from scratch, or of a LoRA
    components = family.load(recipe, scheduler, tokenizers)
    stop_request.check(NOT_BEGUN)
    check_recipe_fits(recipe, components)
    choose_trained(recipe, family, components)
    convert(recipe, components, is_new=checkpoint is None)
    check_pictures(recipe, components.sampler)
    provenance = None
    vae_dtype = bearable_dtype(components.vae, DTYPES[accelerator.mixed_precision], accelerator.device)
    if data.provenances or recipe.cache_latents != "off":  # of the weights as they were loaded
        provenance = provenance_of(recipe, components.vae, vae_dtype, tiling=recipe.vae_tiling)
        check_one_provenance(data.provenances, provenance)
    if accelerator.is_main_process:
        keep_as_loaded(components, kept_as_loaded(family, recipe))
    model, state = build_model(
        recipe,
        family,
        components,
        accelerator,
        vae_dtype=vae_dtype,
        batch_size=batch_size,
        num_steps=num_steps,
        num_rows=None if data.rows is None else len(data.rows),
        num_sizes=SIZES_OF_STREAM if data.order is None else len(data.order.sizes),
    )
    store = open_store(recipe, provenance, accelerator)
    tracker = Tracker(accelerator, recipe)
    builder_settings: dict[str, Any] = {
        "tokenize": partial(family.tokenize, tokenizers),
        "latent_shape": latent_shape_of(components.vae),
        "num_train_timesteps": scheduler.config.num_train_timesteps,
        "provenance": provenance,
    }
    return Run(
        recipe=recipe,
        accelerator=accelerator,
        data=data,
        batches=build_batches(recipe, data, store, builder_settings, batch_size, accelerator),
        store=store,
        model=model,
        state=state,
        validator=build_validator(recipe, model, data, builder_settings, accelerator),
        tracker=tracker,
        guard=Guard(state, tracker, recipe.max_skipped_steps),
        num_steps=num_steps,
        checkpoint=checkpoint,
    )
