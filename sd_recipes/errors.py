"""Errors that end a run with a one-line message, and other libraries' errors in one line."""

import difflib
from collections.abc import Iterable
from typing import Any

from sd_recipes.redaction import in_texts, redacted


class RunError(Exception):
    """Ends a run with a one-line message and no traceback; `status` is the process's exit status."""

    status = 1

    def __init__(self, *words: Any) -> None:
        super().__init__(*in_texts(redacted, words))  # a URL, or another program's error, may hold a secret


class RecipeError(RunError, ValueError):
    """A user's mistake: the message names the flag or the file, and the way out."""

    status = 2


def one_line(error: object, limit: int = 300) -> str:
    """An error's text in one line of at most `limit` characters; its class name if it has no text."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def nearest(name: str, names: Iterable[str]) -> str:
    """Words that name the one of `names` that is most like `name`, in parentheses; empty if none is."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""
