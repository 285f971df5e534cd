"""Row to caption to input_ids."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPTokenizer


class CaptionError(ValueError):
    """A caption that is neither a string nor a list of strings."""


def choose_caption(value: Any, choice_u: float) -> str:
    """The caption itself, or of a list the one at `choice_u` in [0, 1). Raises CaptionError."""
    if isinstance(value, list) and value:
        value = value[int(choice_u * len(value))]
    if not isinstance(value, str):
        raise CaptionError(f"a caption must be a string or a list of strings, not {value!r}")
    return value


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Captions to input_ids (B, tokenizer.model_max_length), int64; longer ones are cut."""
    return tokenizer(
        captions,
        max_length=tokenizer.model_max_length,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    ).input_ids
