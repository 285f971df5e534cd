"""Class pictures, for prior preservation: which of them comes beside which sample of a run.

Every sample that is trained has one beside it, in a micro-batch of its own (Ruiz et al. 2022, section 3.2: L_PR): its
row is a function of the seed and of the sample's position, so that neither a resumed run nor the number of processes
and micro-batches changes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from sd_recipes.data.draws import generator
from sd_recipes.data.order import GlobalBatch

CLASS_PURPOSE = 0xE710  # keeps the keys of these permutations apart from all others
# Added to the position of the sample that a class picture comes beside: its draws are its own. Exact in float64, in
# which the quiet loss sorts by positions.
CLASS_POSITIONS = 2**50


@dataclass(frozen=True)
class ClassRows:
    """The last rows of a data set, which are class pictures; their losses have this weight."""

    first_row: int
    num_rows: int
    seed: int
    weight: float
    sizes: tuple[tuple[int, int], ...]
    buckets: np.ndarray | None  # of all rows of the data set

    def all_come_beside(self, samples: range) -> bool:
        """Whether all of them come beside these samples of a run: one of their permutations lies whole within."""
        return math.ceil(samples.start / self.num_rows) < samples.stop // self.num_rows

    def beside(self, batch: GlobalBatch) -> list[GlobalBatch]:
        """The class pictures beside a global batch, in one batch for each of their sizes.

        They go through permutations of their own, one after the other: none comes again before all have come.
        """
        uses = batch.position + np.arange(len(batch.rows))
        rows = np.empty(len(uses), dtype=np.int64)
        for number in np.unique(uses // self.num_rows):
            order = generator(self.seed, int(number), CLASS_PURPOSE).permutation(self.num_rows)
            own = uses // self.num_rows == number
            rows[own] = self.first_row + order[uses[own] % self.num_rows]
        buckets = np.zeros(len(rows), dtype=np.int64) if self.buckets is None else self.buckets[rows]
        whole = replace(batch, position=batch.position + CLASS_POSITIONS, weight=self.weight, is_class=True)
        return [
            replace(
                whole, rows=rows[buckets == bucket], places=np.flatnonzero(buckets == bucket), size=self.sizes[bucket]
            )
            for bucket in np.unique(buckets).tolist()
        ]
