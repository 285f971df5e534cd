"""What the rows are that every validation looks at: their names, captions and thumbnails, for people to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from sd_recipes.data.bad_rows import BadRow, row_name
from sd_recipes.data.captions import make_caption, undisturbed
from sd_recipes.data.first_words import FIRST
from sd_recipes.data.held_out import FixedRows
from sd_recipes.data.sizes import square_side
from sd_recipes.evaluation.real_pictures import real_pictures
from sd_recipes.evaluation.sample_errors import HELD_OUT, TRAIN, thumbnail
from sd_recipes.recipe import Recipe
from sd_recipes.redaction import in_texts, redacted
from sd_recipes.runtime.trackers import VALIDATION
from sd_recipes.writing import replacing

ROWS, HARDEST_ROWS = "rows.parquet", "hardest_rows.parquet"
SCHEMA = pa.schema(
    {"set": pa.string(), "row": pa.int32(), "name": pa.string(), "caption": pa.string(), "thumbnail": pa.binary()}
)


@dataclass(frozen=True)
class WatchedRows:
    """The rows of each set."""

    sets: Mapping[str, FixedRows]
    recipe: Recipe

    def write(self, output_dir: Path, thumbnails: Mapping[tuple[str, int], bytes]) -> None:
        """Write rows.parquet, with thumbnails by set and row where there are some. Raises OSError."""
        described = [
            (which, row, *describe(fixed.rows[row], number, self.recipe), thumbnails.get((which, row)))
            for which, fixed in self.sets.items()
            for row, number in enumerate(fixed.numbers.tolist())
        ]
        write_rows(described, output_dir / VALIDATION / ROWS)

    def captions(self, number: int) -> list[str]:
        """Captions of at most so many held-out rows, spread over all of them; each once, and none that is blank."""
        fixed = self.sets[HELD_OUT]
        number = min(number, len(fixed))
        found = [caption_of(fixed.rows[place * len(fixed) // number], self.recipe) for place in range(number)]
        return list(dict.fromkeys(filter(None, found)))


def write_hardest_rows(rows: datasets.Dataset, numbers: Sequence[int], recipe: Recipe, output_dir: Path) -> None:
    """Write hardest_rows.parquet: what the rows of these numbers are, of those that are trained on. Raises OSError."""
    side = square_side(recipe)
    chosen = rows.select(numbers)
    pictures = {place: thumbnail(pixels) for place, pixels in real_pictures(chosen, recipe, (side, side))}
    described = [
        (TRAIN, number, *describe(chosen[place], number, recipe), pictures.get(place))
        for place, number in enumerate(numbers)
    ]
    write_rows(described, output_dir / VALIDATION / HARDEST_ROWS)


def write_rows(described: Sequence[tuple[str, int, str, str, bytes | None]], path: Path) -> None:
    """A table of rows: set, row, name, caption, thumbnail. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    columns = zip(*in_texts(redacted, list(described)), strict=True) if described else [[] for _ in SCHEMA]
    with replacing(path) as beside:
        pq.write_table(pa.table(dict(zip(SCHEMA.names, map(list, columns), strict=True)), SCHEMA), beside)


def describe(row: Mapping[str, Any], number: int, recipe: Recipe) -> tuple[str, str]:
    """A row's name, and its caption: the first of several, empty if it has none."""
    return row_name(number, row.get(recipe.image_column)), caption_of(row, recipe)


def caption_of(row: Mapping[str, Any], recipe: Recipe) -> str:
    """The first of a row's captions, without what training leaves out of it or mixes up; empty if it has none."""
    try:
        return make_caption(dict(row), undisturbed(recipe), FIRST).strip()
    except BadRow:
        return ""
