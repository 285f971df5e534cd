"""WebDataset shards: tar files in which parts of one name make up a sample, as 0001.jpg and 0001.txt do.

Read through datasets' own builder (files, globs, addresses, the Hub, streams and the cache), but only the wanted parts
are kept, and a sample that is damaged or lacks a part is a bad row, where the original ends the run.
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
from datasets.builder import Key
from datasets.download import StreamingDownloadManager
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from sd_recipes.data.captions import DEFECT
from sd_recipes.data.columns import MASK, columns_of, not_captions
from sd_recipes.data.picture_files import IMAGE_SUFFIXES, suffix_of
from sd_recipes.data.tables import parse_json, value_at
from sd_recipes.data.text_files import TextError, decode
from sd_recipes.errors import RecipeError, one_line
from sd_recipes.recipe import DataSettings, DataSource

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
# Of a member's name: the sample's key, which ends at the first dot of the file's name, and the part's name.
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
LOOKED_AT = 20  # samples of the first shard in which a part must be met
FIRST_PICTURE = "image"  # the column, by default, for which any picture of a sample is taken
TEXT, TEXTS = "text", ("txt", "caption", "json.caption", "json.text")  # the default column, and what stands in for it

Sample = dict[str, bytes]


@dataclass
class TarConfig(datasets.BuilderConfig):
    """Which parts become which columns; `json.caption` is what an object in the part `json` holds."""

    image_column: str = FIRST_PICTURE
    captions: tuple[tuple[str, str], ...] = ()  # (column, part)
    encoding: str | None = None
    mask: str | None = None  # the part with the mask, without its suffix


class TarFiles(WebDataset):
    """datasets' builder, with our own reader of samples.

    The names overridden here are private to datasets (5.2), which has no public way to read shards with one's own code.
    """

    BUILDER_CONFIG_CLASS = TarConfig
    config: TarConfig

    def _info(self) -> datasets.DatasetInfo:
        features: dict[str, Any] = {self.config.image_column: datasets.Image(decode=False)}
        if self.config.mask is not None:
            features[MASK] = datasets.Image(decode=False)
        for column, part in self.config.captions:
            text = datasets.Value("string")
            features[column] = datasets.List(text) if "." in part else text
        return datasets.DatasetInfo(features=datasets.Features({**features, DEFECT: datasets.Value("string")}))

    def _generate_examples(
        self, tar_paths: list[str], tar_iterators: list[Any]
    ) -> Iterator[tuple[Key, dict[str, Any]]]:
        for number, (path, members) in enumerate(zip(tar_paths, tar_iterators, strict=True)):
            for place, (key, parts, defect) in enumerate(samples(path, members)):
                yield Key(number, place), self._row(f"{os.path.basename(path)}/{key}", parts, defect)

    def _row(self, name: str, parts: Sample, defect: str | None) -> dict[str, Any]:
        mask = find_mask(self.config.mask, parts)
        picture = find_part(self.config.image_column, [part for part in parts if part != mask])
        if picture is None and defect is None:
            wanted = "picture" if self.config.image_column == FIRST_PICTURE else f"part {self.config.image_column}"
            defect = f"the sample has no {wanted}, only {', '.join(parts)}"
        row: dict[str, Any] = {}
        if self.config.mask is not None:
            row[MASK] = {"bytes": parts[mask], "path": f"{name}.{mask}"} if mask else None
        for column, part in self.config.captions:
            try:
                row[column] = read_text(part, parts, self.config.encoding)
            except TextError as error:
                row[column] = None
                defect = defect or f"the sample's part {part} {error}"
        image = {"bytes": picture and parts[picture], "path": f"{name}.{picture}" if picture else name}
        return {self.config.image_column: image, **row, DEFECT: defect}


def samples(path: str, members: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Sample, str | None]]:
    """The samples of a shard: key, parts and, where it is damaged, in words how. Raises ReadError if the shard is."""
    key, defect = "", None
    parts: Sample = {}
    try:
        for name, file in members:
            found = MEMBER.fullmatch(name)
            if found is None:
                continue
            if parts and found[1] != key:
                yield key, parts, defect
                parts, defect = {}, None
            key, part = found[1], found[2]
            if part in parts:
                defect = f"the sample has the part {part} more than once"
            parts[part] = file.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:  # of a stream, perhaps only the connection
        raise tarfile.ReadError(f"{os.path.basename(path)} is cut short or damaged: {one_line(error)}") from error
    if parts:
        yield key, parts, defect


def find_mask(name: str | None, parts: Iterable[str]) -> str | None:
    """The picture among the parts that is called so, as `mask.png` for `mask`, in any case; None if there is none."""
    for part in parts:
        if name and os.path.splitext(part)[0].lower() == name.lower() and suffix_of(part) in IMAGE_SUFFIXES:
            return part
    return None


def find_part(name: str, parts: Iterable[str]) -> str | None:
    """The part of that name, or that ends in it, in any case; for the default name, any picture."""
    if name in parts:
        return name
    if name == FIRST_PICTURE:
        pictures = [part for part in parts if suffix_of(f"x.{part}") in IMAGE_SUFFIXES]
        # Of jpg and depth.png, the one without a name of its own.
        return min(pictures, key=lambda part: part.count("."), default=None)
    return next((part for part in parts if f".{part}".lower().endswith(f".{name}".lower())), None)


def read_text(part: str, parts: Sample, encoding: str | None) -> str | list[str] | None:
    """The text in a part or, for `json.caption`, all texts that an object in it holds there. Raises TextError."""
    name = find_part(part, parts) or find_part(part.partition(".")[0], parts)
    if name is None:
        return None
    text = decode(parts[name], encoding)
    if "." not in part or find_part(part, parts):
        return text
    try:
        found = value_at(parse_json(text), part.partition(".")[2])
    except ValueError as error:
        raise TextError(f"is not JSON: {one_line(error)}") from None
    texts = found if isinstance(found, list) else [found]
    if not all(each is None or isinstance(each, str) for each in texts):
        raise TextError(f"holds {found!r:.60}, where a caption is text")
    return [each for each in texts if each is not None]


def load_tars(
    data_files: Any, config: DataSettings, source: DataSource, *, cache_dir: str | None, streaming: bool
) -> tuple[Any, str]:
    """All splits of some shards, as `datasets.load_dataset` gives them, and in words where their captions are from.

    Raises RecipeError for parts that the first samples do not have.
    """
    builder = TarFiles(cache_dir=cache_dir, data_files=data_files)  # finds the files
    files = builder.config.data_files
    looked_at: list[tuple[str, Sample, str | None]] = []
    for path in itertools.chain(*files.values()):
        looked_at = list(itertools.islice(samples(path, StreamingDownloadManager().iter_archive(path)), LOOKED_AT))
        if looked_at:  # a shard of which no download succeeded has none
            break
    captions = tuple((column, _part_for(column, looked_at, source)) for column in columns_of(source, config))
    if not any(find_part(config.image_column, parts) for _, parts, _ in looked_at):
        raise RecipeError(f"--image_column {config.image_column}: {source.flag} {_has_parts(looked_at)}")
    builder = TarFiles(
        cache_dir=cache_dir,
        data_files=files,
        image_column=config.image_column,
        captions=captions,
        encoding=config.text_encoding,
        mask=config.mask_column if config.masked_loss else None,
    )
    words = " and ".join(f"the part {part}" for _, part in captions)
    if streaming:
        return builder.as_streaming_dataset(), words
    builder.download_and_prepare()
    return builder.as_dataset(), words


def _part_for(column: str, looked_at: list[tuple[str, Sample, str | None]], source: DataSource) -> str:
    """The part that a caption column is read from. Raises RecipeError if the samples do not have it."""
    for part in (column, *(TEXTS if column == TEXT else ())):
        for _, parts, _ in looked_at:
            try:
                found = read_text(part, parts, None)
            except TextError:  # of this sample
                continue
            if not found:
                continue
            if part in ("json", "jsn") and isinstance(keys := parse_json(str(found)), dict):
                raise RecipeError(not_captions("--caption_column", column, keys, source.flag))
            return part
    raise RecipeError(f"--caption_column {column}: {source.flag} {_has_parts(looked_at)}")


def _has_parts(looked_at: list[tuple[str, Sample, str | None]]) -> str:
    parts = dict.fromkeys(part for _, found, _ in looked_at for part in found)
    hint = ", or what an object holds, as json.caption" if any(part.endswith("json") for part in parts) else ""
    return f"has samples with the parts {', '.join(parts) or 'none'}: choose one of them{hint}"
