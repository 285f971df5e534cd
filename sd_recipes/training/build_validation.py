"""Build what judges a run: fixed samples, prompts of pictures, and their score."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from sd_recipes.data.batches import BatchBuilder
from sd_recipes.data.captions import undisturbed
from sd_recipes.data.held_out import HELD_OUT_SEED
from sd_recipes.data.sizes import square_side
from sd_recipes.data.training_data import TrainingData
from sd_recipes.data.workers import num_workers_of
from sd_recipes.evaluation.metrics import ImageTextScore
from sd_recipes.evaluation.sample_errors import HELD_OUT, TRAIN, FixedSamples
from sd_recipes.evaluation.validation import Validator
from sd_recipes.evaluation.watched_rows import WatchedRows
from sd_recipes.recipe import ObjectiveConfig, Recipe
from sd_recipes.runtime.out_of_memory import AtOnce
from sd_recipes.training.objective import DenoisingLoss
from sd_recipes.training.run import Model

logger = logging.getLogger(__name__)


def build_validator(
    recipe: Recipe, model: Model, data: TrainingData, settings: Mapping[str, Any], accelerator: Accelerator
) -> Validator:
    sets = {}
    if data.held_out is not None and data.watched is not None:
        sets = {HELD_OUT: data.held_out, TRAIN: data.watched}
    plain = {"center_crop": True, "crop": None, "random_flip": False}
    plain_recipe = undisturbed(recipe).model_copy(update=plain)
    watched = WatchedRows(sets, plain_recipe) if sets else None
    prompts = recipe.validation_prompts or []
    if watched and not prompts:
        prompts = watched.captions(recipe.validation_pictures)
    side = square_side(recipe)
    # The pipeline takes multiples of 8 only, whatever the VAE's factor; a smaller factor divides 8.
    picture_side = side - side % 8
    if recipe.validation_prompts and picture_side != recipe.resolution:
        logger.info("Validation pictures have %d x %d pixels.", picture_side, picture_side)
    score = None
    if recipe.validation_clip_model and accelerator.is_main_process:
        score = ImageTextScore(recipe.validation_clip_model, accelerator.device, recipe.cache_dir)
    # Plain, so that runs with different weightings and tricks can be compared by it.
    plain_objective = ObjectiveConfig(prediction_type=model.objective.prediction_type)
    own = slice(accelerator.process_index, None, accelerator.num_processes)
    return Validator(
        recipe,
        accelerator,
        model.family,
        model.components,
        model.encoder,
        DenoisingLoss(model.components.scheduler, plain_objective, accelerator.device),
        {
            name: FixedSamples(
                BatchBuilder(fixed.rows, plain_recipe, seed=HELD_OUT_SEED, **settings),
                (side, side),
                recipe.validation_samples,
                own,
                keeps_text=not (recipe.train_text_encoder or recipe.lora_text_encoder),
                num_workers=num_workers_of(recipe, accelerator.device.type),
                pin_memory=accelerator.device.type == "cuda",
            )
            for name, fixed in sets.items()
        },
        watched,
        prompts,
        score,
        picture_size=(picture_side, picture_side),
        samples_at_once=AtOnce(recipe.train_batch_size, "the held-out loss"),
        pictures_at_once=AtOnce(min(recipe.train_batch_size, len(prompts)), "validation pictures"),
    )
