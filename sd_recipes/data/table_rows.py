"""Tables that point to pictures, or hold them: their rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_recipes.data.encoded import Encoded, check_holds_pictures, encoded, found_or_named, is_empty
from sd_recipes.data.mask_files import MaskFiles
from sd_recipes.data.picture_files import Missing, NotFound, Outside, PictureFinder
from sd_recipes.data.tables import PATH_KEY, Table
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import DataConfig, DataSource, MaskConfig

DEFAULT_IMAGE_COLUMN = DataConfig.model_fields["image_column"].default
# Columns that usually hold a picture's path, in order of preference.
PATH_COLUMNS = (
    PATH_KEY, DEFAULT_IMAGE_COLUMN, "image_path", "image_file", "image_name", "img", "img_path", "path", "file",
    "file_path", "filepath", "filename", "name",
)  # fmt: skip


@dataclass
class TableRows:
    """Rows of one table: images, masks, columns, and what is wrong with each row, or None.

    A missing file is not: that is told when the picture is read.
    """

    images: list[Encoded]
    masks: list[Encoded | None]
    columns: dict[str, list[Any]]
    defects: list[str | None]
    lacking: list[str]  # the names of pictures that were not found


def image_root(source: DataSource) -> Path | None:
    """The folder in which a source's relative paths begin, if it is given. Raises RecipeError if there is none."""
    if source.image_root is None:
        return None
    root = Path(source.image_root).expanduser()
    if not root.is_dir():
        raise RecipeError(f"--image_root {source.image_root}: no such folder")
    return root


def picture_column(columns: list[str], image_column: str) -> str | None:
    """The column with the pictures, or their paths: --image_column or, by default, one of a usual name, in any case."""
    if image_column in columns:
        return image_column
    usual = PATH_COLUMNS if image_column == DEFAULT_IMAGE_COLUMN else (PATH_KEY,)
    known = {name.lower(): name for name in reversed(columns)}
    return next((known[name] for name in usual if name in known), None)


def read_rows(table: Table, pictures: str, columns: list[str], finder: PictureFinder, config: MaskConfig) -> TableRows:
    """The rows of a table whose column `pictures` says which picture each is. Raises RecipeError."""
    has_masks = config.masked_loss and config.mask_column in table.columns
    wanted = dict.fromkeys([pictures, *columns, *([config.mask_column] if has_masks else [])])
    found = table.read(list(wanted))
    values = found[pictures]
    first = next((value for value in values if value is not None), None)
    check_holds_pictures(first, pictures, str(table.path), is_local=True)
    rows = TableRows([], [], {name: found[name] for name in columns}, [], [])
    reason = ""
    for number, value in enumerate(values, start=1):
        defect = None
        try:
            image = encoded(value, finder)
        except Outside:
            raise RecipeError(
                f"{table.path}: row {number} names {value!r}, outside of {finder.within}: images must lie in the "
                f"folder; a table that may name any file is given by itself, as --dataset_name {table.path}"
            ) from None
        except NotFound as error:
            image = {"bytes": None, "path": str(finder.root / value) if isinstance(value, str) else None}
            defect = None if isinstance(error, Missing) else str(error)
            rows.lacking.append(str(image["path"] or f"row {number}"))
            reason = reason or str(error)
        rows.images.append(image)
        rows.defects.append(defect)
    if config.masked_loss:
        named, files = found[config.mask_column] if has_masks else [None] * len(values), MaskFiles()
        rows.masks = [
            files.of(image["path"]) if is_empty(name) else found_or_named(name, finder)
            for name, image in zip(named, rows.images, strict=True)
        ]
    else:
        rows.masks = [None] * len(values)
    if rows.images and len(rows.lacking) == len(rows.images):
        place = finder.place_of(first)
        hint = f"; there is one of that name in {place}: give --image_root {place}" if place else ""
        raise RecipeError(
            f"{table.path}: none of its {len(values)} rows has its picture; the first: {reason} (column "
            f"{pictures}; --image_root says where the paths begin){hint}"
        )
    return rows
