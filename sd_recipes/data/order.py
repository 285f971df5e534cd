"""Which rows form which global batch: a function of the seed and of the number of samples seen.

The position of a run is that one number. Every row comes once per epoch; a global batch is smaller
where the rows of an epoch, or of a bucket, do not divide evenly. A process takes every world-size-th sample
of a global batch, so the shares of a small one differ by at most one sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sd_recipes.data.draws import generator

# They keep the keys of these permutations apart from those of the samples' draws and from each other.
ORDER_PURPOSE, SOURCE_PURPOSE, BATCHES_PURPOSE, STRATA_PURPOSE = 0xE70C, 0xE70D, 0xE70E, 0xE70F


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts proportional to `weights`, none of which shrinks as the total grows.

    Webster's method: the n-th unit of a part comes at (n - ½) / weight, the middle of its span, and the first `total`
    of all parts' units are dealt.
    """
    exact = total * np.asarray(weights, dtype=np.float64) / sum(weights)
    parts = np.rint(exact).astype(int).tolist()  # those units, give or take a few
    while True:
        last = max(
            ((part - 0.5) / weight, number) for number, (part, weight) in enumerate(zip(parts, weights, strict=True))
        )
        following = min(
            ((part + 0.5) / weight, number) for number, (part, weight) in enumerate(zip(parts, weights, strict=True))
        )
        missing = total - sum(parts)
        if missing == 0 and last < following:
            return parts
        if missing <= 0:
            parts[last[1]] -= 1
        if missing >= 0:
            parts[following[1]] += 1


