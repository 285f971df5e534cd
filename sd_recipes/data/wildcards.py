"""Wildcards in captions, `a {red|blue} cat`: one of the choices is drawn for every sample."""

from __future__ import annotations

import re
from collections.abc import Iterator

PIECE = re.compile(r"\{\{|\}\}|[{}|]|[^{}|]+")


def fill_wildcards(text: str, us: Iterator[float]) -> str:
    """The text with one choice in the place of each `{a|b|c}`, by the next of `us`, which lie in [0, 1).

    `{{` and `}}` are braces, and a brace without its other half stays as it is, like an empty pair. Choices may hold
    wildcards. Inside of them `}}` ends two, so that a brace there is written outside, or as a choice of its own.
    """
    open_ones: list[list[str]] = [[""]]  # the choices so far, of the text itself and of each wildcard that is open
    for piece in PIECE.findall(text):
        closes_two = piece == "}}" and len(open_ones) > 2
        for mark in "}}" if closes_two else (piece,):
            choices = open_ones[-1]
            if mark == "{":
                open_ones.append([""])
            elif mark == "|" and len(open_ones) > 1:
                choices.append("")
            elif mark == "}" and len(open_ones) > 1:
                open_ones.pop()
                open_ones[-1][-1] += "{}" if choices == [""] else choices[int(next(us) * len(choices))]
            else:
                choices[-1] += {"{{": "{", "}}": "}"}.get(mark, mark)
    while len(open_ones) > 1:
        unclosed = "{" + "|".join(open_ones.pop())
        open_ones[-1][-1] += unclosed
    return open_ones[0][0]
