"""How many processes read ahead."""

from __future__ import annotations

from sd_recipes.recipe import DataConfig
from sd_recipes.runtime.cores import share_of_cores

# One decodes about 97 pictures of 640 x 512 pixels a second and 29 of 2048 x 1536, and a GPU trains on up to 150: five
# of these, and some for captions and draws.
MOST = 8


def num_workers_of(config: DataConfig, device: str) -> int:
    """--dataloader_num_workers, or what suits a device of that type: on a CPU a thread, which takes no core from it."""
    if config.dataloader_num_workers is not None:
        return config.dataloader_num_workers
    return min(MOST, share_of_cores()) if device == "cuda" else 0
