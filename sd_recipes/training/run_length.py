"""How long a run is, in steps and epochs, and a step, in micro-batches."""

from __future__ import annotations

import math

from sd_recipes.checkpoints.format import Manifest
from sd_recipes.data.order import Order
from sd_recipes.recipe import Recipe
from sd_recipes.training.run import Run


def steps_of_run(recipe: Recipe, order: Order | None, manifest: Manifest | None) -> int:
    """Optimizer steps of the whole run, including those before a checkpoint."""
    if recipe.max_train_steps is not None:
        return recipe.max_train_steps
    assert order is not None, "the recipe's check asks a stream for --max_train_steps"
    done, samples_seen = (manifest.step, manifest.samples_seen) if manifest else (0, 0)
    # Not counted over all epochs: the steps already done may have had batches of another size.
    return done + order.num_steps(recipe.num_train_epochs, samples_seen)


def num_epochs(run: Run, order: Order) -> float:
    """Epochs at the end of a run. Those before a checkpoint are counted by samples: batch sizes may have differed."""
    of_epoch = order.num_steps(1)
    if run.checkpoint is None:
        return run.num_steps / of_epoch
    manifest = run.checkpoint[1]
    epoch = manifest.samples_seen // order.num_rows
    left_of_epoch = order.num_steps(epoch + 1, manifest.samples_seen)
    return epoch + 1 + (run.num_steps - manifest.step - left_of_epoch) / of_epoch


def micro_batches_of_step(recipe: Recipe, global_batch_size: int, num_processes: int) -> int:
    """The most micro-batches that a process has in an optimizer step."""
    return math.ceil(math.ceil(global_batch_size / num_processes) / recipe.train_batch_size)
