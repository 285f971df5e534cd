"""Captions in files beside the pictures: a.txt, a.caption or a.json for a.jpg."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from sd_recipes.data.picture_files import Listing, as_compared
from sd_recipes.data.tables import has_key, parse_json, value_at
from sd_recipes.data.text_files import TextError, decode
from sd_recipes.errors import RecipeError, one_line

TEXT_SUFFIXES = (".txt", ".caption")
SIDE_SUFFIXES = (*TEXT_SUFFIXES, ".json")
MAX_SIDE_BYTES = 2**20  # of a caption's file
WITH_BAR = 2000  # files, from which on a progress bar is shown


@dataclass
class SideCaptions:
    """The caption files of a folder's pictures, all with one suffix."""

    suffix: str
    of_picture: dict[str, str]  # a picture's path to its caption file's
    without_picture: list[str]

    def read(
        self, pictures: Iterable[str], columns: list[str], *, as_lines: bool, encoding: str | None
    ) -> tuple[dict[str, list[Any]], list[str | None]]:
        """The columns of the pictures' caption files, and what is wrong with each file, or None."""
        pictures = list(pictures)
        found: dict[str, list[Any]] = {name: [] for name in columns}
        defects: list[str | None] = []
        for picture in tqdm(pictures, "Caption files", unit="file", leave=False, disable=len(pictures) < WITH_BAR):
            path, values, defect = self.of_picture.get(picture), {}, None
            if path is not None:
                try:
                    values = self._values(path, columns, as_lines, encoding)
                except (TextError, OSError) as error:
                    defect = f"{path} {one_line(error)}"
            for name in columns:
                found[name].append(values.get(name))
            defects.append(defect)
        return found, defects

    def _values(self, path: str, columns: list[str], as_lines: bool, encoding: str | None) -> dict[str, Any]:
        with open(path, "rb") as file:
            data = file.read(MAX_SIDE_BYTES + 1)
        if len(data) > MAX_SIDE_BYTES:
            raise TextError(f"is over {MAX_SIDE_BYTES >> 20} MiB, which no caption is")
        text = decode(data, encoding)
        if self.suffix != ".json":
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            whole = lines if as_lines and len(lines) > 1 else " ".join(lines)
            return dict.fromkeys(columns, whole)
        try:
            row = parse_json(text)
        except ValueError as error:
            raise TextError(f"is not JSON: {one_line(error)}") from None
        values = {name: value_at(row, name.removeprefix("json.")) for name in columns}
        if missing := [name for name in columns if not has_key(row, name.removeprefix("json."))]:
            keys = list(row) if isinstance(row, dict) else type(row).__name__
            raise TextError(f"has no {' and no '.join(missing)}: it holds {keys}")
        return values


def find_side_captions(
    listing: Listing, suffix: str | None, where: str, *, required: bool = True
) -> SideCaptions | None:
    """The caption files beside the pictures: those with `suffix`, or those of the one kind that there is.

    A .json file counts only where there is no text. Raises RecipeError where there are two kinds of text files, or
    none with the given suffix, if that is `required`.
    """
    given = suffix and "." + suffix.lstrip(".").lower()
    kinds = [given] if given else list(SIDE_SUFFIXES)
    found = [each for kind in kinds if (each := _of_kind(listing, kind)).of_picture]
    texts = [each for each in found if each.suffix in TEXT_SUFFIXES]
    if len(texts) > 1:
        numbers = " and ".join(f"{len(each.of_picture)} {each.suffix} files" for each in texts)
        raise RecipeError(
            f"{where} has {numbers} beside its pictures: say which hold the captions, as in "
            f"--caption_extension {texts[0].suffix}"
        )
    if given and not found and required:
        raise RecipeError(f"{where} has no {given} file beside a picture (--caption_extension): drop it, or correct it")
    return (texts or found)[0] if found else None


def _of_kind(listing: Listing, suffix: str) -> SideCaptions:
    files = listing.with_suffix(suffix)
    by_stem = {os.path.splitext(path)[0]: path for path in files}
    nearly = {as_compared(stem): path for stem, path in by_stem.items()}
    of_picture = {}
    for picture in listing.pictures:
        # Of a.jpg: a.txt, or a.jpg.txt; or one that differs in case or Unicode form.
        stem = os.path.splitext(picture)[0]
        path = by_stem.get(stem) or by_stem.get(picture) or nearly.get(as_compared(stem))
        if path is not None:
            of_picture[picture] = path
    used = set(of_picture.values())
    return SideCaptions(suffix, of_picture, [path for path in files if path not in used])
