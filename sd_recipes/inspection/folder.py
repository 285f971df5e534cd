"""Files of a folder that no row names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from sd_recipes.data.picture_files import IMAGE_SUFFIXES
from sd_recipes.inspection.findings import Finding, is_system_file


class NamedFiles:
    """The files that rows name, eight bytes each."""

    def __init__(self, paths: Iterable[str]) -> None:
        # The hash of a string is as good as any within one process.
        self._hashes = np.unique(np.fromiter((hash(os.path.normpath(path)) for path in paths), np.int64))

    def __contains__(self, path: str) -> bool:
        wanted = hash(os.path.normpath(path))
        place = int(np.searchsorted(self._hashes, wanted))
        return place < len(self._hashes) and int(self._hashes[place]) == wanted


def files_without_row(folder: Path, named: NamedFiles) -> Iterator[Finding]:
    """Images under `folder` that no row names, and files of the operating system."""
    waiting = [str(folder)]
    while waiting:
        place = waiting.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append(entry.path)
                    continue
                name = os.path.relpath(entry.path, folder)
                if is_system_file(entry.name):
                    if entry.path not in named:
                        yield Finding("system_file", None, name, f"{entry.stat().st_size:,} bytes")
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.path not in named:
                    yield Finding("image_without_row", None, name, "no metadata file names it")
