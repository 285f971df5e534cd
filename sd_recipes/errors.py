"""What ends a run in one line; and other people's errors told in one."""

from typing import Any

from sd_recipes.redaction import in_texts, redacted


class RunError(Exception):
    """An end of a run that is told in one line, without a traceback; `status` is the process's exit status."""

    status = 1

    def __init__(self, *words: Any) -> None:
        super().__init__(*in_texts(redacted, words))  # an address, or another program's error, may hold a secret


class RecipeError(RunError, ValueError):
    """A person's mistake: the line names the flag or the file, and the way out."""

    status = 2


def one_line(error: object, limit: int = 300) -> str:
    """The words of an error in one line of at most `limit` characters; its class, where it has no words."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
