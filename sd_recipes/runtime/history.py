"""Files in a run's folder with one JSON line per event, which follow the run's history."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd_recipes.errors import RecipeError
from sd_recipes.reading import StrangeFile, open_regular
from sd_recipes.writing import replace_file

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 2**22  # real ones are below 1 KiB, or name the rows of a global batch

Line = dict[str, Any]


class HistoryFile:
    """Lines of a run, {"step": …, …}. Those of later steps are dropped when the run resumes.

    On a full disk a line is lost, which is told once. The next one is tried again: there may be room by then.
    """

    def __init__(self, path: Path, is_line: Callable[[Line], bool]) -> None:
        """`is_line` says whether a JSON object with a step is a line of such a file."""
        self.path = path
        self.is_line = is_line
        self.failed = False
        self.line_is_torn = False  # it may be, if the disk became full in the middle of it

    def start_at(self, step: int) -> None:
        """Drop the lines after `step`; all of them at step 0."""
        kept = [line for line in read_lines(self.path, self.is_line, tell=True) if line["step"] <= step] if step else []
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, line: Line) -> None:
        begun, self.line_is_torn = "\n" if self.line_is_torn else "", True
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{begun}{json.dumps(line)}\n")
            self.line_is_torn = False
        except OSError as error:
            if not self.failed:
                self.failed = True
                logger.warning("%s cannot be written (%s): training continues without it.", self.path, error)


def read_lines(path: Path, is_line: Callable[[Line], bool], *, tell: bool = False) -> list[Line]:
    """The lines of such a file, oldest first; none if there is no such file.

    A run that was killed, or had no room, may have left a torn line anywhere: what is not a line is dropped, with a
    warning if `tell` is set. Raises RecipeError if it is not a regular file.
    """
    lines: list[Line] = []
    dropped: list[int] = []
    try:
        with open_regular(path) as file:
            for number, content in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
                line = _object(content)
                if line is not None and is_line(line):
                    lines.append(line)
                elif content.strip():
                    dropped.append(number)
    except FileNotFoundError:
        return []
    except StrangeFile as error:
        raise RecipeError(f"{path} {error}: remove it, or choose another --output_dir") from None
    if dropped and tell:
        logger.warning("%s: dropped %d torn or malformed lines: %s", path, len(dropped), _numbers(dropped))
    return lines


def _numbers(lines: list[int]) -> str:
    return ", ".join(map(str, lines[:5])) + (" and more" if len(lines) > 5 else "")


def _object(content: bytes) -> Line | None:
    """A JSON object with a step, or None."""
    try:
        line = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None
