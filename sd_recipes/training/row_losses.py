"""How hard each row was to learn, from the losses of training itself, which cost nothing more."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sd_recipes.errors import one_line
from sd_recipes.runtime.trackers import VALIDATION
from sd_recipes.writing import replacing

logger = logging.getLogger(__name__)

TRAINING_ROWS = "training_rows.parquet"
METADATA = b"sd_recipes"
PRIOR = 3  # samples like all others, with which every row begins: a row that was met once says little


def ratios_of(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(N,) how hard rows are, from their sums of log ratios and their numbers of samples; 1 is like the others.

    The geometric mean of a row's ratios over that of all samples, and of `PRIOR` ones. That of all is not 1: the
    running mean lags behind losses that fall, and is an arithmetic one.
    """
    of_all = sums.sum() / max(counts.sum(), 1)
    return np.exp((sums - counts * of_all) / (counts + PRIOR))


class RowLosses:
    """For every row the sum of log(loss / running mean loss at its timestep), and of how many samples.

    A wrong caption makes a row harder than its like as long as it is not learned by heart, at all timesteps. With many
    samples a row, it stands out, and all rows that are trained on are covered.
    """

    def __init__(self, num_rows: int) -> None:
        self.sums = torch.zeros(num_rows, dtype=torch.float64)
        self.counts = torch.zeros(num_rows, dtype=torch.float64)

    def add(self, rows: Tensor, ratios: Tensor) -> None:
        """Add samples of rows, (N,) int64, with their losses over what is usual, (N,) float64."""
        usable = (ratios > 0) & ratios.isfinite()
        self.sums.index_add_(0, rows[usable], ratios[usable].log())
        self.counts.index_add_(0, rows[usable], torch.ones_like(ratios[usable]))

    @property
    def ratios(self) -> np.ndarray:
        """(num_rows,), as `ratios_of`."""
        return ratios_of(self.sums.numpy(), self.counts.numpy())

    def hardest(self, number: int) -> list[int]:
        """The rows with the highest ratios, above 1, at most so many."""
        ratios = self.ratios
        return [int(row) for row in np.argsort(-ratios, kind="stable")[:number] if ratios[row] > 1]

    def save(self, output_dir: Path, step: int) -> None:
        """Write validation/training_rows.parquet: row, samples, log_ratio (the sum). Raises OSError."""
        met = self.counts > 0
        table = pa.table(
            {
                "row": pa.array(met.nonzero()[:, 0].numpy(), pa.int64()),
                "samples": pa.array(self.counts[met].numpy().astype(np.int64)),
                "log_ratio": self.sums[met].numpy(),
            }
        )
        about = {"step": step, "num_rows": len(self.sums)}
        (output_dir / VALIDATION).mkdir(exist_ok=True)
        with replacing(output_dir / VALIDATION / TRAINING_ROWS) as beside:
            pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(about).encode()}), beside)

    def load(self, output_dir: Path) -> None:
        """Go on from what an earlier start of the run had written; from nothing, if its rows were others.

        It may be from a little after the checkpoint that the run resumes from: those samples then count twice.
        """
        path = output_dir / VALIDATION / TRAINING_ROWS
        if not path.is_file():
            return
        try:
            table = pq.read_table(path)
            about = json.loads(table.schema.metadata[METADATA])
            if about["num_rows"] != len(self.sums):
                return
            rows = torch.from_numpy(table["row"].to_numpy().copy())
            self.sums[rows] = torch.from_numpy(table["log_ratio"].to_numpy().copy())
            self.counts[rows] = torch.from_numpy(table["samples"].to_numpy().astype(np.float64))
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
            logger.warning("%s cannot be read (%s): how hard rows were is noted anew.", path, one_line(error, 100))
