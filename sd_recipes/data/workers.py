"""How many processes read ahead."""

from __future__ import annotations

import shutil

from sd_recipes.data.batches import READ_AHEAD
from sd_recipes.data.latent_store import SHARED_MEMORY
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.cores import share_of_cores

# One decodes about 97 pictures of 640 x 512 pixels a second and 29 of 2048 x 1536, and a GPU trains on up to 150: five
# of these, and some for captions and draws.
MOST = 8


def num_workers_of(recipe: Recipe, device: str) -> int:
    """--dataloader_num_workers, or what suits a device of that type: on a CPU a thread, which takes no core from it.

    No more than half of the shared memory has room for, through which pixels come: containers may have 64 MB of it.
    """
    if recipe.dataloader_num_workers is not None:
        return recipe.dataloader_num_workers
    if device != "cuda":
        return 0
    number = min(MOST, share_of_cores())
    if SHARED_MEMORY.is_dir():
        pixels = 3 * recipe.resolution**2 * recipe.train_batch_size
        number = min(number, shutil.disk_usage(SHARED_MEMORY).free // 2 // (READ_AHEAD * pixels))
    return number
