"""The columns of a source's rows: found, checked, and brought to what training reads.

That is the image, undecoded, {"bytes", "path"}; the columns that captions are made of; with --masked_loss, where some
row has one, the mask, as undecoded as the image; and, where a reader could not make a row whole, `DEFECT`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import pyarrow as pa

from sd_recipes.data.captions import DEFECT, caption_columns
from sd_recipes.data.encoded import Encoded, check_holds_pictures, encoded, found_or_named, is_empty
from sd_recipes.data.guard import guarded
from sd_recipes.data.mask_files import MaskFiles
from sd_recipes.data.picture_files import Missing, NotFound, PictureFinder
from sd_recipes.data.table_rows import picture_column
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import DataSettings, DataSource, MaskConfig

DEFAULT_MASK_COLUMN = MaskConfig.model_fields["mask_column"].default
LABEL = "label"  # the name of a picture's folder, as datasets' imagefolder calls it
SIZE_COLUMNS = ("height", "width", "original_height", "original_width")  # of the crop, and of the picture in its file
# A row of a latent cache holds these instead of an image (see latent_store.py).
MOMENTS_COLUMNS = ("moments", "moments_flipped", *SIZE_COLUMNS, "made_by")
MASK = "__mask__"  # the column with a picture's mask, {"bytes", "path"}, or None; one without either is none too
LATENT_MASK = "latent_mask"  # in a row of a latent cache: its mask at the latent's size, h * w bytes, or None
CHUNK_ROWS = 1000  # of a table in memory
LOOKED_AT = 16  # first rows, one of which has to name a picture
IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def columns_of(source: DataSource, config: DataSettings) -> list[str]:
    """The columns that a source's captions are made of. Raises RecipeError for a template that cannot be filled."""
    if source.caption_column and not config.caption_template and not config.caption_columns:
        return [source.caption_column]
    return caption_columns(config)


def rows_from(
    images: list[Encoded],
    columns: dict[str, list[Any]],
    defects: list[str | None],
    image_column: str,
    masks: list[Encoded | None] | None = None,
) -> datasets.Dataset:
    """Rows in memory of images, texts or lists of texts, what is wrong with each row, or None, and perhaps masks."""
    types = {image_column: IMAGE_TYPE}
    values: dict[str, list[Any]] = {image_column: images}
    defects = list(defects)
    for name, found in columns.items():
        types[name], values[name] = _of_one_type(name, found, defects)
    if any(defects):
        types[DEFECT], values[DEFECT] = pa.string(), defects
    if masks is not None and any(masks):
        types[MASK], values[MASK] = IMAGE_TYPE, masks
    schema = pa.schema(types)
    chunks = [
        pa.Table.from_pydict({name: values[name][start : start + CHUNK_ROWS] for name in types}, schema)
        for start in range(0, len(images), CHUNK_ROWS)
    ]
    features = datasets.Features.from_arrow_schema(schema)
    for name in {image_column, MASK} & types.keys():
        features[name] = datasets.Image(decode=False)
    # A random fingerprint saves hashing the table; nothing is cached under it.
    return datasets.Dataset(
        datasets.table.InMemoryTable(pa.concat_tables(chunks) if chunks else schema.empty_table()),
        info=datasets.DatasetInfo(features=features),
        fingerprint=datasets.fingerprint.generate_random_fingerprint(),
    )


def _of_one_type(name: str, values: list[Any], defects: list[str | None]) -> tuple[pa.DataType, list[Any]]:
    """A column as text, as lists if one is a list, or as it is if nothing in it is text; adds what does not fit."""
    kinds = {type(value) for value in values} - {type(None)}
    if kinds and not kinds & {str, list}:
        try:
            return pa.array(values).type, values
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            pass  # of mixed types: none of them is text
    texts = []
    for place, value in enumerate(values):
        parts = value if isinstance(value, list) else [value]
        if not all(part is None or isinstance(part, str) for part in parts):
            defects[place] = defects[place] or f"column {name} holds {value!r:.80}, where a caption is text"
            value = None
        texts.append(parts if value is not None and list in kinds else value)
    return pa.list_(pa.string()) if list in kinds else pa.string(), texts


