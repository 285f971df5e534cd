"""Rows that could not be used: skipped, counted, named, and no more of them than agreed."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from sd_recipes.recipe import RunError
from sd_recipes.redaction import in_texts, redacted

logger = logging.getLogger(__name__)

TOLD = 20  # on the console; the file has all
NAMED = 5  # in the message that ends a run
FEWEST_OF_STREAM = 10  # so that the first bad row of a stream is not more than 1 % of what was seen


class TooManyBadRows(RunError):
    """More rows were unusable than the run may skip."""

    status = 6


class BadRows:
    """The bad rows that this process met, each once; written to bad_rows.jsonl in the output folder."""

    def __init__(self, output_dir: Path, limit: int | None, num_rows: int | None, rank: int) -> None:
        self.path = output_dir / (f"bad_rows.{rank}.jsonl" if rank else "bad_rows.jsonl")
        self.limit = limit
        self.num_rows = num_rows
        self.reasons: dict[str, str] = {}
        if self.path.is_file():  # of the part of the run before this one
            for line in self.path.read_text().splitlines():
                row = json.loads(line)
                self.reasons[row["row"]] = row["reason"]

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, found: tuple[tuple[str, str], ...], samples_seen: int) -> None:
        """Count rows of (name, reason). Raises TooManyBadRows."""
        for name, reason in in_texts(redacted, found):
            if name in self.reasons:
                continue
            self.reasons[name] = reason
            with self.path.open("a") as file:
                file.write(json.dumps({"row": name, "reason": reason}, ensure_ascii=False) + "\n")
            if len(self) <= TOLD:
                rest = f"; further ones only in {self.path}" if len(self) == TOLD else ""
                logger.warning("Skipped %s: %s%s", name, reason, rest)
        self.check(len(self), samples_seen)

    def check(self, number: int, samples_seen: int, examples: list[tuple[str, str]] | None = None) -> None:
        """Compare a number of bad rows with the limit. Raises TooManyBadRows, naming some of them."""
        allowed = self.allowed(samples_seen)
        if number > allowed:
            examples = examples or list(self.reasons.items())
            named = "; ".join(f"{name}: {reason}" for name, reason in examples[-NAMED:])
            raise TooManyBadRows(
                f"{number} rows cannot be used, more than the {allowed} that may be skipped (--max_bad_rows); "
                f"`sd-recipes inspect` looks at all. Some of them: {named}"
            )

    def allowed(self, samples_seen: int) -> int:
        """How many rows may be skipped: --max_bad_rows, or 1 % of the rows (of those seen, in a stream)."""
        if self.limit is not None:
            return self.limit
        if self.num_rows is None:
            return max(FEWEST_OF_STREAM, samples_seen // 100)
        return math.ceil(self.num_rows / 100)


def row_name(number: int, encoded: Any, *, streamed: bool = False) -> str:
    """How a row is named: by its number and its image's path. Of a stream only the path is the same in every epoch."""
    path = encoded.get("path") if isinstance(encoded, dict) else None
    if streamed:
        return path or f"sample {number} of the stream"
    return f"row {number} ({path})" if path else f"row {number}"
