"""The environment of all HTML pages."""

import tomllib
from html.parser import HTMLParser

import jinja2
import pytest
from conftest import ROOT

from sd_recipes.export.pages import ENVIRONMENT

TEMPLATES = ROOT / "sd_recipes" / "templates"


def test_text_is_escaped_in_elements_and_attributes_also_through_macros() -> None:
    hostile = """<script>alert('1')</script>" onerror="x"""
    source = (
        '{% extends "base.html" %}{% from "macros.html" import figure, table %}'
        "{% block title %}{{ text }}{% endblock %}"
        "{% block body %}{{ figure(text, text) }}{{ table([text], [[text]]) }}{% endblock %}"
    )
    page = ENVIRONMENT.from_string(source).render(text=hostile)
    seen: list[tuple[str, list]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: seen.append((tag, attributes))  # type: ignore[method-assign]
    parser.feed(page)
    assert [attributes for tag, attributes in seen if tag == "img"] == [[("alt", hostile), ("src", hostile)]]
    assert "script" not in {tag for tag, _ in seen}
    assert page.count("&lt;script&gt;") == 5


def test_a_value_that_is_not_given_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="verdict"):
        ENVIRONMENT.from_string("{{ verdict }}").render()
    with pytest.raises(jinja2.UndefinedError, match="wors"):
        ENVIRONMENT.from_string("{{ content.wors }}").render(content={"words": 1})


def test_every_template_is_shipped_and_parsed() -> None:
    names = {path.relative_to(TEMPLATES).as_posix() for path in TEMPLATES.rglob("*") if path.is_file()}
    assert names == set(ENVIRONMENT.list_templates())
    for name in names:
        ENVIRONMENT.get_template(name)
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["sd_recipes"]
    assert "templates/**/*" in shipped
