"""HTML pages from the templates in sd_recipes/templates: text is escaped, and a value that is not given is an error."""

from __future__ import annotations

import base64
import io
from typing import Any

import jinja2
from PIL import Image

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("sd_recipes"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters["thousands"] = "{:,}".format


# What Pillow raises for a picture that is torn, huge, or none.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def render_page(template: str, **values: Any) -> str:
    """Render `template`, a path below sd_recipes/templates, with `values`."""
    return ENVIRONMENT.get_template(template).render(values)


def picture_uri(picture: Image.Image, side: int) -> str:
    """A picture in a data URI, at most `side` pixels a side, as JPEG. Raises one of UNREADABLE."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
