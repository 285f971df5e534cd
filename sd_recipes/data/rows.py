"""The rows that a recipe's sources give: opened, columns checked, joined."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np

from sd_recipes.data.captions import DEFECT, caption_columns
from sd_recipes.data.columns import MASK, checked, columns_of, with_lists
from sd_recipes.data.guard import guarded
from sd_recipes.data.recognised import Recognised
from sd_recipes.data.shards import with_bytes
from sd_recipes.data.sources import Opened, open_source
from sd_recipes.data.splits import SPLITS
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import DataSettings, DataSource, Recipe

MAX_HELD_OUT_STREAM_ROWS = 1000  # a held-out split of a stream is kept in memory


@dataclass
class SourceRows:
    """The rows of one source, a Dataset or a stream, and what it turned out to be."""

    rows: Any
    recognised: Recognised


class HeldOutSource(DataSource):
    """The folder or file that --validation_split names."""

    @property
    def flag(self) -> str:
        return f"--validation_split {self.dataset_name}"


def load_rows(
    config: DataSettings, *, split: str | None = None, cache_dir: str | None = None, seed: int | None = None
) -> datasets.Dataset:
    """Rows of all sources one after the other, with the image and caption columns checked.

    Images stay encoded: a row is {image_column: {"bytes", "path"}, caption columns: str or list of str}, and has
    `DEFECT` where its reader could not make it whole. `split` replaces the sources' own. `config.max_train_samples` is
    applied to the training split only, drawn by `seed`. Raises RecipeError if the data cannot be read, is empty, or
    lacks a column.
    """
    parts = [part.rows for part in load_sources(config, split=split, cache_dir=cache_dir)]
    return join_rows(parts, None if split else config.max_train_samples, seed)


def join_rows(parts: list[datasets.Dataset], number: int | None, seed: int | None) -> datasets.Dataset:
    """The rows of all sources one after the other; `number` of them drawn by `seed`, where there are more."""
    rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if number is not None and number < len(rows):
        rows = rows.shuffle(seed=seed).select(range(number))
    return rows


def load_sources(
    config: DataSettings, *, split: str | None = None, cache_dir: str | None = None, repeats: bool = True
) -> list[SourceRows]:
    """The rows of each source, with the same columns in all; each once, or as often as it `repeats`.

    Raises RecipeError as `load_rows` does.
    """
    parts: list[SourceRows] = []
    for source in config.sources:
        opened = open_source(source, config, cache_dir, streaming=False, repeats=repeats and split is None)
        rows = _of_split(opened, source, split)
        if len(rows) == 0:
            raise RecipeError(f"{source.flag} has no rows in split {split or source.train_split!r}")
        rows = checked(rows, rows.features, source, config, opened.finder)
        if source.repeats > 1 and repeats and split is None:
            rows = rows.select(np.repeat(np.arange(len(rows)), source.repeats))
        parts.append(SourceRows(rows, with_columns(opened.recognised, source, config)))
    for name, feature in ((DEFECT, datasets.Value("string")), (MASK, datasets.Image(decode=False))):
        if any(name in part.rows.column_names for part in parts):
            for part in parts:
                if name not in part.rows.column_names:
                    part.rows = part.rows.add_column(name, [None] * len(part.rows), feature=feature)
    for column in caption_columns(config):  # some sources may have several captions for a row
        if any(isinstance(part.rows.features.get(column), datasets.List) for part in parts):
            for part in parts:
                part.rows = with_lists(part.rows, column)
    for part, source in zip(parts[1:], config.sources[1:], strict=True):
        try:
            part.rows = part.rows.cast(parts[0].rows.features)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{source.flag} has other columns than {config.sources[0].flag}: {error}") from None
    return parts


def load_streams(config: DataSettings, *, cache_dir: str | None = None, repeats: bool = True) -> list[SourceRows]:
    """The stream of each source, images undecoded, columns checked. Raises RecipeError as `load_rows` does."""
    streams = []
    for source in config.sources:
        opened = open_source(source, config, cache_dir, streaming=True, repeats=repeats)
        stream = _of_split(opened, source, None)
        # For files that do not state them, `datasets` infers them from the first rows when streams are joined.
        stream = guarded(source, partial(datasets.concatenate_datasets, [stream]))
        rows = checked(stream, stream.features, source, config, opened.finder)
        streams.append(SourceRows(rows, with_columns(opened.recognised, source, config)))
    return streams


def with_columns(recognised: Recognised, source: DataSource, config: DataSettings) -> Recognised:
    """What a source turned out to be; where it has captions in columns only, with their names."""
    if not recognised.captions:
        names = ", ".join(columns_of(source, config))
        recognised.captions = f"the column {names}" if "," not in names else f"the columns {names}"
    return recognised


def load_held_out_rows(config: Recipe, split: str, cache_dir: str | None) -> datasets.Dataset:
    """Rows of the first source's split `split`, or of the folder or file of that name, each once; no class pictures.

    Of a stream the first 1,000, in memory. Raises RecipeError.
    """
    source = config.sources[0].model_copy(update={"train_split": split, "repeats": 1})
    if is_place(split):
        kept = source.model_dump(include={"caption_extension", "caption_column", "caption"})
        source = HeldOutSource(dataset_name=split, **kept)
        config = config.model_copy(update={"streaming": False, "folder_repeats": False})
    config = config.model_copy(update={"data_sources": [source], "class_data_dir": None})
    if not config.streaming:
        return load_rows(config, split=None if is_place(split) else split, cache_dir=cache_dir)
    stream = load_streams(config, cache_dir=cache_dir, repeats=False)[0].rows
    rows = guarded(source, lambda: [with_bytes(row) for row in itertools.islice(stream, MAX_HELD_OUT_STREAM_ROWS)])
    return datasets.Dataset.from_list(rows, features=stream.features)


def is_place(split: str) -> bool:
    """Whether a split's name is that of a folder or file instead: a mere name is a split's."""
    return os.sep in split or split.startswith((".", "~")) or os.path.isfile(split)


def _of_split(opened: Opened, source: DataSource, split: str | None) -> Any:
    """The rows of the split that is asked for; what is not trained on is noted. Raises RecipeError."""
    wanted = split or source.train_split
    names = {str(name): rows for name, rows in opened.splits.items()}
    known = wanted if wanted in names else SPLITS.get(wanted.lower(), wanted)
    if known not in names and isinstance(source, HeldOutSource) and len(names) == 1:  # whatever its files are called
        known = next(iter(names))
    if known not in names:
        folder = f"; the folder of that name is ./{wanted}" if split and os.path.isdir(wanted) else ""
        raise RecipeError(f"{source.flag} has no split {wanted!r}: it has {sorted(names)}{folder}")
    if others := [name for name in names if name != known]:
        opened.recognised.notes.append(f"split {known}; not trained on: {', '.join(others)}")
    return names[known]
