"""Tables in files: CSV, TSV, JSON and parquet. Only the wanted columns, and their values as they are written."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sd_recipes.data.text_files import TextError, decode
from sd_recipes.errors import RecipeError, one_line

PARQUET = (".parquet", ".pq")
JSON = (".jsonl", ".ndjson", ".json")
DELIMITED = (".csv", ".tsv")
TABLE_SUFFIXES = (*DELIMITED, *JSON, *PARQUET)
DELIMITERS = ",;\t|"
PATH_KEY = "file_name"  # the column made of the keys of a JSON object that maps paths to rows
PROBED_ROWS = 1000  # in which the columns of a JSON file are looked for
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a picture in base64 is one field


@dataclass
class Table:
    """A table in a file, read when it is asked for; its own mistakes are RecipeErrors that name the file."""

    path: Path
    encoding: str | None = None  # of the text in it; None finds it out
    _text: str | None = field(default=None, repr=False)

    @property
    def kind(self) -> str:
        return self.path.suffix.lower()

    @cached_property
    def columns(self) -> list[str]:
        """The names of its columns, without blanks around them. Raises RecipeError."""
        if self.kind in PARQUET:
            return self._schema.names
        if self.kind in DELIMITED:
            header = [name.strip() for name in next(self._records(), [])]
            while header and not header[-1]:  # a line that ends in a delimiter
                header.pop()
            return header
        names: dict[str, None] = {}
        for number, row in enumerate(self._objects()):
            if number == PROBED_ROWS:
                break
            names |= dict.fromkeys(name.strip() for name in row)
        return list(names)

    def has(self, name: str) -> bool:
        """Whether it has a column of that name or, for `outer.inner` in JSON, an object that may hold it."""
        return name in self.columns or (self.kind in JSON and name.partition(".")[0] in self.columns)

    def is_text(self, name: str) -> bool:
        """Whether a column holds text: all do but those of parquet files that are of another type."""
        return (
            self.kind not in PARQUET
            or pa.types.is_string(kind := self._schema.field(name).type)
            or (pa.types.is_large_string(kind))
        )

    @property
    def looks_headless(self) -> bool:
        """Whether the first line of a CSV file seems to be a row: a file's name is in it."""
        return self.kind in DELIMITED and any(Path(name).suffix[1:].isalpha() for name in self.columns if "." in name)

    def read(self, wanted: list[str]) -> dict[str, list[Any]]:
        """The wanted columns by name: text as it is written, None, lists and objects of those; of parquet, its values.

        Raises RecipeError, also for a wanted column that is there twice.
        """
        counts = Counter(self.columns)
        for name in wanted:
            if counts[name] > 1:
                raise RecipeError(
                    f"{self.path} has the column {name!r} more than once: rename one of them, so that it is clear "
                    "which is meant"
                )
        if self.kind in PARQUET:
            return self._parquet(wanted)
        return self._delimited(wanted) if self.kind in DELIMITED else self._json(wanted)

    def _error(self, words: object) -> RecipeError:
        return RecipeError(f"{self.path} {words}")

    def _content(self) -> str:
        if self._text is None:
            try:
                self._text = decode(self.path.read_bytes(), self.encoding)
            except TextError as error:
                raise self._error(error) from None
            except OSError as error:
                raise self._error(f"cannot be read: {error.strerror}") from None
        return self._text

    # CSV and TSV

    def _records(self) -> Iterator[list[str]]:
        """The fields of every line, the header's first."""
        # Line breaks within a text too are read as one character.
        text = self._content().replace("\r\n", "\n").replace("\r", "\n").lstrip("\n")
        first, _, rest = text.partition("\n")
        if first.strip().lower()[:4] == "sep=" and len(first.strip()) == 5:  # Excel's own way to say it
            text, delimiter = rest, first.strip()[4]
        else:
            delimiter = max(DELIMITERS, key=lambda each: len(_fields(first, each)))
        # A quote opens a field only right after the delimiter, hence `skipinitialspace` for "a.png, \"a cat, asleep\"".
        return (
            record
            for record in csv.reader(io.StringIO(text, ""), delimiter=delimiter, skipinitialspace=True, strict=True)
            if record
        )

    def _delimited(self, wanted: list[str]) -> dict[str, list[Any]]:
        places = {name: self.columns.index(name) for name in wanted}
        found: dict[str, list[Any]] = {name: [] for name in wanted}
        records = self._records()
        next(records, None)
        try:
            for number, record in enumerate(records, start=1):
                if len(record) > len(self.columns) and any(map(str.strip, record[len(self.columns) :])):
                    raise self._error(
                        f"has {len(record)} fields in row {number}, and its first line names {len(self.columns)} "
                        "columns: put quotes around a text that holds the delimiter"
                    )
                for name, place in places.items():
                    found[name].append(record[place] if place < len(record) else None)
        except csv.Error as error:
            row = len(next(iter(found.values()), [])) + 1
            raise self._error(
                f"has a quote in row {row} that is not closed, or does not end its text ({error}): put quotes around "
                "the whole text, and write those in it twice"
            ) from None
        return found

    # JSON: lines, one array, or one object of paths

    def _objects(self) -> Iterator[dict[str, Any]]:
        text = self._content()
        start = text.lstrip()[:1]
        whole: Any = None
        if start == "[" or (start == "{" and self.kind == ".json"):
            try:
                whole = parse_json(text)
            except ValueError as error:
                if start == "[":
                    raise self._error(f"is not JSON: {one_line(error)}") from None
        if isinstance(whole, dict):
            yield from self._of_paths(whole)
            return
        if whole is not None:
            yield from (self._is_object(row, f"row {number}") for number, row in enumerate(whole, start=1))
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise self._error(f"is not JSON in line {number} ({one_line(error)}): every line is one row") from None
            yield self._is_object(row, f"line {number}")

    def _of_paths(self, whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The rows of an object that maps paths to rows or captions, or of COCO's; or the one row that it is."""
        if isinstance(whole.get("images"), list) and isinstance(whole.get("annotations"), list):
            yield from _of_coco(whole["images"], whole["annotations"])
        elif all(isinstance(value, dict) for value in whole.values()) and whole:
            yield from ({PATH_KEY: path, **row} for path, row in whole.items())
        elif whole and all(isinstance(value, str) and Path(path).suffix for path, value in whole.items()):
            yield from ({PATH_KEY: path, "text": caption} for path, caption in whole.items())
        else:
            yield whole

    def _is_object(self, row: Any, where: str) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise self._error(f"holds {row!r:.60} in {where}, where a row is an object of columns and values")
        return row

    def _json(self, wanted: list[str]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in wanted}
        for row in self._objects():
            if isinstance(row, _Repeating) and (twice := set(wanted) & row.repeated):
                raise self._error(f"has {min(twice)!r} more than once in a row: drop one of them")
            trimmed = {name.strip(): value for name, value in row.items()}
            for name, values in found.items():
                values.append(value_at(trimmed, name))
        return found

    # parquet

    @cached_property
    def _schema(self) -> pa.Schema:
        try:
            return pq.read_schema(self.path)
        except (pa.ArrowException, OSError) as error:
            raise self._error(f"cannot be read as parquet: {one_line(error)}") from None

    def _parquet(self, wanted: list[str]) -> dict[str, list[Any]]:
        try:
            return pq.read_table(self.path, columns=wanted).to_pydict()
        except (pa.ArrowException, OSError) as error:
            raise self._error(f"cannot be read as parquet: {one_line(error)}") from None


def _of_coco(images: list[Any], annotations: list[Any]) -> Iterator[dict[str, Any]]:
    """The rows of COCO's captions: each image with the list of its captions (Chen et al. 2015)."""
    captions: dict[Any, list[str]] = {}
    for each in annotations:
        if isinstance(each, dict) and "caption" in each:
            captions.setdefault(each.get("image_id"), []).append(each["caption"])
    for image in images:
        if isinstance(image, dict):
            yield {**image, "caption": captions.get(image.get("id"))}


def _fields(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line.strip("\r")], delimiter=delimiter, skipinitialspace=True), [])


class _Repeating(dict):
    """An object in which a key came more than once."""

    repeated: frozenset[str] = frozenset()


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeating = _Repeating(found)
    repeating.repeated = frozenset(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
    return repeating


def parse_json(text: str) -> Any:
    """What JSON says, with numbers as the text that is written there. Raises ValueError."""
    try:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=lambda _: None, object_pairs_hook=_pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def value_at(row: Any, name: str) -> Any:
    """The value under a key or, under `outer.inner`, in an object in there; true and false as text. None if absent."""
    if not isinstance(row, dict):
        return None
    if name in row:
        return _as_text(row[name])
    outer, dot, inner = name.partition(".")
    return value_at(row.get(outer), inner) if dot else None


def has_key(row: Any, name: str) -> bool:
    """Whether `value_at` would find something there, be it null."""
    if not isinstance(row, dict) or name in row:
        return isinstance(row, dict)
    outer, dot, inner = name.partition(".")
    return bool(dot) and has_key(row.get(outer), inner)


def _as_text(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return [_as_text(each) for each in value]
    return value
