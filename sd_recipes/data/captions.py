"""Row to caption to input_ids."""

from __future__ import annotations

import functools
import reprlib
import string
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sd_recipes.data.bad_rows import BadRow
from sd_recipes.data.draws import Draws
from sd_recipes.data.tags import arrange_tags
from sd_recipes.data.wildcards import fill_wildcards
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import CaptionConfig

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTokenizer


AnyConfig = TypeVar("AnyConfig", bound=CaptionConfig)


class CaptionError(BadRow):
    """A caption that cannot be used: missing or blank, not text, or too long; the message says which."""


UNDISTURBED = {
    "caption_dropout": 0.0, "caption_dropout_every_n_epochs": 0, "caption_tag_dropout_rate": 0.0, "shuffle_tags": False,
}  # fmt: skip
DEFECT = "__defect__"  # the column that says why a reader could not make a row whole


def undisturbed(config: AnyConfig) -> AnyConfig:
    """These settings without what training leaves out of captions, or mixes up, at random."""
    return config.model_copy(update=UNDISTURBED)


def caption_columns(config: CaptionConfig) -> list[str]:
    """The columns that captions are made of. Raises RecipeError for a template that cannot be filled."""
    if config.caption_template is not None:
        return list(dict.fromkeys(field for _, field in _parts(config.caption_template) if field is not None))
    return config.caption_columns or [config.caption_column]


def make_caption(row: dict[str, Any], config: CaptionConfig, drawn: Draws) -> str:
    """The caption of a row, by the sample's draws: column, choice in a list, wildcards, tags and their order, dropout.

    Blank columns, and blank members of a list, are not drawn while others are usable. In a template, lists of the
    same length are read at the same place. Raises CaptionError for a value that is not text and, unless blank captions
    are to be empty, for a row without a caption, and BadRow for one that its reader could not make whole; whether it
    does never depends on the draws.
    """
    if row.get(DEFECT):
        raise BadRow(row[DEFECT])
    columns = caption_columns(config)
    texts = {column: _texts(row.get(column), column, numbers=bool(config.caption_template)) for column in columns}
    usable = {column: [text for text in texts[column] if text.strip()] for column in columns}
    missing, where = [column for column in columns if not usable[column]], ""
    if config.caption_template and not missing:
        usable = _without_gaps(texts)
        missing, where = [column for column in columns if not usable[column]], ", at every place in one of them"
    if missing and (config.caption_template or missing == columns):
        if config.blank_captions == "empty":
            return ""
        raise CaptionError(
            f"no caption: blank or missing in {', '.join(missing)}{where} (--blank_captions empty would train without "
            "one)"
        )
    if drawn.dropout_u < config.caption_dropout:
        return ""
    if config.caption_template is not None:
        caption = "".join(
            literal if field is None else literal + _pick(usable[field], drawn.caption_u)[0]
            for literal, field in _parts(config.caption_template)
        )
    else:
        options, rest_u = _pick([usable[column] for column in columns if usable[column]], drawn.caption_u)
        caption, _ = _pick(options, rest_u)
    return worded(caption, config, drawn)


def worded(text: str, config: CaptionConfig, drawn: Draws) -> str:
    """A text of a row as a caption: with prefix and suffix, and with wildcards and tags as the sample draws them."""
    caption = " ".join(filter(None, (config.caption_prefix, text, config.caption_suffix)))
    if config.enable_wildcard:
        caption = fill_wildcards(caption, drawn.wildcard_us())
    return arrange_tags(caption, config, drawn)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], config: CaptionConfig) -> torch.Tensor:
    """Captions to input_ids (B, L), int64, where L is tokenizer.model_max_length; with chunks, (B, caption_chunks · L).

    Each chunk holds up to L - 2 tokens in order, between the begin and end tokens, then padding. A caption that ends
    before the last chunk is followed by empty chunks, and what does not fit into them is cut.
    Raises CaptionError for a caption over the limit where that is an error.
    """
    import torch  # here, since it takes a second and inspection without a model does not need it

    length = tokenizer.model_max_length
    room = length - 2
    num_chunks = config.caption_chunks if config.long_captions == "chunk" else 1
    input_ids = np.full((len(captions), num_chunks, length), tokenizer.pad_token_id, dtype=np.int64)
    input_ids[:, :, 0] = tokenizer.bos_token_id
    for chunks, tokens, caption in zip(input_ids, _tokens(tokenizer, captions), captions, strict=True):
        if len(tokens) > room and config.long_captions == "error":
            raise CaptionError(
                f"a caption of {len(tokens)} tokens where {room} fit, which --long_captions truncate would cut "
                f"and chunk would keep: {reprlib.repr(caption)}"
            )
        for number, chunk in enumerate(chunks):
            piece = tokens[number * room : (number + 1) * room]
            chunk[1 : 1 + len(piece)] = piece
            chunk[1 + len(piece)] = tokenizer.eos_token_id
    return torch.from_numpy(input_ids.reshape(len(captions), num_chunks * length))


def count_tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> list[int]:
    """The number of each caption's tokens, without the begin and end tokens."""
    return [len(tokens) for tokens in _tokens(tokenizer, captions)]


def _tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> list[list[int]]:
    if not captions:
        return []
    # Not verbose: it would warn about captions over the model's limit, which are handled here.
    return tokenizer(captions, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids


@functools.lru_cache
def _parts(template: str) -> list[tuple[str, str | None]]:
    """Literal texts, each with the column that follows it, or None. Raises RecipeError."""
    flag = f"--caption_template {template!r}"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise RecipeError(f"{flag}: {str(error).lower()}; write a literal brace twice") from None
    for _, field, form, conversion in parts:
        if field is not None and (not field.strip() or form or conversion):
            raise RecipeError(f"{flag}: between braces there may only be the name of a column")
    if all(field is None for _, field, _, _ in parts):
        raise RecipeError(f'{flag} names no column: put one between braces, as in "a photo of {{name}}"')
    return [(literal, field) for literal, field, _, _ in parts]


def _texts(value: Any, column: str, *, numbers: bool) -> list[str]:
    """The texts in a column's value, "" for a missing one (None or NaN). Raises CaptionError."""
    texts = []
    for text in value if isinstance(value, list | tuple) else [value]:
        if is_missing(text):
            text = ""
        if numbers and isinstance(text, int | float):
            text = str(text)
        if not isinstance(text, str):
            raise CaptionError(
                f"column {column} holds {reprlib.repr(value)}, where a caption is a string or a list of strings"
            )
        texts.append(text)
    return texts


def is_missing(value: Any) -> bool:
    """Whether a column has no value in a row: None, or NaN, which pandas writes instead."""
    return value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def _without_gaps(texts: dict[str, list[str]]) -> dict[str, list[str]]:
    """The columns' texts at the places where no list of the same length has a blank, so that such lists still match."""
    blank = {(len(column), place) for column in texts.values() for place, text in enumerate(column) if not text.strip()}
    return {
        name: [text for place, text in enumerate(column) if (len(column), place) not in blank]
        for name, column in texts.items()
    }


def _pick(options: list[Any], u: float) -> tuple[Any, float]:
    """The option at `u` in [0, 1), and what is left of `u`, again uniform in [0, 1)."""
    place = u * len(options)
    number = min(int(place), len(options) - 1)
    return options[number], place - number