def checked(
    rows: Any, features: datasets.Features, source: DataSource, config: DataSettings, finder: PictureFinder | None
) -> Any:
    """The rows, a Dataset or an IterableDataset, with only the columns that are read.

    What its image column names is looked for by `finder`, None for data that are elsewhere. Raises RecipeError.
    """
    captions = columns_of(source, config)
    if finder is not None and config.image_column not in features and "moments" not in features:
        paths = picture_column(list(features), config.image_column)
        if paths is not None and paths not in captions:
            rows = rows.rename_column(paths, config.image_column)
            features = rows.features
    images = [config.image_column]
    if config.image_column not in features and "moments" in features:
        kept = (*MOMENTS_COLUMNS, LATENT_MASK) if config.masked_loss else MOMENTS_COLUMNS
        images = [name for name in kept if name in features]
    elif config.masked_loss:
        rows = _with_masks(rows, source, config, finder)
        features = rows.features
    template, flag = config.caption_template is not None, caption_flag(config)
    for owner, column in [*(("--image_column", name) for name in images), *((flag, name) for name in captions)]:
        if _feature_at(features, column) is None:
            raise RecipeError(f"{owner} {column}: {source.flag} {has_columns(column, list(features))}")
    extra = [name for name in (MASK, DEFECT) if name in features]
    rows = rows.select_columns(
        [*images, *dict.fromkeys(_stored(features, name) for name in captions if name not in images), *extra]
    )
    if images == [config.image_column]:  # first, so that no row is decoded while it is gone through
        rows = _with_images(rows, features[config.image_column], source, config, finder)
        if config.masked_loss and finder is not None:
            rows = _with_masks_beside(rows, source, config)
    for column in captions:
        feature = _feature_at(features, column)
        of_list = isinstance(feature, datasets.List | datasets.LargeList)
        inner = feature.feature if of_list else feature
        text: Any = datasets.List(datasets.Value("string")) if of_list else datasets.Value("string")
        if column not in features or isinstance(inner, datasets.ClassLabel):
            make = partial(_text_in, column, "" if column in features else column.partition(".")[2], inner)
            rows = _replaced(rows, [_stored(features, column)], {column: text}, make)
        elif not template and not _can_hold_captions(feature):
            raise RecipeError(not_captions(flag, column, feature, source.flag))
    extra = [name for name in (MASK, DEFECT) if name in rows.features]
    rows = rows.select_columns([*images, *(name for name in captions if name not in images), *extra])
    if source.caption_column not in (None, config.caption_column) and captions == [source.caption_column]:
        rows = rows.rename_column(source.caption_column, config.caption_column)
    return rows


def caption_flag(config: DataSettings) -> str:
    """The flag that names the columns of the captions."""
    if config.caption_template is not None:
        return "--caption_template"
    return "--caption_columns" if config.caption_columns else "--caption_column"


def has_columns(wanted: str, columns: list[str]) -> str:
    """That a source lacks a column: which it has, and the nearest of them."""
    near = difflib.get_close_matches(wanted, columns, n=1, cutoff=0.5)
    return f"has the columns {columns}{f'; nearest: {near[0]}' if near else ''}"


def _feature_at(features: Any, name: str) -> Any:
    """The feature of a column or, under `outer.inner`, in a column of objects; None if there is none."""
    if name in features:
        return features[name]
    outer, dot, inner = name.partition(".")
    return _feature_at(features[outer], inner) if dot and isinstance(features.get(outer), dict) else None


def _stored(features: Any, name: str) -> str:
    """The column that holds `name`."""
    return name if name in features else name.partition(".")[0]


def _text_in(column: str, path: str, feature: Any, value: Any) -> dict[str, Any]:
    """The texts in a column's value, or in what an object holds under `path`; classes by their names."""
    for part in filter(None, path.split(".")):
        value = None if value is None else value[part]

    def text(each: Any) -> str | None:
        if each is None or isinstance(each, str):
            return each
        if isinstance(feature, datasets.ClassLabel):
            return None if each < 0 else feature.int2str(each)
        return str(each)

    return {column: list(map(text, value)) if isinstance(value, list) else text(value)}


def _replaced(rows: Any, old: list[str], features: dict[str, Any], make: Callable[..., dict[str, Any]]) -> Any:
    """The rows with columns made of each row's `old` ones; others of their names are replaced."""

    def of_row(row: dict[str, Any]) -> dict[str, Any]:
        return make(*(row[name] for name in old))

    if isinstance(rows, datasets.IterableDataset):
        kept = {name: feature for name, feature in rows.features.items() if name not in features}
        return rows.map(of_row, features=datasets.Features({**kept, **features}))
    made = rows.select_columns(old).map(
        of_row,
        remove_columns=old,
        features=datasets.Features(features),
        desc=f"Column {old[0]}",
        # Nothing would be found again under a hash of a function that holds a folder's files.
        load_from_cache_file=False,
        new_fingerprint=datasets.fingerprint.generate_random_fingerprint(),
    )
    others = [name for name in rows.column_names if name not in features]
    return datasets.concatenate_datasets([rows.select_columns(others), made], axis=1) if others else made


