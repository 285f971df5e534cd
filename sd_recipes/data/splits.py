"""The splits that names of folders and files say."""

from __future__ import annotations

import os
import re

TRAIN = "train"
SPLITS = {
    "train": TRAIN, "training": TRAIN, "test": "test", "testing": "test", "validation": "validation",
    "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation", "evaluation": "validation",
}  # fmt: skip


SHARD = re.compile(r"(?:^|/)(\w[\w.]*)-\d{5}-of-\d{5}[^/]*$")


def split_of_folder(path: str) -> str:
    """The split that a folder in a relative path is named after, the first of them if several are; "" if none."""
    return next((SPLITS[name] for name in path.lower().split(os.sep)[:-1] if name in SPLITS), "")


def split_in(path: str) -> str:
    """The split in a relative path, "" if none, as `datasets` reads it.

    A word of it, as in data/test/0.parquet, or any word before the number of a shard, as in flags-00000-of-00001.
    """
    if found := SHARD.search(path):
        return SPLITS.get(found[1].lower(), found[1])
    words = re.split(r"[-._ /\\]", path.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def deal(paths: list[str], splits: list[str]) -> dict[str, list[str]]:
    """The paths of each split. Those of none are for training, unless others are; then they are under ""."""
    rest = "" if TRAIN in splits else TRAIN
    dealt: dict[str, list[str]] = {}
    for path, split in zip(paths, splits, strict=True):
        dealt.setdefault(split or rest, []).append(path)
    return dealt
