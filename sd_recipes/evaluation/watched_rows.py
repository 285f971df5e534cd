"""What the rows are that every validation looks at: their names, captions and thumbnails, for people to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sd_recipes.data.bad_rows import BadRow, row_name
from sd_recipes.data.captions import make_caption
from sd_recipes.data.first_words import FIRST
from sd_recipes.data.held_out import FixedRows
from sd_recipes.evaluation.sample_errors import HELD_OUT
from sd_recipes.recipe import Recipe
from sd_recipes.redaction import in_texts, redacted
from sd_recipes.runtime.trackers import VALIDATION
from sd_recipes.writing import replacing

ROWS = "rows.parquet"
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
        columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
        for which, fixed in self.sets.items():
            for row in range(len(fixed)):
                caption = self._caption(fixed.rows[row])
                values = (which, row, self.name(which, row), caption, thumbnails.get((which, row)))
                for column, value in zip(columns.values(), in_texts(redacted, values), strict=True):
                    column.append(value)
        folder = output_dir / VALIDATION
        folder.mkdir(exist_ok=True)
        with replacing(folder / ROWS) as beside:
            pq.write_table(pa.table(columns, SCHEMA), beside)

    def name(self, which: str, row: int) -> str:
        """What a set's row is called, by its number in what it was chosen from."""
        fixed = self.sets[which]
        return row_name(int(fixed.numbers[row]), fixed.rows[row].get(self.recipe.image_column), streamed=False)

    def captions(self, number: int) -> list[str]:
        """Captions of at most so many held-out rows, spread over all of them; each once, and none that is blank."""
        fixed = self.sets[HELD_OUT]
        number = min(number, len(fixed))
        found = [self._caption(fixed.rows[place * len(fixed) // number]) for place in range(number)]
        return list(dict.fromkeys(filter(None, found)))

    def _caption(self, row: dict[str, object]) -> str:
        """The row's caption, the first of several; empty if it has none."""
        try:
            return make_caption(row, self.recipe, FIRST).strip()
        except BadRow:
            return ""
