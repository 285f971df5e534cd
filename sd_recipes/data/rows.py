"""Where rows come from: folders of images, data files, shards, the Hub. Columns are checked here."""

from __future__ import annotations

import difflib
import glob
import itertools
from pathlib import Path
from typing import Any

import datasets

from sd_recipes import assets
from sd_recipes.data.captions import caption_columns
from sd_recipes.data.folder import read_folder
from sd_recipes.data.parquet_files import load_parquet
from sd_recipes.data.shards import with_bytes
from sd_recipes.errors import RecipeError, one_line
from sd_recipes.recipe import DataSettings, DataSource, Recipe

FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
FOLDER_SHARDS = 64  # of a folder that is read as a stream
MAX_HELD_OUT_STREAM_ROWS = 1000  # a held-out split of a stream is kept in memory
SIZE_COLUMNS = ("height", "width", "original_height", "original_width")  # of the crop, and of the picture in its file
# A row of a latent cache holds these instead of an image (see latent_store.py).
MOMENTS_COLUMNS = ("moments", "moments_flipped", *SIZE_COLUMNS, "made_by")


def load_rows(
    config: DataSettings, *, split: str | None = None, cache_dir: str | None = None, seed: int | None = None
) -> datasets.Dataset:
    """Rows of all sources one after the other, with the image and caption columns checked.

    Images stay encoded: a row is {image_column: {"bytes", "path"}, caption columns: str or list of str}.
    `split` replaces the sources' own. `config.max_train_samples` is applied to the training split only,
    drawn by `seed`. Raises RecipeError if the data cannot be read, is empty, or lacks a column.
    """
    parts = load_sources(config, split=split, cache_dir=cache_dir)
    return join_rows(parts, None if split else config.max_train_samples, seed)


def join_rows(parts: list[datasets.Dataset], number: int | None, seed: int | None) -> datasets.Dataset:
    """The rows of all sources one after the other; `number` of them drawn by `seed`, where there are more."""
    rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if number is not None and number < len(rows):
        rows = rows.shuffle(seed=seed).select(range(number))
    return rows


def load_sources(
    config: DataSettings, *, split: str | None = None, cache_dir: str | None = None
) -> list[datasets.Dataset]:
    """The rows of each source, with the same columns in all. Raises RecipeError as `load_rows` does."""
    parts = []
    for source in config.sources:
        found = _load(source, config, cache_dir, streaming=False)
        rows = found[_split(found, source, split)]
        if len(rows) == 0:
            raise RecipeError(f"{source.flag} has no rows in split {split or source.train_split!r}")
        parts.append(_checked(rows, rows.features, source, config))
    for number, source in enumerate(config.sources[1:], start=1):
        try:
            parts[number] = parts[number].cast(parts[0].features)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{source.flag} has other columns than {config.sources[0].flag}: {error}") from None
    return parts


def load_streams(config: DataSettings, *, cache_dir: str | None = None) -> list[datasets.IterableDataset]:
    """The stream of each source, images undecoded, columns checked. Raises RecipeError as `load_rows` does."""
    streams = []
    for source in config.sources:
        found = _load(source, config, cache_dir, streaming=True)
        stream = found[_split(found, source, None)]
        # For files that do not state them, `datasets` infers them from the first rows when streams are joined.
        features = _guarded(source, lambda stream=stream: datasets.concatenate_datasets([stream]).features)
        streams.append(_checked(stream, features, source, config))
    return streams


def load_held_out_rows(config: Recipe, split: str, cache_dir: str | None) -> datasets.Dataset:
    """Rows of the first source's split `split`; for a stream the first 1,000, in memory. Raises RecipeError."""
    config = config.model_copy(update={"data_sources": [config.sources[0].model_copy(update={"train_split": split})]})
    if not config.streaming:
        return load_rows(config, split=split, cache_dir=cache_dir)
    stream = load_streams(config, cache_dir=cache_dir)[0]
    rows = _guarded(
        config.sources[0], lambda: [with_bytes(row) for row in itertools.islice(stream, MAX_HELD_OUT_STREAM_ROWS)]
    )
    return datasets.Dataset.from_list(rows, features=stream.features)


def is_local(source: DataSource) -> bool:
    """Whether a source's files are on this machine."""
    name = source.dataset_name and assets.resolve(source.dataset_name)
    return name is None or bool(glob.glob(name))


def _split(found: Any, source: DataSource, split: str | None) -> str:
    wanted = split or source.train_split
    if wanted not in found:
        raise RecipeError(f"{source.flag} has no split {wanted!r}: it has {sorted(map(str, found))}")
    return wanted