def portion(number: int, size: int, weights: Sequence[float]) -> list[range]:
    """Which of its samples each source gives to portion `number`, of `size` samples, of a run: its next ones.

    What rounding leaves of a source's share is carried over, so that even the smallest source has its turn.
    """
    starts, ends = apportion(number * size, weights), apportion((number + 1) * size, weights)
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step, over all processes and micro-batches; or class pictures beside them."""

    rows: np.ndarray  # (M,) indices into the data set
    position: int  # of the step's first sample in the run
    ends_epoch: bool
    epoch: int
    size: tuple[int, int]  # (height, width) of its images, in pixels
    samples_seen: int  # by the run, when the step is done
    num_samples: int  # that are trained in the step
    places: np.ndarray  # (M,) of the rows, among these
    weight: float = 1.0  # of each loss
    is_class: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """What one process feeds through the model at once."""

    rows: np.ndarray  # (B,)
    positions: np.ndarray  # (B,) of the samples in the run
    strata: np.ndarray  # (B,) each sample's slice of the timesteps, out of as many as its global batch has samples
    global_batch_size: int  # M
    weight: float  # of each loss; 0 if this process has no share of the global batch and only joins the collectives
    is_last: bool  # the optimizer steps after it
    samples_seen: int  # by the run, when the global batch is done
    ends_epoch: bool
    epoch: int
    size: tuple[int, int]  # (height, width) of the images, in pixels
    is_class: bool = False  # of class pictures, for prior preservation
    # For a stream: the rows themselves, and where this process's stream stands when the global batch is done.
    examples: tuple[dict[str, Any], ...] | None = field(default=None, repr=False)
    stream_state: dict[str, Any] | None = None


@dataclass(frozen=True)
class Order:
    """Epochs, permutations and global batches of the rows of one or several sources.

    `source_lengths` are those of the sources that make up the data set, one after the other; an epoch has as
    many samples as there are rows, shared out by `source_weights` (default: by length, each row once).
    With `buckets`, (num_rows,) indices into `sizes`, every global batch has rows of one bucket only.
    """

    source_lengths: tuple[int, ...]
    global_batch_size: int
    seed: int
    source_weights: tuple[float, ...] | None = None
    sizes: tuple[tuple[int, int], ...] = ((512, 512),)
    buckets: np.ndarray | None = None
    begun: tuple[int, int] | None = None  # with buckets: an epoch, and the other global batch size it began with

    @property
    def num_rows(self) -> int:
        return sum(self.source_lengths)

    @property
    def has_all_rows(self) -> bool:
        """Whether every epoch has each row; one of weighted sources may leave some to the next."""
        return self.source_weights is None

    def num_steps(self, num_epochs: int, samples_seen: int = 0) -> int:
        """Optimizer steps from a position until `num_epochs` epochs are over."""
        epoch, first = divmod(samples_seen, self.num_rows)
        if epoch >= num_epochs:
            return 0
        if self.buckets is None:
            left_of_epoch = math.ceil((self.num_rows - first) / self.global_batch_size)
            return left_of_epoch + (num_epochs - epoch - 1) * math.ceil(self.num_rows / self.global_batch_size)
        return sum(
            len(self._epoch_batches(each, first if each == epoch else 0)[1]) for each in range(epoch, num_epochs)
        )

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """(num_rows,) the rows of an epoch, in order."""
        if self.source_weights is None:
            return generator(self.seed, epoch, ORDER_PURPOSE).permutation(self.num_rows)
        chosen, first_row = [], 0
        portions = portion(epoch, self.num_rows, self.source_weights)
        for source, (length, of_source) in enumerate(zip(self.source_lengths, portions, strict=True)):
            # A source goes through its own permutations, one after the other, whatever the run's epoch.
            uses = np.array(of_source, dtype=np.int64)
            for pass_number in np.unique(uses // length):
                order = generator(self.seed, int(pass_number), SOURCE_PURPOSE, part=source).permutation(length)
                chosen.append(first_row + order[uses[uses // length == pass_number] % length])
            first_row += length
        return generator(self.seed, epoch, ORDER_PURPOSE).permutation(np.concatenate(chosen))

    def _epoch_batches(self, epoch: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of an epoch in the order of its batches, and the offsets beyond `first` at which the batches end."""
        rows, step = self.epoch_rows(epoch), self.global_batch_size
        if self.buckets is None:  # from the position on, whatever the batch size was before it
            return rows, np.append(np.arange(first + step, self.num_rows, step), self.num_rows)
        if self.begun and epoch == self.begun[0]:  # another size would make rows come twice or never
            step = self.begun[1]
        batches = []
        buckets = self.buckets[rows]
        for bucket in np.unique(buckets):
            of_bucket = rows[buckets == bucket]
            batches += [of_bucket[start : start + step] for start in range(0, len(of_bucket), step)]
        order = generator(self.seed, epoch, BATCHES_PURPOSE).permutation(len(batches))
        batches = [batches[number] for number in order]
        ends = np.cumsum([len(batch) for batch in batches])
        return np.concatenate(batches), ends[ends > first]

    def batches_from(self, samples_seen: int) -> Iterator[GlobalBatch]:
        """Yield the following global batches, without end."""
        for epoch in itertools.count(samples_seen // self.num_rows):
            first = max(0, samples_seen - epoch * self.num_rows)
            rows, ends = self._epoch_batches(epoch, first)
            for end in ends.tolist():
                yield GlobalBatch(
                    rows=rows[first:end],
                    position=epoch * self.num_rows + first,
                    samples_seen=epoch * self.num_rows + end,
                    num_samples=end - first,
                    places=np.arange(end - first),
                    ends_epoch=end == self.num_rows,
                    epoch=epoch,
                    size=self.sizes[0 if self.buckets is None else self.buckets[rows[first]]],
                )
                first = end


def share(batch: GlobalBatch, *, rank: int, world_size: int, micro_batch_size: int) -> list[MicroBatch]:
    """The micro-batches of one process: as many on every process, with weight 0 where it has no sample for one."""
    own = np.arange(len(batch.rows))[rank::world_size]
    largest_share = math.ceil(len(batch.rows) / world_size)
    starts = range(0, largest_share, micro_batch_size)
    padding_sample = np.zeros(1, dtype=np.int64)  # the other processes wait for this one's forward pass or gradients
    return [
        MicroBatch(
            rows=batch.rows[chosen],
            positions=batch.position + batch.places[chosen],
            strata=batch.places[chosen],  # the places: rows come in another order every epoch
            global_batch_size=batch.num_samples,
            weight=batch.weight if start < len(own) else 0.0,
            is_last=start == starts[-1],
            samples_seen=batch.samples_seen,
            ends_epoch=batch.ends_epoch,
            epoch=batch.epoch,
            size=batch.size,
            is_class=batch.is_class,
        )
        for start in starts
        for chosen in [own[start : start + micro_batch_size] if start < len(own) else padding_sample]
    ]


def plans_of_order(
    order: Order,
    samples_seen: int,
    stream_state: dict[str, Any] | None = None,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    beside: Callable[[GlobalBatch], list[GlobalBatch]] = lambda batch: [],
) -> Iterator[MicroBatch]:
    """One process's micro-batches from a position on, without end; `stream_state` is for streams only.

    `beside` gives the class pictures that belong to a global batch.
    """
    for batch in order.batches_from(samples_seen):
        parts = [
            share(each, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
            for each in (batch, *beside(batch))
        ]
        *others, last = itertools.chain(*parts)
        yield from (replace(each, is_last=False) for each in others)
        yield last
