"""Where rows come from: a folder of images, a data file, or the Hub. Columns are checked here."""

from __future__ import annotations

import difflib
from pathlib import Path

import datasets

from sd_recipes import assets
from sd_recipes.recipe import DataConfig, RecipeError

FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}


def load_rows(
    config: DataConfig, *, split: str | None = None, cache_dir: str | None = None, seed: int | None = None
) -> datasets.Dataset:
    """Rows of `split` (default: `config.train_split`) with the image and caption columns checked.

    Images stay encoded: a row is {image_column: {"bytes", "path"}, caption_column: str or list of str}.
    `config.max_train_samples` is applied to the training split only, drawn by `seed`.
    Raises RecipeError if the data cannot be read, is empty, or lacks a column.
    """
    wanted = split or config.train_split
    found = _load(config, cache_dir)
    if wanted not in found:
        raise RecipeError(f"{_source(config)} has no split {wanted!r}: it has {sorted(map(str, found))}")
    rows = found[wanted]
    if len(rows) == 0:
        raise RecipeError(f"{_source(config)} has no rows in split {wanted!r}: put images and captions there")
    for flag, column in (("--image_column", config.image_column), ("--caption_column", config.caption_column)):
        _check_column(flag, column, rows, config)
    image = rows.features[config.image_column]
    if not isinstance(image, datasets.Image) and not _can_hold_images(image):
        raise RecipeError(
            f"--image_column {config.image_column} of {_source(config)} holds {image}, not images: "
            f"choose another of {rows.column_names}"
        )
    caption = rows.features[config.caption_column]
    if not _can_hold_captions(caption):
        raise RecipeError(
            f"--caption_column {config.caption_column} of {_source(config)} holds {caption}, neither strings nor lists "
            f"of strings: choose another of {rows.column_names}"
        )
    rows = rows.select_columns([config.image_column, config.caption_column])
    rows = rows.cast_column(config.image_column, datasets.Image(decode=False))
    if split is None and config.max_train_samples is not None and config.max_train_samples < len(rows):
        rows = rows.shuffle(seed=seed).select(range(config.max_train_samples))
    return rows


def _source(config: DataConfig) -> str:
    return (
        f"--dataset_name {config.dataset_name}" if config.dataset_name else f"--train_data_dir {config.train_data_dir}"
    )


def _load(config: DataConfig, cache_dir: str | None) -> datasets.DatasetDict:
    try:
        if config.dataset_name is not None:
            name = assets.resolve(config.dataset_name)
            builder = FILE_BUILDERS.get(Path(name).suffix)
            if builder and Path(name).is_file():
                return datasets.load_dataset(builder, data_files={"train": name}, cache_dir=cache_dir)
            return datasets.load_dataset(
                name, config.dataset_config_name, data_dir=config.train_data_dir, cache_dir=cache_dir
            )
        folder = Path(config.train_data_dir or "")
        if not folder.is_dir():
            raise RecipeError(f"--train_data_dir {folder}: no such folder")
        if not any(path.is_file() for path in folder.rglob("*")):
            raise RecipeError(f"--train_data_dir {folder} is empty: put images and a metadata.jsonl there")
        return datasets.load_dataset("imagefolder", data_files={"train": f"{folder}/**"}, cache_dir=cache_dir)
    except RecipeError:
        raise
    # Whatever `datasets` raises while it reads a person's files is about those files. It has no
    # common base class, so the error is passed on in one line with its own words.
    except Exception as error:
        words = " ".join(str(error).split())[:500]
        raise RecipeError(f"{_source(config)} cannot be read: {words or type(error).__name__}") from error


def _check_column(flag: str, column: str, rows: datasets.Dataset, config: DataConfig) -> None:
    if column in rows.column_names:
        return
    near = difflib.get_close_matches(column, rows.column_names, n=1, cutoff=0.5)
    hint = f"; nearest: {near[0]}" if near else ""
    metadata = ""
    if config.dataset_name is None and flag == "--caption_column" and rows.column_names == [config.image_column]:
        metadata = (
            '; captions come from a metadata.jsonl in that folder, with lines {"file_name": "a.png", "text": "…"}'
        )
    raise RecipeError(f"{flag} {column}: {_source(config)} has the columns {rows.column_names}{hint}{metadata}")


def _can_hold_captions(feature: object) -> bool:
    """Whether it is of strings or of lists of strings; one that is all null is found row by row."""
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "null")


def _can_hold_images(feature: object) -> bool:
    """Whether undecoded images can be read from this feature: encoded bytes, or {"bytes", "path"}."""
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, dict) and set(feature) >= {"bytes", "path"}
