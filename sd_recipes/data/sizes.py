"""The size at which each row is trained: the square of the resolution, or its aspect-ratio bucket."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from sd_recipes.data.buckets import Buckets
from sd_recipes.data.images import ImageError, read_size
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import DataSettings, ImageConfig, Recipe

Size = tuple[int, int]  # (height, width)
CHUNK = 256


def size_of_row(config: DataSettings) -> Callable[[dict[str, Any]], Size]:
    """The function from a row to its size. A row whose image cannot be read gets the square: it is found bad later."""
    square = (config.resolution, config.resolution)
    buckets = None
    if config.aspect_ratio_buckets:
        buckets = Buckets(config.resolution, config.bucket_step, config.max_upscale)

    def size_of(row: dict[str, Any]) -> Size:
        if "moments" in row:
            return row["height"], row["width"]
        if buckets is None:
            return square
        try:
            return buckets.size_for(*read_size(row[config.image_column], max_megapixels=config.max_image_megapixels))
        except ImageError:
            return square

    return size_of


def square_side(config: ImageConfig) -> int:
    """The side of the square to train on: --resolution or, with buckets, the largest multiple of the step in it."""
    return (
        config.resolution - config.resolution % config.bucket_step if config.aspect_ratio_buckets else config.resolution
    )


def assign_buckets(rows: datasets.Dataset, config: DataSettings) -> tuple[tuple[Size, ...], np.ndarray]:
    """The sizes that occur, and each row's index into them (num_rows,); reads the header of every image."""
    size_of = size_of_row(config)
    columns = [name for name in (config.image_column, "moments", "height", "width") if name in rows.column_names]
    needed = rows.select_columns([name for name in columns if name != "moments" or "height" not in columns])

    def sizes_of(start: int) -> list[Size]:
        found = needed[start : start + CHUNK]
        chunk = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
        return [(row["height"], row["width"]) if "height" in row else size_of(row) for row in chunk]

    sizes: list[Size] = []
    with ThreadPoolExecutor() as readers, tqdm(total=len(rows), desc="Image sizes", unit="row", leave=False) as bar:
        for chunk in readers.map(sizes_of, range(0, len(rows), CHUNK)):
            sizes += chunk
            bar.update(len(chunk))
    distinct = sorted(set(sizes))
    number = {size: place for place, size in enumerate(distinct)}
    return tuple(distinct), np.array([number[size] for size in sizes])


def check_held_out_sizes(rows: datasets.Dataset, config: Recipe) -> None:
    """Raises RecipeError for moments of another size than that of the held-out loss: they cannot be resized."""
    if "moments" not in rows.column_names:
        return
    side = square_side(config)
    other = sorted(set(zip(rows["height"], rows["width"], strict=True)) - {(side, side)})
    if other:
        raise RecipeError(
            f"--validation_split {config.validation_split} holds moments of {other[0][0]} x {other[0][1]} pixels, and "
            f"the held-out loss needs {side} x {side} (--resolution): change --resolution, or drop --validation_split"
        )


def has_buckets(rows: datasets.Dataset, config: ImageConfig) -> bool:
    """Whether rows may differ in size: by the setting, or because they come from a latent cache."""
    return config.aspect_ratio_buckets or "moments" in rows.column_names
