"""What a table holds instead of a picture: its path, its bytes, or its bytes in base64."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from sd_recipes.data.picture_files import ADDRESS, NotFound, PictureFinder
from sd_recipes.errors import RecipeError

Encoded = dict[str, Any]  # an image: {"bytes", "path"}, one of which may be None
DATA_ADDRESS = "data:image/"  # RFC 2397
# How JPEG, PNG, GIF, WebP, TIFF, BMP, JPEG XL, and (HEIC, AVIF, JPEG XL and JPEG 2000) boxes begin in base64.
BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkq", "TU0AK", "Qk", "/wo", "AAAA")
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
SHORTEST_BASE64 = 60  # characters: no picture is shorter


def encoded(value: Any, finder: PictureFinder | None) -> Encoded:
    """The image that a table's value stands for; paths are looked up by `finder`. Raises NotFound."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return {**encoded(value["bytes"], None), "path": value.get("path")}
        value = value.get("path")
    if isinstance(value, str) and is_base64(value) and not (finder is not None and finder.has(value)):
        try:
            return {"bytes": base64.b64decode(value.partition("base64,")[2] or value), "path": None}
        except binascii.Error as error:
            raise NotFound(f"a picture in base64 that is damaged: {error}") from None
    if finder is None:
        raise NotFound("neither a picture nor its path")
    return {"bytes": None, "path": finder.find(value)}


def is_empty(value: Any) -> bool:
    """Whether a value stands for nothing: null, blank text, no bytes, or an image that has neither path nor bytes."""
    if isinstance(value, dict):
        return is_empty(value.get("bytes")) and is_empty(value.get("path"))
    return value is None or (isinstance(value, str | bytes) and not value.strip())


def found_or_named(value: Any, finder: PictureFinder | None) -> Encoded:
    """Like `encoded`; for what is not found, an empty image of its name, which is missed when it is read."""
    try:
        return encoded(value, finder)
    except NotFound as error:
        return {"bytes": b"", "path": str(error)}


def is_base64(text: str) -> bool:
    """Whether it begins as pictures do in base64, and goes on as no path does."""
    if text.startswith(DATA_ADDRESS):
        return True
    return len(text) >= SHORTEST_BASE64 and text.startswith(BASE64_STARTS) and BASE64.fullmatch(text) is not None


def check_holds_pictures(value: Any, column: str, place: str, *, is_local: bool) -> None:
    """Check a column by one of its values. Raises RecipeError for addresses, and for paths in data elsewhere."""
    path = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else value
    if not isinstance(path, str) or is_base64(path) or path.startswith("file://"):
        return
    if ADDRESS.match(path):
        raise RecipeError(
            f"--image_column {column} of {place} holds addresses ({path:.60}), and pictures are not fetched while "
            "training: download them first, for instance with img2dataset, and give their folder"
        )
    if not is_local:
        raise RecipeError(
            f"--image_column {column} of {place} holds text ({path:.60}), and there are no files of such names: "
            "download the data set, and give its folder"
        )
