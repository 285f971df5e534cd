"""Rows that could not be used: skipped, counted and named, up to an agreed limit."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

from sd_recipes.errors import RunError
from sd_recipes.redaction import in_texts, redacted

logger = logging.getLogger(__name__)

TOLD = 20  # on the console; the file has them all
NAMED = 5  # in the message that ends a run
RECORDS = "bad_rows*.jsonl"  # of all processes
FEWEST_OF_STREAM = 10  # without it, the first bad row of a stream would be over 1 % of the rows seen


class BadRow(ValueError):
    """A row that cannot be used; the message says why."""


class TooManyBadRows(RunError):
    """More rows were unusable than the run may skip."""

    status = 6


class BadRows:
    """The bad rows that this process met, each counted once and recorded in bad_rows.jsonl in the output folder.

    The record is kept when a run resumes. Rows in it count only if they are bad again: they may have been repaired. A
    dry run `writes` nothing.
    """

    def __init__(
        self, output_dir: Path, limit: int | None, num_rows: int | None, rank: int, *, writes: bool = True
    ) -> None:
        self.path = output_dir / (f"bad_rows.{rank}.jsonl" if rank else "bad_rows.jsonl")
        self.limit = limit
        self.num_rows = num_rows
        self.writes = writes
        self.reasons: dict[str, str] = {}
        self._recorded: dict[str, str] | None = None  # read when a row is first added: until then rows may be forgotten
        self._to_record: dict[str, str] = {}
        self._told: set[Path | str] = set()

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, found: tuple[tuple[str, str], ...], samples_seen: int) -> None:
        """Count rows of (name, reason). Raises TooManyBadRows."""
        if found and self._recorded is None:
            self._recorded = self._read(self.path)
        for name, reason in in_texts(redacted, found):
            if name in self.reasons:
                continue
            self.reasons[name] = reason
            assert self._recorded is not None
            if self._recorded.get(name) == reason:
                continue
            self._to_record[name] = reason
            if len(self) <= TOLD:
                where = f"only in {self.path}" if self.writes else "are not named"
                rest = f"; further ones {where}" if len(self) == TOLD else ""
                logger.warning("Skipped %s: %s%s", name, reason, rest)
        self._record()
        self.check(len(self), samples_seen)

    def _record(self) -> None:
        """Write the rows that are not in the record yet. On a full disk, they are tried again with the next row."""
        if not self._to_record or not self.writes:
            return
        try:
            with self.path.open("a+b") as file:
                begun = b"\n" if _ends_within_line(file) else b""  # cut short by a kill or a full disk
                file.write(begun + _lines(self._to_record))
        except OSError as error:
            self._tell("full", f"Bad rows cannot be recorded in {self.path} ({error}): they still count.")
            return
        self._to_record = {}

    def recorded(self) -> dict[str, str]:
        """The rows that were bad when a process last met them, with their reasons; those of all processes."""
        found: dict[str, str] = {}
        for path in sorted(self.path.parent.glob(RECORDS)):
            found |= self._read(path)
        return found

    def forget(self, names: set[str]) -> None:
        """Remove rows from the records of all processes; to be called before any of them has met a row."""
        for path in sorted(self.path.parent.glob(RECORDS)):
            rows = self._read(path)
            if names.isdisjoint(rows) or not self.writes:
                continue
            beside = path.with_name(f".{path.name}")
            try:
                beside.write_bytes(_lines({name: reason for name, reason in rows.items() if name not in names}))
                os.replace(beside, path)
            except OSError as error:
                self._tell(path.name, f"{path} names rows as bad that are good now, and cannot be written ({error}).")

    def _read(self, path: Path) -> dict[str, str]:
        """Names and reasons in a record, without the lines that a kill or a full disk cut short."""
        rows, torn = {}, 0
        try:
            lines = path.read_bytes().split(b"\n") if path.is_file() else []
        except OSError as error:
            self._tell(path, f"{path} cannot be read ({error}): the rows in it count when they are met again.")
            return {}
        for line in filter(None, lines):
            try:
                row = json.loads(line)
                rows[str(row["row"])] = str(row["reason"])
            except (ValueError, KeyError, TypeError):
                torn += 1
        if torn:
            self._tell(path, f"{path}: {torn} of its lines cannot be read and are left out.")
        return rows

    def _tell(self, what: Path | str, words: str) -> None:
        """Warn, once about each."""
        if what not in self._told:
            self._told.add(what)
            logger.warning("%s", words)

    def check(self, number: int, samples_seen: int, examples: list[tuple[str, str]] | None = None) -> None:
        """Compare a number of bad rows with the limit. Raises TooManyBadRows, naming some of them."""
        allowed = self.allowed(samples_seen)
        if number > allowed:
            examples = examples or list(self.reasons.items())
            named = "; ".join(f"{name}: {reason}" for name, reason in examples[-NAMED:])
            raise TooManyBadRows(
                f"{number} rows cannot be used, more than the {allowed} that may be skipped (--max_bad_rows); "
                f"`sd-recipes inspect` checks every row. Some of them: {named}"
            )

    def allowed(self, samples_seen: int) -> int:
        """How many rows may be skipped: --max_bad_rows, or 1 % of the rows (of those seen, in a stream)."""
        if self.limit is not None:
            return self.limit
        if self.num_rows is None:
            return max(FEWEST_OF_STREAM, samples_seen // 100)
        return math.ceil(self.num_rows / 100)


def row_name(number: int, encoded: Any, *, streamed: bool = False) -> str:
    """A row's name: its number and its image's path. In a stream only the path is the same in every epoch."""
    path = encoded.get("path") if isinstance(encoded, dict) else None
    if streamed:
        return path or f"sample {number} of the stream"
    return f"row {number} ({path})" if path else f"row {number}"


def row_number(name: str) -> int | None:
    """The number in a row's name; None for a row of a stream."""
    found = re.match(r"row (\d+)(?: \(|$)", name)
    return int(found[1]) if found else None


def _lines(rows: dict[str, str]) -> bytes:
    lines = [json.dumps({"row": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in rows.items()]
    return "".join(lines).encode(errors="backslashreplace")  # file names need not be UTF-8


def _ends_within_line(file: BinaryIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
