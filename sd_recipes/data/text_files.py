"""Bytes of a text file to text: UTF-8, or what the file's first bytes or the user say; never a guess."""

from __future__ import annotations

import codecs

# A longer mark first: UTF-32's begins like UTF-16's.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
PROBED = 400  # bytes in which zeros give UTF-16 away


class TextError(ValueError):
    """Bytes that are not text in the encoding that they should be in; the message goes after the file's name."""


def decode(data: bytes, encoding: str | None = None) -> str:
    """The text in a file's bytes. Without `encoding`: what its byte order mark says, or UTF-8. Raises TextError."""
    mark = next((mark for mark in MARKS if data.startswith(mark)), None)
    known = MARKS[mark] if mark else encoding or _without_mark(data)
    try:
        return data.decode(known)
    except LookupError:
        raise TextError(f"cannot be read as {known}: --text_encoding is the name of no encoding") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = f"byte 0x{data[error.start]:02x} in line {line}"
        if known != "utf-8":
            raise TextError(f"is not {known} ({place}): give its own --text_encoding, or save it as UTF-8") from None
        raise TextError(
            f"is not UTF-8 ({place}){_as_windows(data, error.start)}: save it as UTF-8, or name its encoding, as in "
            "--text_encoding cp1252"
        ) from None


def _without_mark(data: bytes) -> str:
    """UTF-16 without a mark shows by its zeros, of which text in UTF-8 has none."""
    start = data[:PROBED]
    if len(start) < 4 or b"\0" not in start:
        return "utf-8"
    return "utf-16-le" if start[1::2].count(0) > start[::2].count(0) else "utf-16-be"


def _as_windows(data: bytes, place: int) -> str:
    """How the words around a place would read in the commonest encoding of Windows."""
    begin = max(data.rfind(b"\n", 0, place) + 1, place - 12)
    end = data.find(b"\n", place)
    part = data[begin : min(place + 12, end if end >= 0 else len(data))]
    try:
        return f"; as cp1252 it would read {part.decode('cp1252').strip()!r}"
    except UnicodeDecodeError:
        return ""
