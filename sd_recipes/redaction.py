"""Keep secrets out of a run's files and messages: passwords, tokens and signatures; and paths, in what is shared.

Data may be read from a URL with a signature or a token in its query. Wherever the URL is written, `LEFT_OUT` replaces
its secrets. This module imports nothing from the package, since the recipe uses it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEFT_OUT = "[left-out]"

# user:password@ before a host; a password may hold a slash that should have been written %2F.
LOGIN = re.compile(r"://(?:[^\s/?#]+|[^\s/?#:@]+:(?!:|\d*(?:[/?#\s]|$))[^\s@]*)@")
# The value of a query (or fragment) parameter whose name suggests a secret, or which looks like one itself.
_NAMES = (
    r"[\w.%-]*(?:token|sig|secret|passw|pwd|passphrase|key|credential|policy|auth|session|jwt)[\w.%-]*"
    r"|[\w.%-]+(?==(?=\S*[0-9])(?=\S*[A-Za-z])[\w+/=%~-]{24,}(?:[&#\"<>\s]|$))"
)
QUERY = re.compile(rf"(?<=[?&;#])({_NAMES})=[^\s&#\"<>]+", re.IGNORECASE)
TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:hf|api_org)_[A-Za-z0-9]{12,}"  # Hugging Face
    r"|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"  # GitHub, GitLab
    r"|sk-[\w-]{16,}|xox[a-z]-[\w-]{8,}|AIza[\w-]{30,}"  # OpenAI and others, Slack, Google
    r"|(?:AKIA|ASIA)[0-9A-Z]{12,}"  # AWS
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JSON web tokens
    r")"
)
HEADER = re.compile(r"(\bbearer\s+|\bauthorization\W{1,4}(?:\w+\s+)?)[\w.~+/-]{12,}=*", re.IGNORECASE)
ASSIGNED = re.compile(
    r"(\b(?:AccountKey|SharedAccessSignature|aws_secret_access_key|aws_session_token)['\"]?\s*[=:]['\"\s]*)[^\s;,'\"]+",
    re.IGNORECASE,
)


def has_login(text: str) -> bool:
    """Whether the text has a URL with a user name or password in it."""
    return LOGIN.search(text) is not None


def redacted(text: str) -> str:
    """The text with `LEFT_OUT` in place of everything that looks like a secret; unchanged if nothing does."""
    text = LOGIN.sub(f"://{LEFT_OUT}@", text)
    text = QUERY.sub(rf"\1={LEFT_OUT}", text)
    text = HEADER.sub(rf"\1{LEFT_OUT}", text)
    text = ASSIGNED.sub(rf"\1{LEFT_OUT}", text)
    return TOKEN.sub(LEFT_OUT, text)


def in_texts(change: Callable[[str], str], value: Any) -> Any:
    """The value with `change` applied to each string in it, in lists and mappings too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: in_texts(change, each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(in_texts(change, each) for each in value)
    return value


def without_folders(text: str) -> str:
    """The last part of a path on this machine, since its folders may reveal user names. Anything else is unchanged."""
    is_path = re.search(r"^(?:file:|[A-Za-z]:[\\/]|\.{0,2}[\\/]|~)|::(?:file:)?[/~]", text)
    if not is_path and ("://" in text or not _exists(text)):
        return text
    return re.split(r"[\\/]", text.rstrip("\\/"))[-1] or text


def shown(name: str) -> str:
    """The name of a model or data set in a form that may be shared."""
    return without_folders(redacted(name))


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a path, or not one at all
        return False
