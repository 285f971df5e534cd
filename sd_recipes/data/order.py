"""Which rows form which global batch: a function of the seed and of the number of samples seen.

The position of a run is that one number. Every row comes once an epoch; an epoch's last global
batch is smaller where the rows do not divide. A process takes every world-size-th sample of a
global batch, so the shares of a small one differ by at most one sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

ORDER_PURPOSE = 0xE70C  # keeps the permutation's key apart from those of the samples' draws


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step, over all processes and micro-batches."""

    rows: np.ndarray  # (M,) indices into the data set
    position: int  # of the first sample in the run
    ends_epoch: bool


@dataclass(frozen=True)
class MicroBatch:
    """What one process feeds through the model at once."""

    rows: np.ndarray  # (B,)
    positions: np.ndarray  # (B,) of the samples in the run
    strata: np.ndarray  # (B,) index of each sample in its global batch
    global_batch_size: int  # M
    weight: float  # 0 if this process has no share of the global batch and only joins the collectives
    is_last: bool  # the optimizer steps after it
    samples_seen: int  # by the run, when the global batch is done
    ends_epoch: bool


@dataclass(frozen=True)
class Order:
    """Epochs, permutations and global batches of `num_rows` rows."""

    num_rows: int
    global_batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.global_batch_size)

    def permutation(self, epoch: int) -> np.ndarray:
        """(num_rows,) order of the rows in an epoch."""
        key = np.array([self.seed, epoch], dtype=np.uint64)
        counter = np.array([0, 0, 0, ORDER_PURPOSE], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter)).permutation(self.num_rows)

    def batches_from(self, samples_seen: int):
        """Yield the global batches that follow, without end."""
        while True:
            epoch, start = divmod(samples_seen, self.num_rows)
            permutation = self.permutation(epoch)
            for first in range(start, self.num_rows, self.global_batch_size):
                rows = permutation[first : first + self.global_batch_size]
                ends_epoch = first + len(rows) == self.num_rows
                yield GlobalBatch(rows=rows, position=epoch * self.num_rows + first, ends_epoch=ends_epoch)
            samples_seen = (epoch + 1) * self.num_rows


def share(batch: GlobalBatch, *, rank: int, world_size: int, micro_batch_size: int) -> list[MicroBatch]:
    """The micro-batches of one process; at least one, whose weight is 0 if there is no sample for it."""
    strata = np.arange(len(batch.rows))[rank::world_size]
    weight = 1.0
    if len(strata) == 0:  # the other processes wait for this one's gradients
        strata, weight = np.zeros(1, dtype=np.int64), 0.0
    starts = range(0, len(strata), micro_batch_size)
    return [
        MicroBatch(
            rows=batch.rows[chosen],
            positions=batch.position + chosen,
            strata=chosen,
            global_batch_size=len(batch.rows),
            weight=weight,
            is_last=start == starts[-1],
            samples_seen=batch.position + len(batch.rows),
            ends_epoch=batch.ends_epoch,
        )
        for start in starts
        for chosen in [strata[start : start + micro_batch_size]]
    ]
