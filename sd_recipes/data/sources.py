"""What a source is, told by what lies there: pictures, a table, shards, a saved data set, or a name on the Hub."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import yaml
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.arrow.arrow import Arrow

from sd_recipes import assets
from sd_recipes.data.columns import caption_flag, check_mask_column, columns_of, has_columns, rows_from
from sd_recipes.data.folder import PictureFolder, folder_name
from sd_recipes.data.guard import guarded, without_rows
from sd_recipes.data.parquet_files import ParquetFiles, load_files
from sd_recipes.data.picture_files import IMAGE_SUFFIXES, Listing, PictureFinder, list_files, suffix_of
from sd_recipes.data.recognised import Recognised, some
from sd_recipes.data.side_captions import SIDE_SUFFIXES
from sd_recipes.data.splits import TRAIN, deal, split_in
from sd_recipes.data.table_rows import image_root, picture_column, read_rows
from sd_recipes.data.tables import DELIMITED, JSON, PARQUET, Table
from sd_recipes.data.tars import TAR_SUFFIXES, load_tars
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import DataSettings, DataSource

FOLDER_SHARDS = 64  # of rows in memory that are read as a stream
ARROW = (".arrow",)
SHARDS = (*TAR_SUFFIXES, *PARQUET, *ARROW)  # files of rows, of which there may be many
TABLES = (*DELIMITED, *JSON)
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")  # of WebDataset: {00000..00010}
ARCHIVES = (".zip", ".rar", ".7z")
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what `save_to_disk` writes


@dataclass
class Opened:
    """A source's rows or streams by split, columns not yet checked, and what it turned out to be."""

    splits: dict[str, Any]
    recognised: Recognised
    finder: PictureFinder | None  # of what its image column names; None where that is found already, or elsewhere


def is_local(source: DataSource) -> bool:
    """Whether a source's files are on this machine."""
    name = place_of(source)
    return "://" not in name and (os.path.exists(name) or bool(local_files(name)))


def place_of(source: DataSource) -> str:
    """The folder, files, address or name on the Hub that a source is, `~` and embedded names filled in."""
    name = source.dataset_name if source.dataset_name is not None else source.train_data_dir
    return os.path.expanduser(assets.resolve(name or ""))


def local_files(name: str) -> list[str]:
    """The files that a path, a glob, or a path with `{00000..00010}` stands for. Raises RecipeError if one lacks."""
    if os.path.isfile(name):
        return [name]
    names = expanded(name)
    found = [sorted(path for path in glob.glob(each, recursive=True) if os.path.isfile(path)) for each in names]
    if len(names) > 1 and (missing := [each for each, paths in zip(names, found, strict=True) if not paths]):
        raise RecipeError(f"{name} stands for {len(names)} files, and {missing[0]} is not there")
    return list(itertools.chain(*found))


def expanded(name: str) -> list[str]:
    """The names that `{00000..00010}` in a name stands for. Raises RecipeError where it counts down."""
    found = BRACES.search(name)
    if found is None:
        return [name]
    first, last = found[1], found[2]
    if int(first) > int(last):
        raise RecipeError(f"{name}: {found.group()} counts from a number down to a smaller one: exchange them")
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [each for number in numbers for each in expanded(f"{name[: found.start()]}{number}{name[found.end() :]}")]


def open_source(
    source: DataSource, config: DataSettings, cache_dir: str | None, *, streaming: bool, repeats: bool = True
) -> Opened:
    """The rows of a source by split, or its streams; each picture once, unless its folder's name `repeats` it.

    Raises RecipeError if there are none, or they cannot be read.
    """
    opened = _Opening(source, config, cache_dir, streaming, repeats).open()
    if config.caption_from and not opened.recognised.has_names:
        raise RecipeError(
            f"--caption_from {config.caption_from} takes names of picture files, and {source.flag} is "
            f"{opened.recognised.layout}: name the captions' column by --caption_column"
        )
    return opened


