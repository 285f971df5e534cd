"""Files of a folder that no row names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from sd_recipes.data.picture_files import list_files
from sd_recipes.data.splits import TRAIN, split_of_folder
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


def files_without_row(folder: Path, named: NamedFiles, *, follow_links: bool = False) -> Iterator[Finding]:
    """Images under `folder` that no row names, but for those of held-out folders; and files of the operating system."""
    for path in list_files(folder, follow_links=follow_links).pictures:
        name = os.path.relpath(path, folder)
        if path not in named and split_of_folder(name) in ("", TRAIN):
            yield Finding("image_without_row", None, name, "it has no caption that is read")
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            if is_system_file(name) and path not in named:
                size = os.lstat(path).st_size
                yield Finding("system_file", None, os.path.relpath(path, folder), f"{size:,} bytes")
