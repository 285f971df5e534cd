"""Whether data are the same as before, checked cheaply: by the names and sizes of files, not by their content."""

from __future__ import annotations

import hashlib
import os
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
            for name, path in found:
                digest.update(repr((name, path.stat().st_size)).encode())
                if path.suffix.lower() in HASHED_SUFFIXES and path.stat().st_size <= MAX_HASHED_BYTES:
                    digest.update(path.read_bytes())
    return digest.hexdigest()


def _files(place: str) -> Iterator[tuple[str, Path]]:
    """Name and path of the local files that `place` stands for, in a fixed order; none for an address elsewhere."""
    if "://" in place:
        return
    for path in map(Path, local_files(place) or [place]):
        if path.is_file():
            yield path.name, path
            continue
        for folder, folders, files in os.walk(path):
            folders.sort()
            for name in sorted(files):
                file = Path(folder, name)
                if file.is_file():
                    yield str(file.relative_to(path)), file
