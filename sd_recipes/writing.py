"""Write a file so that a kill or a full disk leaves the old one or the new one, whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a file beside `path` to write, which then replaces it; a link is replaced, not what it leads to."""
    beside = path.with_name(f".{path.name}")
    beside.unlink(missing_ok=True)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Write a text in the place of what is there."""
    with replacing(path) as beside, beside.open("x", encoding="utf-8") as file:
        file.write(text)