def _guarded(source: DataSource, read: Any) -> Any:
    """What `read` returns; its errors become a RecipeError about the source."""
    try:
        return read()
    except RecipeError:
        raise
    except StopIteration:  # raised where `datasets` looks at a file's first rows
        raise RecipeError(f"{source.flag} has a file without rows: remove it, or give a folder with rows") from None
    # Whatever `datasets` raises while it reads a user's files is about those files. Its errors have no
    # common base class, so each is passed on in one line with its own words.
    except Exception as error:
        told: BaseException = error
        while isinstance(told, datasets.exceptions.DatasetGenerationError) and told.__cause__ is not None:
            told = told.__cause__  # the cause says what went wrong
        words = one_line(told, 500)
        raise RecipeError(f"{source.flag} cannot be read: {words}") from error


def _load(source: DataSource, config: DataSettings, cache_dir: str | None, *, streaming: bool) -> Any:
    options: dict[str, Any] = {"cache_dir": cache_dir, "streaming": streaming}
    if source.dataset_name is not None:
        name = assets.resolve(source.dataset_name)
        is_address = "://" in name
        builder = FILE_BUILDERS.get(Path(name.partition("?")[0] if is_address else name).suffix)
        if builder and (is_address or "*" in name or Path(name).is_file()):
            for other in ("train_data_dir", "dataset_config_name", "dataset_revision"):
                if getattr(source, other) is not None:
                    raise RecipeError(f"{source.flag} names files, which --{other} contradicts: drop one")
            # For training, whatever the file's name: one called test.parquet would otherwise be a split `test`.
            files = {"train": name}
            if builder == "parquet":
                return _guarded(source, lambda: load_parquet(files, **options))
            return _guarded(source, lambda: datasets.load_dataset(builder, data_files=files, **options))
        if source.dataset_revision is not None and is_local(source):
            raise RecipeError(
                f"{source.flag} is on this machine and has no revisions: drop --dataset_revision "
                f"{source.dataset_revision}"
            )
        return _guarded(
            source,
            lambda: datasets.load_dataset(
                name,
                source.dataset_config_name,
                data_dir=source.train_data_dir,
                revision=source.dataset_revision,
                **options,
            ),
        )
    folder = Path(source.train_data_dir or "")
    if not folder.is_dir():
        raise RecipeError(f"--train_data_dir {folder}: no such folder")
    if not any(path.is_file() for path in folder.rglob("*")):
        raise RecipeError(f"--train_data_dir {folder} is empty: put images and a metadata.jsonl there")
    rows = read_folder(folder)
    if rows is not None:
        return {"train": rows.to_iterable_dataset(min(len(rows), FOLDER_SHARDS)) if streaming else rows}
    return _guarded(
        source, lambda: datasets.load_dataset("imagefolder", data_files={"train": f"{folder}/**"}, **options)
    )


def _checked(rows: Any, features: datasets.Features, source: DataSource, config: DataSettings) -> Any:
    """The rows with only the needed columns, images undecoded; a Dataset or an IterableDataset."""
    captions = caption_columns(config)
    images = [config.image_column]
    if config.image_column not in features and "moments" in features:
        images = [name for name in MOMENTS_COLUMNS if name in features]
    template = config.caption_template is not None
    flag = "--caption_template" if template else "--caption_columns" if config.caption_columns else "--caption_column"
    for owner, column in [*(("--image_column", name) for name in images), *((flag, name) for name in captions)]:
        _check_column(owner, column, list(features), source, config)
    if images == [config.image_column]:
        image = features[config.image_column]
        if not isinstance(image, datasets.Image) and not _can_hold_images(image):
            raise RecipeError(
                f"--image_column {config.image_column} of {source.flag} holds {image}, not images: "
                f"choose another of {list(features)}"
            )
    for column in captions:
        if not template and not _can_hold_captions(features[column]):
            raise RecipeError(
                f"{flag} {column} of {source.flag} holds {features[column]}, neither strings nor lists of strings: "
                f"choose another of {list(features)}"
            )
    rows = rows.select_columns([*images, *(name for name in captions if name not in images)])
    if images == [config.image_column]:
        rows = rows.cast_column(config.image_column, datasets.Image(decode=False))
    return rows


def _check_column(flag: str, column: str, columns: list[str], source: DataSource, config: DataSettings) -> None:
    if column in columns:
        return
    near = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
    hint = f"; nearest: {near[0]}" if near else ""
    metadata = ""
    if source.dataset_name is None and flag == "--caption_column" and set(columns) <= {config.image_column, "label"}:
        metadata = (
            '; captions come from a metadata.jsonl in that folder, with lines {"file_name": "a.png", "text": "…"}'
        )
    raise RecipeError(f"{flag} {column}: {source.flag} has the columns {columns}{hint}{metadata}")


def _can_hold_captions(feature: object) -> bool:
    """Whether it holds strings or lists of strings; a column that is all null is found row by row."""
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "null")


def _can_hold_images(feature: object) -> bool:
    """Whether undecoded images can be read from this feature: encoded bytes, or {"bytes", "path"}."""
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, dict) and set(feature) >= {"bytes", "path"}
