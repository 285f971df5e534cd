"""Masks in files beside pictures: a-mask.png for a.jpg, or a-masklabel.png, as OneTrainer names it."""

from __future__ import annotations

import os

from sd_recipes.data.encoded import Encoded
from sd_recipes.data.picture_files import IMAGE_SUFFIXES, suffix_of

ENDINGS = ("-mask", "-masklabel")  # in any case


class MaskFiles:
    """The masks beside pictures, by the pictures' paths; each folder is listed once."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, str]] = {}  # by folder: a picture's name without its suffix to its mask

    def of(self, picture: str | None) -> Encoded | None:
        """The mask beside a picture on this machine; None if there is none, or no picture."""
        if picture is None:
            return None
        folder, name = os.path.split(picture)
        if folder not in self._folders:
            self._folders[folder] = _masks_in(folder)
        path = self._folders[folder].get(os.path.splitext(name)[0])
        return None if path in (None, picture) else {"bytes": None, "path": path}


def _masks_in(folder: str) -> dict[str, str]:
    masks: dict[str, str] = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        masked = _masked_by(name)
        if masked is not None:
            masks.setdefault(masked, os.path.join(folder, name))
    return masks


def without_masks(pictures: list[str]) -> list[str]:
    """The pictures but for those that are masks of others."""
    names = {os.path.splitext(picture)[0] for picture in pictures}
    return [picture for picture in pictures if _masked_by(picture) not in names]


def _masked_by(path: str) -> str | None:
    """The name without its suffix of the picture that a file would be the mask of; None for no name of a mask."""
    stem = os.path.splitext(path)[0]
    for ending in ENDINGS:
        if stem.lower().endswith(ending) and suffix_of(path) in IMAGE_SUFFIXES:
            return stem[: -len(ending)]
    return None
