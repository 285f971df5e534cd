"""A folder of images with metadata files, as rows.

What datasets' imagefolder does, read in one pass over the folder: with 100,000 images that takes
a second instead of twenty, and images without a row are reported instead of silently dropped.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from sd_recipes.errors import RecipeError, one_line

logger = logging.getLogger(__name__)


def _read_csv(path: Path) -> pa.Table:
    # Quoted captions may have line breaks; pyarrow would split rows there in files of more than a megabyte.
    return pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))


METADATA_READERS: dict[str, Any] = {
    "metadata.jsonl": pyarrow.json.read_json,
    "metadata.csv": _read_csv,
    "metadata.parquet": pyarrow.parquet.read_table,
}
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".ppm", ".pgm",
    ".pbm", ".pnm",
}  # fmt: skip
IMAGE_COLUMN = "image"  # as imagefolder calls it
NAMED = 5  # file names that a message lists


def read_folder(folder: Path) -> datasets.Dataset | None:
    """Rows of all metadata files under `folder`: {"image": {"bytes": None, "path"}, the other columns}.

    None if there is no metadata file with a `file_name` column. Rows whose file is missing stay, to be
    counted as bad when they are read. Raises RecipeError for a metadata file that cannot be read or
    that names a file outside the folder.
    """
    files, metadata = _list_files(folder)
    tables = [table for path in metadata if (table := _read_metadata(path, folder)) is not None]
    if not tables:
        return None
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowInvalid as error:
        raise RecipeError(f"--train_data_dir {folder}: the metadata files do not agree: {error}") from None
    named = set(table.column(IMAGE_COLUMN).to_pylist())
    _tell("images have no row in a metadata file and are not used", sorted(files - named))
    _tell("rows of the metadata files have no image", sorted(named - files))
    paths = table.column(IMAGE_COLUMN).cast(pa.string())
    images = pa.chunked_array(
        [
            pa.StructArray.from_arrays([pa.nulls(len(part), pa.binary()), part], ["bytes", "path"])
            for part in paths.chunks
        ],
        type=pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    table = table.set_column(table.schema.get_field_index(IMAGE_COLUMN), IMAGE_COLUMN, images)
    features = datasets.Features.from_arrow_schema(table.drop_columns([IMAGE_COLUMN]).schema)
    features[IMAGE_COLUMN] = datasets.Image(decode=False)
    features = datasets.Features({name: features[name] for name in table.column_names})
    # A random fingerprint saves hashing the table; nothing is cached under it.
    return datasets.Dataset(
        datasets.table.InMemoryTable(table.replace_schema_metadata()),
        info=datasets.DatasetInfo(features=features),
        fingerprint=datasets.fingerprint.generate_random_fingerprint(),
    )


def _list_files(folder: Path) -> tuple[set[str], list[Path]]:
    """Paths of the images under `folder`, and its metadata files."""
    images: set[str] = set()
    metadata: list[Path] = []
    for place, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if name in METADATA_READERS:
                metadata.append(Path(place, name))
            elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                images.add(os.path.join(place, name))
    return images, sorted(metadata)


def _read_metadata(path: Path, folder: Path) -> pa.Table | None:
    try:
        table = METADATA_READERS[path.name](path)
    except (pa.ArrowException, OSError) as error:
        raise RecipeError(
            f"{path} cannot be read: {one_line(error)}; every line is one row, and a column has one type"
        ) from None
    if "file_name" not in table.column_names:
        return None
    names = table.column("file_name").to_pylist()
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise RecipeError(f"{path}: row {number} has the file_name {name!r}: give the image's name")
        if ".." in PurePosixPath(name).parts or os.path.isabs(name):
            raise RecipeError(
                f"{path}: row {number} names {name!r}, outside of {folder}: images must lie in the folder"
            )
    place = str(path.parent)
    if IMAGE_COLUMN in table.column_names:
        table = table.drop_columns([IMAGE_COLUMN])
    paths = pa.array([os.path.join(place, name) for name in names], pa.string())
    return table.set_column(table.schema.get_field_index("file_name"), IMAGE_COLUMN, paths)


def _tell(what: str, names: list[str]) -> None:
    if names:
        some = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
        logger.warning("%d %s: %s", len(names), what, some)