class _Opening:
    def __init__(
        self, source: DataSource, config: DataSettings, cache_dir: str | None, streaming: bool, repeats: bool
    ) -> None:
        self.source, self.config, self.cache_dir, self.streaming = source, config, cache_dir, streaming
        self.repeats = repeats
        self.name = place_of(source)

    def open(self) -> Opened:
        if "://" in self.name:
            self._refuse("names an address", "train_data_dir", "dataset_config_name", "dataset_revision")
            suffix = _kind(self.name.partition("?")[0])
            if suffix in SHARDS:
                return self._shards({TRAIN: expanded(self.name)}, Recognised(f"{suffix} files at an address"), None)
            raise RecipeError(f"{self.source.flag}: of addresses, only those of {', '.join(SHARDS)} files are read")
        if os.path.isdir(self.name):
            return self._in_folder(Path(self.name))
        if files := local_files(self.name):
            return self._files(files)
        if self.source.dataset_name is None or self._looks_like_path():
            raise RecipeError(f"{self.source.flag}: no such file or folder{self._near()}")
        return self._hub()

    def _looks_like_path(self) -> bool:
        name = self.source.dataset_name or ""
        return name.startswith(("/", ".", "~")) or name.count("/") > 1 or _kind(name) != "" or "*" in name

    def _near(self) -> str:
        """What is there of a path that is not."""
        there = next((place for place in Path(self.name).absolute().parents if place.is_dir()), None)
        return f" ({there} is there)" if there and there != Path("/") else ""

    def _refuse(self, why: str, *names: str) -> None:
        for name in names:
            if getattr(self.source, name) is not None and (name != "train_data_dir" or self.source.dataset_name):
                raise RecipeError(f"{self.source.flag} {why}, which --{name} contradicts: drop one")

    # The Hub

    def _hub(self) -> Opened:
        found = self._load(
            self.name,
            data_dir=self.source.train_data_dir if self.source.dataset_name else None,
            revision=self.source.dataset_revision,
        )
        return Opened(dict(found), Recognised("a data set of the Hub"), None)

    def _load(self, name: str, **options: Any) -> Any:
        options |= {"cache_dir": self.cache_dir, "streaming": self.streaming}
        return guarded(self.source, lambda: datasets.load_dataset(name, self.source.dataset_config_name, **options))

    # Files

    def _files(self, files: list[str]) -> Opened:
        self._refuse("names files", "train_data_dir", "dataset_config_name", "dataset_revision")
        kinds = Counter(map(_kind, files))
        kind = next(iter(kinds))
        if len(kinds) > 1:
            raise RecipeError(
                f"{self.source.flag} has files of several kinds ({', '.join(kinds)}): choose those of one kind"
            )
        # For training, whatever the files' names: one called test.parquet would otherwise be a split `test`.
        if kind in TABLES:
            return self._tables({TRAIN: files})
        if kind in SHARDS:
            return self._shards(
                {TRAIN: files}, Recognised(f"{len(files):,} {kind} files"), self._finder(Path(files[0]).parent)
            )
        if kind in IMAGE_SUFFIXES:
            raise RecipeError(f"{self.source.flag} is a picture: give the folder that it is in")
        if kind in ARCHIVES:
            raise RecipeError(f"{self.source.flag} is an archive: unpack it, and give its folder")
        raise RecipeError(
            f"{self.source.flag} is no kind of file that holds rows: these are {', '.join((*TABLES, *SHARDS))}"
        )

    def _shards(self, files: dict[str, list[str]], recognised: Recognised, finder: PictureFinder | None) -> Opened:
        first = next(iter(files.values()))[0]
        kind = _kind(first if finder is not None else first.partition("?")[0])
        data_files: Any = files
        if finder is not None:
            self._check_downloaded(itertools.chain(*files.values()))
            # As they are: their names may hold [, ] or *
            data_files = DataFilesDict({split: _literal(paths) for split, paths in files.items()})
        options: dict[str, Any] = {"cache_dir": self.cache_dir, "streaming": self.streaming}
        if kind in TAR_SUFFIXES:
            splits, recognised.captions = guarded(
                self.source, lambda: load_tars(data_files, self.config, self.source, **options)
            )
            return Opened(dict(splits), recognised, None)
        builder_class = ParquetFiles if kind in PARQUET else Arrow
        splits = guarded(self.source, lambda: load_files(builder_class, data_files, **options))
        return Opened(dict(splits), recognised, finder)

    def _tables(
        self, files: dict[str, list[str]], within: Path | None = None, listing: Listing | None = None
    ) -> Opened:
        """Rows of tables that name pictures `within` a folder, or anywhere on this machine, or hold them."""
        columns = columns_of(self.source, self.config)
        self._check_downloaded(itertools.chain(*files.values()))
        paths = [path for each in files.values() for path in each]
        recognised = Recognised(f"the table {paths[0]}" if len(paths) == 1 else f"{len(paths):,} tables: {some(paths)}")
        splits: dict[str, Any] = {}
        for split, of_split in files.items():
            parts = [
                self._table(Path(path), columns, recognised, self._finder(Path(path).parent, within, listing))
                for path in of_split
            ]
            splits[split] = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        return self._in_memory(splits, recognised, None)

    def _table(self, path: Path, columns: list[str], recognised: Recognised, finder: PictureFinder) -> datasets.Dataset:
        table = Table(path, self.config.text_encoding)
        if not table.columns:
            raise without_rows(self.source)
        pictures = picture_column(table.columns, self.config.image_column)
        hint = "; its first line looks like a row: add one with names, as `image,text`" if table.looks_headless else ""
        if pictures is None:
            words = has_columns(self.config.image_column, table.columns)
            raise RecipeError(f"--image_column {self.config.image_column}: {table.path} {words}{hint}")
        for name in columns:
            if not table.has(name):
                raise RecipeError(
                    f"{caption_flag(self.config)} {name}: {table.path} {has_columns(name, table.columns)}{hint}"
                )
        check_mask_column(self.config, table.columns, str(table.path))
        rows = read_rows(table, pictures, columns, finder, self.config)
        recognised.note("rows have no picture", rows.lacking)
        recognised.note_nearly(finder.nearly)
        return rows_from(rows.images, rows.columns, rows.defects, self.config.image_column, rows.masks)

    def _in_memory(self, splits: dict[str, Any], recognised: Recognised, finder: PictureFinder | None) -> Opened:
        if self.streaming:
            if not all(map(len, splits.values())):
                raise without_rows(self.source)
            splits = {name: rows.to_iterable_dataset(min(len(rows), FOLDER_SHARDS)) for name, rows in splits.items()}
        return Opened(splits, recognised, finder)

    def _check_downloaded(self, paths: Iterable[str]) -> None:
        """Raises RecipeError for what was left in the place of a file: a pointer of Git LFS, or a page."""
        for path in paths:
            with open(path, "rb") as file:
                start = file.read(64).lstrip().lower()
            if start.startswith(b"version https://git-lfs"):
                raise RecipeError(f"{path} is a pointer of Git LFS instead of the file: run `git lfs pull` there")
            if start.startswith((b"<!doctype html", b"<html")):
                raise RecipeError(f"{path} is a web page instead of the file: download the file itself")

    def _finder(self, folder: Path, within: Path | None = None, listing: Listing | None = None) -> PictureFinder:
        """Finds pictures by names that begin at --image_root, or else in `folder` and, if given, `within` another."""
        root = image_root(self.source)
        return PictureFinder(
            root or folder,
            within=None if root else within,
            follows_links=self.config.follow_links or not (listing and listing.links_outside),
        )

    # Folders

    def _in_folder(self, folder: Path) -> Opened:
        if self.source.dataset_name is not None and self.source.train_data_dir is not None:
            folder = folder / self.source.train_data_dir
            if not folder.is_dir():
                raise RecipeError(f"--train_data_dir {self.source.train_data_dir}: {self.name} has no such folder")
        if self.source.dataset_revision is not None:
            raise RecipeError(
                f"{self.source.flag} is on this machine and has no revisions: drop --dataset_revision "
                f"{self.source.dataset_revision}"
            )
        if (folder / SAVED_SPLITS).is_file() or (folder / SAVED).is_file():
            saved = guarded(self.source, lambda: datasets.load_from_disk(str(folder)))
            splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {TRAIN: saved}
            return self._in_memory(splits, Recognised("a data set saved by save_to_disk"), self._finder(folder))
        if self.source.dataset_config_name is not None or _has_configs(folder):
            found = self._load(str(folder))
            return Opened(
                dict(found), Recognised("a clone of a data set with configurations"), self._finder(folder, folder)
            )
        listing = list_files(folder, follow_links=self.config.follow_links)
        if listing.pictures:
            pictures = PictureFolder(folder, listing, self.source, self.config, repeats=self.repeats)
            rows = pictures.read()
            if rows is not None:
                number = len(listing.pictures)
                pictures.recognised.layout = f"a folder of {number:,} pictures"
                pictures.recognised.has_names = True
                return self._in_memory(dict(rows), pictures.recognised, None)
        kinds = {kind: files for kind in (*SHARDS, *TABLES) if (files := _files_of(listing, kind))}
        if not kinds:
            raise self._nothing(folder, listing)
        return self._data_files(folder, listing, kinds)

    def _data_files(self, folder: Path, listing: Listing, kinds: dict[str, list[str]]) -> Opened:
        """Rows of a folder of shards, or of tables that name pictures elsewhere; of the first kind that there is."""
        kind, files = next(iter(kinds.items()))
        recognised = Recognised(f"a folder of {len(files):,} {kind} files")
        for other, passed_over in itertools.islice(kinds.items(), 1, None):
            recognised.note(f"{other} files are passed over", [os.path.relpath(path, folder) for path in passed_over])
        if listing.pictures:
            recognised.note("pictures without captions are passed over", listing.pictures)
        if kind in TAR_SUFFIXES:
            finished = {path.removesuffix("_stats.json") for path in listing.with_suffix(".json") if "_stats" in path}
            if unfinished := [path for path in files if finished and path.removesuffix(kind) not in finished]:
                recognised.note("shards are unfinished (they have no _stats.json) and passed over", unfinished)
                files = [path for path in files if path not in set(unfinished)]
        by_split = deal(files, [split_in(os.path.relpath(path, folder)) for path in files])
        left = by_split.pop("", [])
        recognised.note("files are of no split and passed over", [os.path.relpath(path, folder) for path in left])
        if kind in TABLES:
            opened = self._tables(by_split, folder, listing)
            opened.recognised.notes += recognised.notes
            return opened
        return self._shards(by_split, recognised, self._finder(folder, folder, listing))

    def _nothing(self, folder: Path, listing: Listing) -> RecipeError:
        flag, pictures = self.source.flag, listing.pictures
        if pictures:
            ways = (
                "put each one's caption into a .txt file of the same name beside it, or all into a metadata.jsonl with "
                'lines like {"file_name": "a.png", "text": "…"}, or take names, by --caption_from file or folder'
            )
            labels = dict.fromkeys(
                folder_name(path, self.config) for path in pictures if os.path.dirname(path) != str(folder)
            )
            if labels:
                ways += f", or --caption_template 'a photo of a {{label}}' (label: {some(list(labels))})"
            texts = [os.path.relpath(path, folder) for path in listing.with_suffix(*SIDE_SUFFIXES)]
            if texts:
                ways += f" (no picture lies beside {some(texts)}; a table has to be called .csv or .jsonl)"
            return RecipeError(f"{flag} has {len(pictures):,} pictures and no captions for them: {ways}")
        if listing.links_outside:
            return RecipeError(f"{flag} has only links that lead out of it: --follow_links follows them")
        others = {suffix: len(paths) for suffix, paths in listing.others.items()}
        if not others:
            return RecipeError(f"{flag} is empty: put images there, each with its caption in a .txt file beside it")
        archives = [path for suffix in ARCHIVES for path in listing.others.get(suffix, [])]
        hint = f"; {archives[0]} is an archive: unpack it" if archives else ""
        found = ", ".join(f"{number:,} {suffix or 'without a suffix'}" for suffix, number in list(others.items())[:5])
        return RecipeError(f"{flag} has neither pictures nor files of rows, but other files ({found}){hint}")


def _kind(name: str) -> str:
    """A file's suffix, in lower case; `.tar.gz` as one."""
    lower = name.lower()
    return next((suffix for suffix in TAR_SUFFIXES if lower.endswith(suffix)), suffix_of(lower))


def _files_of(listing: Listing, kind: str) -> list[str]:
    """The files of a kind, but for what img2dataset, the Hub and `datasets` write beside the data."""
    files = [path for path in listing.with_suffix(suffix_of(f"x{kind}")) if _kind(path) == kind]
    beside = ("dataset_info.json", "dataset_infos.json", "state.json")
    return [path for path in files if not path.endswith("_stats.json") and os.path.basename(path) not in beside]


def _literal(paths: Iterable[str]) -> DataFilesList:
    """Files as `datasets` takes them where they are not patterns; their times and sizes are part of the cache's key."""
    absolute = [os.path.abspath(path) for path in paths]
    return DataFilesList(
        absolute, [(path, f"{os.stat(path).st_mtime_ns} {os.stat(path).st_size}") for path in absolute]
    )


def _has_configs(folder: Path) -> bool:
    """Whether a README of a data set says which files make up which configuration and split."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return False
    return isinstance(header, dict) and "configs" in header
