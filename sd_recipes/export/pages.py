"""HTML pages from the templates in sd_recipes/templates: text is escaped, and a value that is not given is an error."""

from __future__ import annotations

from typing import Any

import jinja2

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("sd_recipes"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters["thousands"] = "{:,}".format


def render_page(template: str, **values: Any) -> str:
    """Render `template`, a path below sd_recipes/templates, with `values`."""
    return ENVIRONMENT.get_template(template).render(values)
