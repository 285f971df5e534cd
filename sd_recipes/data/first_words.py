"""The first lines of a run: what the data were taken for, so that a wrong reading is seen at once."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import replace
from typing import Any

from sd_recipes.data.bad_rows import BadRow
from sd_recipes.data.captions import make_caption
from sd_recipes.data.draws import draw
from sd_recipes.data.recognised import Recognised
from sd_recipes.errors import one_line
from sd_recipes.recipe import DataSettings

NUM_EXAMPLES = 3
SHOWN_LENGTH = 100  # of an example
FIRST = draw(0, 0, stratum=0, global_batch_size=1, latent_shape=(1, 1, 1), num_train_timesteps=1)


def example_captions(rows: Any, config: DataSettings) -> list[str]:
    """Captions of three rows spread over a data set, or of the first of a list of rows, as training draws them.

    None is dropped as a whole, since that would show nothing.
    """
    config = config.model_copy(update={"caption_dropout": 0.0})
    places: Iterable[int] = range(len(rows))
    if len(rows) > NUM_EXAMPLES:
        places = [number * (len(rows) - 1) // (NUM_EXAMPLES - 1) for number in range(NUM_EXAMPLES)]
    found = []
    for position, place in enumerate(places):
        try:
            found.append(make_caption(rows[place], config, replace(FIRST, position=position)))
        except BadRow:
            continue
    return found


def first_words(
    config: DataSettings,
    recognised: list[Recognised],
    num_rows: int | None,
    examples: list[str],
    held_out: Sized | None = None,
) -> str:
    """What each source is, where captions come from, with examples, and what was passed over or held out."""
    lines = []
    for source, found in zip(config.sources, recognised, strict=True):
        captions = f", captions from {found.captions}" if found.captions else ""
        lines.append(f"  {'data':<21}{source.flag}: {found.layout}{captions}")
        lines += [f"  {'':<21}{note}" for note in found.notes]
    of_held_out = f", and {len(held_out):,} held out" if held_out is not None else ""
    lines.append(f"  {'rows':<21}{'a stream' if num_rows is None else f'{num_rows:,}'}{of_held_out}")
    for number, caption in enumerate(examples):
        shown = one_line(caption, SHOWN_LENGTH) if caption.strip() else ""
        lines.append(f"  {'' if number else 'captions, some':<21}{shown!r}")
    return "\n".join(lines)
