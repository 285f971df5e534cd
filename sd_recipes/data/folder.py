"""A folder of pictures as rows: captions in tables or in files beside the pictures, or their names.

Read in one pass over the folder, without datasets' imagefolder, which needs twenty times as long for 100,000 pictures
and silently drops those without a row.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from sd_recipes.data.columns import LABEL, check_mask_column, columns_of, has_columns, rows_from
from sd_recipes.data.encoded import Encoded
from sd_recipes.data.guard import without_rows
from sd_recipes.data.mask_files import MaskFiles, without_masks
from sd_recipes.data.picture_files import Listing, PictureFinder
from sd_recipes.data.recognised import Recognised
from sd_recipes.data.side_captions import SIDE_SUFFIXES, SideCaptions, find_side_captions
from sd_recipes.data.splits import SPLITS, TRAIN, split_of_folder
from sd_recipes.data.table_rows import DEFAULT_IMAGE_COLUMN, image_root, picture_column, read_rows
from sd_recipes.data.tables import PARQUET, PATH_KEY, TABLE_SUFFIXES, Table
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import DataSettings, DataSource

REPEATS = re.compile(r"(\d{1,3})_(.+)")  # with more digits it is rather a year
TEXT_COLUMNS = ("text", "caption", "txt")  # what the text in a file beside a picture may be asked for as
METADATA = "metadata"  # a table of this name is datasets' imagefolder's, whose column `file_name` names the pictures

Splits = dict[str, datasets.Dataset]


@dataclass
class Candidate:
    """A table among the pictures: the column that says which picture each row is, and why it does not fit, if so."""

    table: Table
    pictures: str
    unfit: str = ""

    @property
    def place(self) -> tuple[Path, str]:
        """Its folder, and the split that its name says: two that fit contradict each other if they share both."""
        return self.table.path.parent, SPLITS.get(self.table.path.stem.lower(), "")


class PictureFolder:
    """A folder with pictures, and their captions: in tables, in files beside them, or in names."""

    def __init__(
        self, root: Path, listing: Listing, source: DataSource, config: DataSettings, *, repeats: bool = True
    ) -> None:
        self.root, self.listing, self.source, self.config = root, listing, source, config
        self.repeats = repeats and config.folder_repeats
        self.columns = columns_of(source, config)
        self.recognised = Recognised("")
        self.unfit: list[str] = []  # in words, why tables do not fit
        for what, number in listing.passed_over.items():
            self.recognised.notes.append(f"{number:,} {what} are passed over")
        self._note("links lead out of the folder and are not followed (--follow_links)", listing.links_outside)
        strange = {path for path in listing.pictures if not _is_utf8(path)}
        self._note("pictures have names that are not UTF-8 and are not used: rename them", sorted(map(ascii, strange)))
        self.pictures = [path for path in listing.pictures if path not in strange]
        plain = without_masks(self.pictures)
        masks = sorted(set(self.pictures).difference(plain))
        if config.masked_loss:
            self.pictures = plain
            self._note("pictures are masks of others", masks)
        else:
            self._note("pictures are named like masks of others (--masked_loss takes them for that)", masks)

    def read(self) -> Splits | None:
        """Its rows by split; None where nothing looks like captions. Raises RecipeError for doubts and damage."""
        if self.config.caption_from:
            return self._by_name()
        extension = self.source.caption_extension or self.config.caption_extension
        if extension is None and (found := self._in_tables()):
            return found
        if self.columns == [LABEL]:
            return self._by_name()
        if any(name.startswith("json.") for name in self.columns):
            extension = extension or ".json"
        own = self.source.caption
        side = find_side_captions(self.listing, extension, self.source.flag, required=own is None)
        if side is None and own is not None:
            side = SideCaptions(extension or ".txt", {}, [])
        if side is not None:
            self._note("tables are passed over", list(map(str, self._table_files())))
            return self._beside(side)
        if self.unfit:
            raise RecipeError(
                f"{self.source.flag} has {len(self.pictures):,} pictures and no captions for them: "
                f"{'; '.join(self.unfit)}"
            )
        return None

    def _in_tables(self) -> Splits | None:
        """Rows of the tables that fit; None if none does. Raises RecipeError where two contradict each other."""
        candidates = [candidate for path in self._table_files() if (candidate := self._candidate(path))]
        fitting = [candidate for candidate in candidates if not candidate.unfit]
        for one, other in itertools.combinations(fitting, 2):
            if one.place == other.place:
                raise RecipeError(
                    f"{one.table.path} and {other.table.path} both say which caption a picture has: choose one, as in "
                    f"--dataset_name {one.table.path}"
                )
        self.unfit = [candidate.unfit for candidate in candidates if candidate.unfit]
        if not fitting:
            return None
        self._note("tables do not fit and are passed over", self.unfit)
        tables = set(map(str, self._table_files()))
        texts = [path for path in self.listing.with_suffix(*SIDE_SUFFIXES) if path not in tables]
        self._note("caption files beside the pictures are passed over for the table (--caption_extension)", texts)
        return self._of_tables(fitting)

    # Names

    def _by_name(self) -> Splits:
        """Rows whose caption is the name of the picture's file or folder, or that have only its label."""
        columns: dict[str, list[Any]] = {}
        self.recognised.captions = "the name of each picture's folder, as `label`"
        if self.config.caption_from:
            self.recognised.captions = f"the name of each picture's {self.config.caption_from}"
            columns = {self.config.caption_column: [self._name_of(path) for path in self.pictures]}
        self._note("other files that may hold captions are passed over", self.listing.with_suffix(*SIDE_SUFFIXES))
        return self._rows(self.pictures, columns, [None] * len(self.pictures))

    def _name_of(self, path: str) -> str:
        if self.config.caption_from == "file":
            return os.path.splitext(os.path.basename(path))[0]
        return self._label({"bytes": None, "path": path}) or folder_name(str(self.root / "picture"), self.config)

    # Files beside the pictures

    def _beside(self, side: SideCaptions) -> Splits:
        """Rows of the pictures with a caption file, or of all where there is a caption for the others."""
        without = [path for path in self.pictures if path not in side.of_picture]
        pictures, own = self.pictures, self.source.caption
        if own is not None:
            self._note(f"pictures have no {side.suffix} file and get the caption {own!r}", without)
        elif self.config.blank_captions == "empty":
            self._note(f"pictures have no {side.suffix} file and get the empty caption", without)
        elif without and self.config.blank_captions == "error":
            raise RecipeError(
                f"{len(without):,} pictures have no {side.suffix} file (--blank_captions error): {without[0]}"
            )
        else:
            pictures = [path for path in pictures if path in side.of_picture]
            self._note(
                f"pictures have no {side.suffix} file and are not used (--blank_captions empty uses them)", without
            )
        self._note(f"{side.suffix} files have no picture", side.without_picture)
        for suffix in SIDE_SUFFIXES:
            if suffix != side.suffix:
                words = f"{suffix} files are passed over (--caption_extension {suffix} reads them)"
                self._note(words, self.listing.with_suffix(suffix))
        unknown = [name for name in self.columns if name not in (LABEL, *TEXT_COLUMNS)]
        if own is not None and not self.config.caption_template:  # a whole caption, whatever other sources call theirs
            unknown = []
        if unknown and side.suffix != ".json":
            raise RecipeError(
                f"{self.source.flag} has a text in each {side.suffix} file, the column `text`, and is asked for "
                f"{', '.join(map(repr, unknown))}: ask for `text`"
            )
        columns, defects = side.read(
            pictures,
            [name for name in self.columns if name != LABEL],
            as_lines=self.config.caption_lines == "several",
            encoding=self.config.text_encoding,
        )
        self.recognised.captions = f"{side.suffix} files beside the pictures" if side.of_picture else f"{own!r} for all"
        several = sum(isinstance(value, list) for values in columns.values() for value in values)
        if several:
            self.recognised.captions += f", {several:,} of several lines, of which one is drawn (--caption_lines)"
        if own is not None:
            for values in columns.values():
                values[:] = [
                    value if path in side.of_picture else own for path, value in zip(pictures, values, strict=True)
                ]
        return self._rows(pictures, columns, defects)

    # Tables

    def _table_files(self) -> list[Path]:
        """Files that may be tables: not a .json beside a picture, which holds that picture's caption."""
        stems = {os.path.splitext(path)[0] for path in self.listing.pictures}
        paths = self.listing.with_suffix(*TABLE_SUFFIXES)
        return sorted(
            Path(path) for path in paths if not (path.endswith(".json") and os.path.splitext(path)[0] in stems)
        )

    def _candidate(self, path: Path) -> Candidate | None:
        """Whether the table in a file has a column of pictures and those of the captions; None for rows of its own.

        Raises RecipeError for a table of datasets' imagefolder that cannot be read.
        """
        table = Table(path, self.config.text_encoding)
        try:
            columns = table.columns
        except RecipeError as error:
            if is_metadata(path):
                raise
            return Candidate(table, "", str(error))
        pictures = picture_column(columns, PATH_KEY if is_metadata(path) else self.config.image_column)
        if pictures is not None and not table.is_text(pictures):
            pictures = None
        if pictures is None and table.kind in PARQUET and not is_metadata(path):  # the pictures are in it, if anywhere
            return None
        if pictures is None:
            words = f"{path} has no column of paths"
            if is_metadata(path):
                words = (
                    f"{path} has no column `{PATH_KEY}`, which names the pictures in a table of this name: rename the "
                    "one that does, or the table"
                )
            hint = f": its first line looks like a row: add one that names them, as `{PATH_KEY},text`"
            return Candidate(table, "", f"{words} (its columns: {columns}){hint if table.looks_headless else ''}")
        for name in self.columns:
            if name != LABEL and not table.has(name):
                return Candidate(
                    table, pictures, f"{path}, asked for the column {name!r}, {has_columns(name, columns)}"
                )
        return Candidate(table, pictures)

    def _of_tables(self, candidates: list[Candidate]) -> Splits:
        """Rows of all tables, one after the other."""
        images: list[Encoded] = []
        masks: list[Encoded | None] = []
        columns: dict[str, list[Any]] = {name: [] for name in self.columns}
        defects: list[str | None] = []
        splits: list[str] = []
        lacking: list[str] = []
        lengths: list[int] = []
        nearly = 0
        for candidate in candidates:
            table = candidate.table
            self._check_image_column(DEFAULT_IMAGE_COLUMN if is_metadata(table.path) else candidate.pictures)
            finder = PictureFinder(
                image_root(self.source) or table.path.parent,
                within=None if self.source.image_root else self.root,
                follows_links=self.config.follow_links or not self.listing.links_outside,
                pictures=self.pictures,
            )
            wanted = [name for name in self.columns if name != LABEL or name in table.columns]
            check_mask_column(self.config, table.columns, str(table.path))
            rows = read_rows(table, candidate.pictures, wanted, finder, self.config)
            images += rows.images
            masks += rows.masks
            defects += rows.defects
            for name in self.columns:
                columns[name] += rows.columns.get(name) or [self._label(image) for image in rows.images]
            splits += [candidate.place[1]] * len(rows.images)
            lacking += rows.lacking
            lengths.append(len(rows.images))
            nearly += finder.nearly
        if not images:
            raise without_rows(self.source)
        paths = [image["path"] or "" for image in images]
        named = set(paths)
        if len(candidates) > 1:
            self._check_named_once(candidates, paths, lengths)
        names = ", ".join(os.path.relpath(candidate.table.path, self.root) for candidate in candidates)
        self.recognised.captions = f"the table {names}" if len(candidates) == 1 else f"the tables {names}"
        self._note(
            "pictures have no row in a table and are not used", [path for path in self.pictures if path not in named]
        )
        self._note("rows of a table have no picture", lacking)
        self.recognised.note_nearly(nearly)
        return self._split(images, columns, defects, splits, masks)

    def _check_named_once(self, candidates: list[Candidate], paths: list[str], lengths: list[int]) -> None:
        """Raises RecipeError if a picture is named by two tables."""
        named_by: dict[str, Candidate] = {}
        start = 0
        for candidate, length in zip(candidates, lengths, strict=True):
            own = set(filter(None, paths[start : start + length]))
            start += length
            for path in own:
                other = named_by.setdefault(path, candidate)
                if other is not candidate:
                    raise RecipeError(
                        f"{other.table.path} and {candidate.table.path} both name {path}: choose one of the tables, as "
                        f"in --dataset_name {candidate.table.path}"
                    )

    # Rows

    def _rows(self, pictures: list[str], columns: dict[str, list[Any]], defects: list[str | None]) -> Splits:
        """Rows of pictures, each as often as its folder's name says, and with that name where it is asked for."""
        self._check_image_column(DEFAULT_IMAGE_COLUMN)
        images: list[Encoded] = [{"bytes": None, "path": path} for path in pictures]
        if LABEL in self.columns:
            columns = {**columns, LABEL: [self._label(image) for image in images]}
        files = MaskFiles()
        masks = [files.of(path) if self.config.masked_loss else None for path in pictures]
        return self._split(images, columns, defects, [""] * len(images), masks, repeats=self.repeats)

    def _check_image_column(self, name: str) -> None:
        """Raises RecipeError if another image column than the one there is was asked for."""
        if self.config.image_column not in (name, DEFAULT_IMAGE_COLUMN):
            words = has_columns(self.config.image_column, [name, *self.columns])
            raise RecipeError(
                f"--image_column {self.config.image_column}: {self.source.flag} {words}; its pictures are files: drop "
                "--image_column"
            )

    def _label(self, image: Encoded) -> str | None:
        """The name of the picture's folder; None for one that lies in the folder itself."""
        path = image["path"]
        if path is None or os.path.dirname(path) == str(self.root):
            return None
        name = folder_name(path, self.config)
        return None if name.lower() in SPLITS else name

    def _split(
        self,
        images: list[Encoded],
        columns: dict[str, list[Any]],
        defects: list[str | None],
        given: list[str],
        masks: list[Encoded | None],
        *,
        repeats: bool = False,
    ) -> Splits:
        """The rows of each split: the one that is `given`, or that the picture's folder is named after."""
        begin = str(self.root) + os.sep
        found = [
            name or split_of_folder((image["path"] or "").removeprefix(begin))
            for name, image in zip(given, images, strict=True)
        ]
        if TRAIN not in found:  # the rest is for training, unless there is a folder for it
            found = [name or TRAIN for name in found]
        unused = [str(image["path"]) for image, name in zip(images, found, strict=True) if not name]
        self._note("pictures lie beside the folder for training and are not used", unused)
        splits = {}
        for split in sorted(set(filter(None, found))):
            numbers = [number for number, name in enumerate(found) if name == split]
            rows = rows_from(
                [images[number] for number in numbers],
                {column: [values[number] for number in numbers] for column, values in columns.items()},
                [defects[number] for number in numbers],
                self.config.image_column,
                [masks[number] for number in numbers],
            )
            splits[split] = (
                self._repeated(rows, [str(images[number]["path"]) for number in numbers]) if repeats else rows
            )
        return splits

    def _repeated(self, rows: datasets.Dataset, paths: list[str]) -> datasets.Dataset:
        """The rows, each as often as its picture's folder is named to be repeated."""
        folders = Counter(map(os.path.dirname, paths))
        repeats = {folder: int(found[1]) for folder in folders if (found := self._repeats(folder))}
        for folder, number in repeats.items():
            self.recognised.notes.append(
                f"{os.path.relpath(folder, self.root)}: {folders[folder]:,} pictures, each {number} times an epoch "
                "(--no-folder_repeats)"
            )
        if not repeats:
            return rows
        return rows.select(np.repeat(np.arange(len(rows)), [repeats.get(os.path.dirname(path), 1) for path in paths]))

    def _repeats(self, folder: str) -> re.Match[str] | None:
        return REPEATS.fullmatch(os.path.basename(folder)) if folder != str(self.root) else None

    def _note(self, what: str, paths: Sequence[str]) -> None:
        begin = str(self.root) + os.sep
        self.recognised.note(what, [path.removeprefix(begin) for path in paths])


def is_metadata(path: Path) -> bool:
    """Whether a table is datasets' imagefolder's, by its name."""
    return path.stem == METADATA


def folder_name(path: str, config: DataSettings) -> str:
    """The name of a file's folder, without the number of its repeats."""
    name = os.path.basename(os.path.dirname(os.path.abspath(path)))
    found = REPEATS.fullmatch(name) if config.folder_repeats else None
    return found[2] if found else name


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
