"""How many processes read ahead."""

from __future__ import annotations

from sd_recipes.data.batches import READ_AHEAD, room_for_batches
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.cores import share_of_cores

# One decodes about 97 pictures of 640 x 512 pixels a second and 29 of 2048 x 1536, and a GPU trains on up to 150: five
# of these, and some for captions and draws.
MOST = 8


def num_workers_of(recipe: Recipe, device: str) -> int:
    """--dataloader_num_workers, or what suits a device of that type: on a CPU a thread, which takes no core from it."""
    if recipe.dataloader_num_workers is not None:
        return recipe.dataloader_num_workers
    return min(MOST, share_of_cores(), room_for_workers(recipe)) if device == "cuda" else 0


def room_for_workers(recipe: Recipe) -> int:
    """Those for which shared memory has room, through which pixels come: containers may have 64 MB of it."""
    return room_for_batches(recipe) // READ_AHEAD
