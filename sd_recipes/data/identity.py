"""Whether data are the same as before, checked cheaply: by the names and sizes of files, not by their content."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from sd_recipes import assets
from sd_recipes.data.side_captions import TEXT_SUFFIXES
from sd_recipes.data.sources import local_files
from sd_recipes.data.tables import DELIMITED, JSON
from sd_recipes.recipe import DataSettings
from sd_recipes.redaction import redacted

# Files that are read: a changed caption may be as long as the old one.
HASHED_SUFFIXES = {*DELIMITED, *JSON, *TEXT_SUFFIXES}
MAX_HASHED_BYTES = 64 * 2**20


def data_fingerprint(config: DataSettings) -> str:
    """A hash of a recipe's sources: local files by their name below the folder and by size, others by their address.

    It depends neither on where the files are nor on their times, so that data may be moved and copied.
    """
    digest = hashlib.blake2b(digest_size=8)
    for source in config.sources:
        digest.update(repr((source.dataset_config_name, source.train_split, source.weight)).encode())
        for place in (source.dataset_name, source.train_data_dir):
            if place is None:
                continue
            found = list(_files(os.path.expanduser(assets.resolve(place))))
            if not found:
                # Without the signature in an address, which differs every time.
                digest.update(repr((redacted(place), source.dataset_revision)).encode())
            for name, path, size in found:
                digest.update(repr((name, size)).encode())
                if os.path.splitext(path)[1].lower() in HASHED_SUFFIXES and size <= MAX_HASHED_BYTES:
                    digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _files(place: str) -> Iterator[tuple[str, str, int]]:
    """Name, path and size of the local files that `place` stands for, in a fixed order; none for an address elsewhere.

    Asks for each file once, and makes no `Path` of it: there can be a million.
    """
    if "://" in place:
        return
    for path in local_files(place) or [place]:
        if (size := _size(path)) is not None:
            yield os.path.basename(path), path, size
            continue
        for folder, folders, files in os.walk(path):
            folders.sort()
            below = os.path.relpath(folder, path)
            for name in sorted(files):
                file = os.path.join(folder, name)
                if (size := _size(file)) is not None:
                    yield name if below == os.curdir else os.path.join(below, name), file, size


def _size(path: str) -> int | None:
    """Bytes of a file; None if it is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
