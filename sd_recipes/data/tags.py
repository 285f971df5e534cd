"""The tags of a caption: their order, those that are left out, and the marks that say which of them stay."""

from __future__ import annotations

import re

import numpy as np

from sd_recipes.data.draws import Draws
from sd_recipes.recipe import CaptionConfig


def arrange_tags(caption: str, config: CaptionConfig, drawn: Draws) -> str:
    """The caption with its tags shuffled and dropped as the sample draws it, without the marks that say where.

    What stands before the first --keep_tokens_separator, and after the second, stays as it is; in a caption without
    one, the first --keep_tags do. Tags that are joined by --secondary_separator move and are dropped together.
    """
    separator, mark = config.tag_separator, config.keep_tokens_separator
    joint = f"{separator.rstrip()} "
    if mark and mark in caption:
        before, _, rest = caption.partition(mark)
        drawn_from, _, after = rest.partition(mark)
        pieces = [before, _with_drawn_tags(drawn_from, 0, config, drawn), after]
        tags = (tag.strip() for piece in pieces for tag in piece.split(separator))
        caption = joint.join(tag for tag in tags if tag)
    else:
        caption = _with_drawn_tags(caption, config.keep_tags, config, drawn)
    if config.secondary_separator:
        caption = joint.join(part.strip() for part in caption.split(config.secondary_separator))
    return caption


def _with_drawn_tags(caption: str, num_kept: int, config: CaptionConfig, drawn: Draws) -> str:
    """The caption with its tags in the drawn order, except the leading ones to keep; separators stay in place."""
    if not (config.shuffle_tags or config.caption_tag_dropout_rate):
        return caption
    parts = _tags_and_separators(caption, config.tag_separator)
    places = [place for place in range(0, len(parts), 2) if parts[place]][num_kept:]
    tags = [parts[place] for place in places]
    if config.shuffle_tags:
        for place, number in zip(places, np.argsort(drawn.tag_keys(len(tags))), strict=True):
            parts[place] = tags[number]
    if not config.caption_tag_dropout_rate:
        return "".join(parts)
    us = zip(places, drawn.tag_dropout_us(len(places)), strict=True)
    dropped = {place for place, u in us if u < config.caption_tag_dropout_rate}
    left = [place for place in range(0, len(parts), 2) if place not in dropped]
    # A tag that is left takes the separator before it along.
    return "".join(parts[place] if place == left[0] else parts[place - 1] + parts[place] for place in left)


def _tags_and_separators(caption: str, separator: str) -> list[str]:
    """Tags and, between them, the separators with the space around them; joined, they are the stripped caption."""
    caption = caption.strip()
    parts: list[str] = []
    begin = 0
    # The space before a separator is stripped afterwards: a pattern that began with it would retry a long run of
    # spaces from every place in it.
    for found in re.finditer(rf"{re.escape(separator)}\s*", caption):
        tag = caption[begin : found.start()]
        parts += [tag.rstrip(), tag[len(tag.rstrip()) :] + found.group()]
        begin = found.end()
    return [*parts, caption[begin:]]