def _with_images(
    rows: Any, feature: Any, source: DataSource, config: DataSettings, finder: PictureFinder | None
) -> Any:
    """The rows with the image column as undecoded images, made of paths or of base64 where it holds these."""
    column = config.image_column
    if isinstance(feature, datasets.Image) or _can_hold_images(feature):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    elif not (_is_text(feature) or (isinstance(feature, dict) and "path" in feature)):
        raise RecipeError(
            f"--image_column {column} of {source.flag} holds {_in_words(feature)}, not images: choose another of "
            f"{list(rows.features)}"
        )
    first = [row[column] for row in guarded(source, lambda: list(rows.select_columns([column]).take(LOOKED_AT)))]
    is_image = isinstance(rows.features[column], datasets.Image)  # whose paths, of data elsewhere, are not files
    if is_image and (finder is None or not any(map(_names_a_file, first))):
        return rows
    for value in first:
        check_holds_pictures(value, column, source.flag, is_local=finder is not None)
    if reasons := _reasons(first, finder):
        raise RecipeError(
            f"--image_column {column} of {source.flag} names no picture: {reasons[0]}; choose another of "
            f"{list(rows.features)}, or say by --image_root where the paths begin"
        )

    def make(value: Any) -> dict[str, Any]:
        path = value.get("path") if isinstance(value, dict) else value
        try:
            return {column: encoded(value, finder), DEFECT: None}
        except Missing:  # told when the picture is read
            assert finder is not None
            assert path is not None
            return {column: {"bytes": None, "path": str(finder.root / path)}, DEFECT: None}
        except NotFound as error:
            return {column: {"bytes": None, "path": path}, DEFECT: str(error)}

    return _replaced(rows, [column], {column: datasets.Image(decode=False), DEFECT: datasets.Value("string")}, make)


def _with_masks(rows: Any, source: DataSource, config: DataSettings, finder: PictureFinder | None) -> Any:
    """The rows with the column `MASK`, made of the mask column as images are; as they are where there is none.

    A mask that is not found is told when it is read. Raises RecipeError.
    """
    column, features = config.mask_column, rows.features
    if MASK in features:
        return rows
    if column not in features:
        check_mask_column(config, list(features), source.flag)
        return rows
    feature = features[column]
    is_image = isinstance(feature, datasets.Image) or _can_hold_images(feature)
    if is_image:
        rows = rows.cast_column(column, datasets.Image(decode=False))
        first = [row[column] for row in guarded(source, lambda: list(rows.select_columns([column]).take(LOOKED_AT)))]
        if finder is None or not any(map(_names_a_file, first)):
            return rows.rename_column(column, MASK)
    elif not (_is_text(feature) or (isinstance(feature, dict) and "path" in feature)):
        raise RecipeError(
            f"--mask_column {column} of {source.flag} holds {_in_words(feature)}, not images: choose another of "
            f"{list(features)}"
        )

    def make(value: Any) -> dict[str, Any]:
        return {MASK: None if is_empty(value) else found_or_named(value, finder)}

    return _replaced(rows, [column], {MASK: datasets.Image(decode=False)}, make)


def _with_masks_beside(rows: Any, source: DataSource, config: DataSettings) -> Any:
    """The rows, whose masks are those beside their pictures where these are files and the column has none."""
    column, files = config.image_column, MaskFiles()
    first = guarded(source, lambda: list(rows.select_columns([column]).take(LOOKED_AT)))
    if not any(_names_a_file(row[column]) for row in first):
        return rows
    columns = [column, MASK] if MASK in rows.features else [column]

    def make(image: Any, mask: Any = None) -> dict[str, Any]:
        return {MASK: files.of(image["path"]) if is_empty(mask) and _names_a_file(image) else mask}

    return _replaced(rows, columns, {MASK: datasets.Image(decode=False)}, make)


def check_mask_column(config: DataSettings, columns: list[str], place: str) -> None:
    """Raises RecipeError for a mask column that was asked for and is not there; the default one may lack."""
    if config.mask_column not in columns and config.mask_column != DEFAULT_MASK_COLUMN:
        raise RecipeError(f"--mask_column {config.mask_column}: {place} {has_columns(config.mask_column, columns)}")


def _is_text(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def with_lists(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """The rows with a column of texts as one of lists of texts."""
    if not _is_text(rows.features.get(column)):
        return rows
    lists = {column: datasets.List(datasets.Value("string"))}
    return _replaced(rows, [column], lists, lambda text: {column: None if text is None else [text]})


def _names_a_file(value: Any) -> bool:
    """Whether an image has no bytes, but a path on this machine."""
    return value is not None and value["bytes"] is None and "://" not in (value["path"] or "://")


def _reasons(values: list[Any], finder: PictureFinder | None) -> list[str]:
    """Why none of these values stands for a picture; empty if one does."""
    reasons = []
    for value in values:
        try:
            encoded(value, finder)
        except NotFound as error:
            reasons.append(str(error))
        else:
            return []
    return reasons


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


def _in_words(feature: Any) -> str:
    return f"an object with the keys {', '.join(feature)}" if isinstance(feature, dict) else str(feature)


def not_captions(flag: str, column: str, feature: Any, place: str) -> str:
    """What a column holds instead of captions, and how to make some of it."""
    words = f"{flag} {column} of {place} holds {_in_words(feature)}"
    if isinstance(feature, dict):
        inner = f"{column}.{'caption' if 'caption' in feature else next(iter(feature), 'KEY')}"
        return (
            f"{words}: choose one of its texts, as in --caption_column {inner} or --caption_template "
            f"'a photo, {{{inner}}}'"
        )
    return (
        f"{words}, neither strings nor lists of strings: choose another column, or put it into words, as in "
        f"--caption_template 'number {{{column}}}'"
    )
