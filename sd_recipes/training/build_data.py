"""Build what feeds a run: the latent store, and the batches that may come from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sd_recipes.data.batches import BatchBuilder, TrainingBatches
from sd_recipes.data.latent_store import LatentStore, memory_folder, remove_memory_folder
from sd_recipes.data.training_data import TrainingData, plans
from sd_recipes.data.workers import num_workers_of
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.agreement import wait_for_all
from sd_recipes.training.run_length import micro_batches_of_step

logger = logging.getLogger(__name__)


def open_store(recipe: Recipe, provenance: dict[str, Any] | None, accelerator: Accelerator) -> LatentStore | None:
    """The recipe's latent store, if it asks for one. Raises RecipeError if there is no room for it in memory."""
    if recipe.dry_run:  # it reads no row, leaves no trace, and takes no other run's memory
        return None
    if accelerator.is_local_main_process:
        remove_memory_folder(recipe.output_dir)  # whatever cache this run will use
    if recipe.cache_latents == "off":
        return None
    assert provenance is not None
    if recipe.streaming and len(recipe.sources) > 1:
        logger.warning(
            "Several streams have no common epoch after which the cache could be read: --cache_latents keeps each row "
            "once, and reads them when the run resumes or another one starts."
        )
    folder = Path(recipe.latent_cache_dir or Path(recipe.output_dir) / "latents")
    if recipe.cache_latents == "memory":
        wait_for_all()  # until it is removed
        folder = memory_folder(recipe.output_dir)
    return LatentStore(folder, provenance, accelerator.process_index, temporary=recipe.cache_latents == "memory")


def build_batches(
    recipe: Recipe,
    data: TrainingData,
    store: LatentStore | None,
    settings: Mapping[str, Any],
    batch_size: int,
    accelerator: Accelerator,
) -> TrainingBatches:
    """The micro-batches of this process; `settings` are those of every `BatchBuilder` of the run."""
    assert recipe.seed is not None, "the recipe is resolved"
    return TrainingBatches(
        BatchBuilder(data.rows, recipe, seed=recipe.seed, objective=recipe, store=store, **settings),
        plans(data, recipe, rank=accelerator.process_index, world_size=accelerator.num_processes),
        num_workers=num_workers_of(recipe, accelerator.device.type),
        pin_memory=accelerator.device.type == "cuda",
        read_ahead=micro_batches_of_step(recipe, batch_size, accelerator.num_processes)
        * (2 if recipe.has_class_pictures else 1),
    )
