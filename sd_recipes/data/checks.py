"""The cheap part of `sd-recipes inspect`, before a model is loaded: do the images decode, are there captions."""

from __future__ import annotations

import itertools
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from sd_recipes.data.bad_rows import NAMED, BadRow, BadRows, row_name, row_number
from sd_recipes.data.captions import CaptionError, count_tokens, make_caption, undisturbed
from sd_recipes.data.draws import draw
from sd_recipes.data.images import open_with_size
from sd_recipes.data.masks import mask_of
from sd_recipes.data.shards import with_bytes
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe

logger = logging.getLogger(__name__)

SAMPLED_ROWS = 64
SAMPLED_STREAM_ROWS = 16
FEWEST_TO_PROJECT = 3
CHUNK = 64


def check_rows(
    rows: datasets.Dataset, config: Recipe, tokenizer: CLIPTokenizer, *, seed: int, bad_rows: BadRows
) -> None:
    """Decode the images and make the captions of all rows, or of a sample, and report those that fail.

    Raises RecipeError if none of them can be used, and TooManyBadRows if more fail than may be skipped, or,
    judging by a sample, if that is all but certain.
    """
    examined = _Examined(config, tokenizer)
    everything = examined.sample(rows, seed)
    found = examined.bad
    if everything:
        bad_rows.add(tuple(found), 0)
    elif len(found) >= FEWEST_TO_PROJECT:
        # Half of what the sample projects: a data set within the limit hardly ever gives such a sample.
        bad_rows.check(len(found) * len(rows) // examined.number // 2, 0, found)


def check_held_out(rows: datasets.Dataset, config: Recipe, tokenizer: CLIPTokenizer, *, seed: int) -> None:
    """Like `check_rows`, for the held-out split: its bad rows are named, but not counted with those of training."""
    _Examined(config, tokenizer, of=f" of --validation_split {config.validation_split}").sample(rows, seed)


def check_bad_rows_again(
    rows: datasets.Dataset, config: Recipe, tokenizer: CLIPTokenizer, *, bad_rows: BadRows
) -> None:
    """Look again at the rows that were bad before the run was resumed: only those that are still bad count.

    Raises TooManyBadRows.
    """
    recorded = bad_rows.recorded()
    if not recorded:
        return
    numbers = sorted({number for name in recorded if (number := row_number(name)) is not None and number < len(rows)})
    examined = _Examined(config, tokenizer)
    for start in range(0, len(numbers), CHUNK):
        examined.add([(number, rows[number]) for number in numbers[start : start + CHUNK]])
    found = dict(examined.bad)
    bad_rows.forget({name for name, reason in recorded.items() if found.get(name) != reason})
    if usable := recorded.keys() - found.keys():
        logger.info("%d of the %d rows that could not be used before can be used now.", len(usable), len(recorded))
    bad_rows.add(tuple(examined.bad), 0)


def check_stream(stream: datasets.IterableDataset, config: Recipe, tokenizer: CLIPTokenizer) -> list[dict[str, Any]]:
    """Like `check_rows`, for the first rows of a stream, which it returns."""
    rows = [with_bytes(row) for row in itertools.islice(stream, SAMPLED_STREAM_ROWS)]
    examined = _Examined(config, tokenizer)
    examined.add(list(enumerate(rows)))
    examined.tell("first rows")
    return rows


class _Examined:
    """What was found in the rows that were looked at."""

    def __init__(self, config: Recipe, tokenizer: CLIPTokenizer, of: str = "") -> None:
        self.config = undisturbed(config)  # a caption is as long as it is without its tags' dropout
        self.tokenizer = tokenizer
        self.of = of  # where the rows are from, in a message
        self.number = 0
        self.bad: list[tuple[str, str]] = []  # (name, reason)
        self.long_captions = 0
        self.max_tokens = tokenizer.model_max_length - 2  # without the begin and end tokens
        if config.long_captions == "chunk":
            self.max_tokens *= config.caption_chunks
        self.draws = draw(0, 0, stratum=0, global_batch_size=1, latent_shape=(1, 1, 1), num_train_timesteps=1)

    def sample(self, rows: datasets.Dataset, seed: int) -> bool:
        """Add all rows, or a sample, and report on them; whether it was all. Raises RecipeError as `add`, `tell` do."""
        everything = self.config.check_data == "full" or len(rows) <= SAMPLED_ROWS
        numbers = np.arange(len(rows))
        if not everything:
            numbers = np.sort(np.random.default_rng(seed).choice(len(rows), SAMPLED_ROWS, replace=False))
        with tqdm(
            total=len(numbers), desc="Checking rows", unit="row", leave=False, disable=len(numbers) <= SAMPLED_ROWS
        ) as bar:
            for start in range(0, len(numbers), CHUNK):
                chunk = numbers[start : start + CHUNK].tolist()
                self.add([(number, rows[number]) for number in chunk])
                bar.update(len(chunk))
        self.tell("rows" if everything else "sampled rows")
        return everything

    def add(self, rows: list[tuple[int, dict[str, Any]]]) -> None:
        """Look at numbered rows. Raises RecipeError for what the settings do not allow."""
        with ThreadPoolExecutor() as readers:
            results = list(readers.map(self._examine, rows))
        self.number += len(rows)
        self.bad += [found for _, found in results if found is not None]
        captions = [caption for caption, _ in results if caption is not None]
        self.long_captions += sum(tokens > self.max_tokens for tokens in count_tokens(self.tokenizer, captions))

    def _examine(self, item: tuple[int, dict[str, Any]]) -> tuple[str | None, tuple[str, str] | None]:
        """The row's caption, and its (name, reason) if it cannot be used."""
        number, row = item
        config, side = self.config, self.config.resolution
        try:
            caption = make_caption(row, config, self.draws)
            if "moments" not in row:
                _, original_size = open_with_size(
                    row[config.image_column], at_least=(side, side), max_megapixels=config.max_image_megapixels
                )
                if config.masked_loss:
                    mask_of(row, original_size, config)
        except BadRow as error:
            if isinstance(error, CaptionError) and config.blank_captions == "error":
                raise RecipeError(f"row {number}{self.of}: {error} (--blank_captions error)") from error
            return None, (row_name(number, row.get(config.image_column)), str(error))
        return caption, None

    def tell(self, what: str) -> None:
        """Report what was found in the rows; `what` names them. Raises RecipeError if no row can be used."""
        what += self.of
        named = "; ".join(f"{name}: {reason}" for name, reason in self.bad[:NAMED])
        if self.bad and len(self.bad) == self.number:
            raise RecipeError(f"none of {self.number} {what} can be used: see `sd-recipes inspect`. {named}")
        if self.bad:
            logger.warning(
                "%d of %d %s cannot be used and will be skipped: %s", len(self.bad), self.number, what, named
            )
        if self.long_captions:
            setting = self.config.long_captions
            words = (
                f"the captions of {self.long_captions} of {self.number} {what} are longer than {self.max_tokens} tokens"
            )
            if setting == "error":
                raise RecipeError(f"{words}: shorten them, or use --long_captions truncate or chunk")
            remedy = "raise --caption_chunks" if setting == "chunk" else "--long_captions chunk keeps all"
            logger.warning("%s and are cut; %s", words, remedy)
