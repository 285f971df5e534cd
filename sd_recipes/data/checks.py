"""The cheap part of `sd-recipes inspect`, before a model is loaded: do the rows decode, are there captions."""

from __future__ import annotations

import itertools
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from sd_recipes.data.bad_rows import NAMED, BadRows, row_name
from sd_recipes.data.captions import CaptionError, make_caption
from sd_recipes.data.draws import draw
from sd_recipes.data.images import ImageError, open_image
from sd_recipes.data.shards import with_bytes
from sd_recipes.recipe import Recipe, RecipeError

logger = logging.getLogger(__name__)

SAMPLED_ROWS = 64
SAMPLED_STREAM_ROWS = 16
FEWEST_TO_PROJECT = 3
CHUNK = 64


def check_rows(rows: datasets.Dataset, config: Recipe, seed: int, bad_rows: BadRows) -> None:
    """Decode the images and make the captions of all rows, or of a sample, and tell of those that fail.

    Raises RecipeError if none of them can be used, and TooManyBadRows if more fail than may be skipped, or,
    by a sample, if that is all but certain.
    """
    everything = config.check_data == "full" or len(rows) <= SAMPLED_ROWS
    numbers = np.arange(len(rows))
    if not everything:
        numbers = np.sort(np.random.default_rng(seed).choice(len(rows), SAMPLED_ROWS, replace=False))
    found: list[tuple[str, str]] = []
    with tqdm(
        total=len(numbers), desc="Checking rows", unit="row", leave=False, disable=len(numbers) <= SAMPLED_ROWS
    ) as bar:
        for start in range(0, len(numbers), CHUNK):
            chunk = numbers[start : start + CHUNK].tolist()
            found += _examine([(number, rows[number]) for number in chunk], config)
            bar.update(len(chunk))
    _tell(found, len(numbers), "rows" if everything else "sampled rows")
    if everything:
        bad_rows.add(tuple(found), 0)
    elif len(found) >= FEWEST_TO_PROJECT:
        # Half of what the sample projects: a data set that is as good as allowed hardly gives such a sample.
        bad_rows.check(len(found) * len(rows) // len(numbers) // 2, 0, found)


def check_stream(stream: datasets.IterableDataset, config: Recipe) -> None:
    """As `check_rows`, of the first rows of a stream."""
    rows = [with_bytes(row) for row in itertools.islice(stream, SAMPLED_STREAM_ROWS)]
    _tell(_examine(list(enumerate(rows)), config), len(rows), "first rows")


def _examine(rows: list[tuple[int, dict[str, Any]]], config: Recipe) -> list[tuple[str, str]]:
    """(name, reason) of each of the numbered rows that cannot be used."""
    draws = draw(0, 0, stratum=0, global_batch_size=1, latent_shape=(1, 1, 1), num_train_timesteps=1)
    size = (config.resolution, config.resolution)

    def examine(item: tuple[int, dict[str, Any]]) -> tuple[str, str] | None:
        number, row = item
        try:
            make_caption(row, config, draws)
            if "moments" not in row:
                encoded = row[config.image_column]
                encoded = {"bytes": encoded, "path": None} if isinstance(encoded, bytes) else encoded
                open_image(encoded, at_least=size, max_megapixels=config.max_image_megapixels)
        except (ImageError, CaptionError) as error:
            if isinstance(error, CaptionError) and config.blank_captions == "error":
                raise RecipeError(f"row {number}: {error} (--blank_captions error)") from error
            return row_name(number, row.get(config.image_column)), str(error)
        return None

    with ThreadPoolExecutor() as readers:
        return [found for found in readers.map(examine, rows) if found is not None]


def _tell(found: list[tuple[str, str]], checked: int, what: str) -> None:
    if not found:
        return
    named = "; ".join(f"{name}: {reason}" for name, reason in found[:NAMED])
    if len(found) == checked:
        raise RecipeError(f"none of {checked} {what} can be used; look at all with `sd-recipes inspect`. {named}")
    logger.warning("%d of %d %s cannot be used and will be skipped: %s", len(found), checked, what, named)
