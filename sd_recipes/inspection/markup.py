"""Pieces of HTML; text in them is escaped, but for `Raw`."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from sd_recipes.inspection import figures


def formula(text: str) -> str:
    """A formula on its own line, with `_t` as a subscript."""
    return f'<p class="formula">{escape(text).replace("_t", "<sub>t</sub>")}</p>'


class Raw(str):
    """HTML already, which is not escaped."""


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Columns whose title begins with # hold numbers."""
    head = list(head)
    classes = [' class="number"' if title.startswith("#") else "" for title in head]
    lines = ["".join(f"<th{kind}>{escape(t.removeprefix('#'))}</th>" for kind, t in zip(classes, head, strict=True))]
    for row in rows:
        cells = (cell if isinstance(cell, Raw) else escape(str(cell)) for cell in row)
        lines.append("".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(classes, cells, strict=True)))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def image(uri: str, alt: str) -> str:
    """A figure in a data URI, as wide as the page."""
    return f'<p class="wide"><img alt="{escape(alt)}" src="{uri}"></p>'


def thumbnail(pixels: np.ndarray, side: int) -> str:
    """uint8 (H, W, 3) as a data URI, at most `side` pixels a side."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((side, side))
    return figures.picture_uri(picture)
