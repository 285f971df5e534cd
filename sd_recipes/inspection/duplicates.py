"""Rows that are alike: by equal 64-bit digests, and by perceptual hashes that differ in few bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BANDS = 4
NEAR_BITS = BANDS - 1  # hashes that differ in fewer bits than there are bands agree in one band
LISTED = 10  # rows of a group that are named
WINDOW = 256  # neighbours in sorted order with which a hash is compared


@dataclass
class Group:
    """Rows that are alike: how many, and the first of them."""

    num_rows: int
    first_rows: list[int]


@dataclass
class Groups:
    """All groups of rows that are alike: how many, the rows in them, and the largest, largest first."""

    num_groups: int
    num_rows: int
    largest: list[Group]
    complete: bool = True  # whether every pair was compared that can be near

    @property
    def num_surplus(self) -> int:
        """Rows to leave out, so that one of each group remains."""
        return self.num_rows - self.num_groups


def equal_groups(digests: np.ndarray, limit: int) -> Groups:
    """Groups of equal values in `digests`, uint64 (n,), of which the `limit` largest are listed."""
    return _groups(digests, limit)


def near_groups(hashes: np.ndarray, limit: int) -> Groups:
    """Groups of rows linked by hashes, uint64 (n,), that differ in at most NEAR_BITS bits.

    Two such hashes agree in at least one of BANDS bands of 16 bits. So the hashes are sorted by each
    band in turn, and only those that share it are compared: in practice a few million comparisons for a million
    rows, instead of 5 · 10¹¹. Of a band that more than WINDOW different hashes share, those are compared that
    lie within WINDOW of each other in sorted order; `complete` is then False.
    """
    values, inverse = np.unique(hashes, return_inverse=True)
    labels = np.arange(len(values))
    complete = True
    for band in range(BANDS):
        order, ordered = _sorted_by_band(values, band)
        bands = (ordered >> np.uint64(48)).astype(np.uint16)
        complete &= not np.any(bands[WINDOW:] == bands[:-WINDOW])
        for left, right in _neighbours(bands):
            near = np.bitwise_count(ordered[left] ^ ordered[right]) <= NEAR_BITS
            labels = _link(labels, order[left[near]], order[right[near]])
    return _groups(labels[inverse], limit, complete)


def _sorted_by_band(values: np.ndarray, band: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of `values` when a band of theirs is turned to the front, and the turned values in that order."""
    turn = np.uint64(16 * band)
    rotated = (values << turn) | (values >> (np.uint64(64) - turn)) if band else values
    order = np.argsort(rotated, kind="stable")
    return order, rotated[order]


def _neighbours(bands: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of pairs that share a value in `bands`, which are sorted, one distance after another."""
    left = np.arange(len(bands))
    for distance in range(1, WINDOW + 1):
        left = left[left < len(bands) - distance]
        # Sorted: where the band differs at this distance, it differs at every greater one.
        left = left[bands[left] == bands[left + distance]]
        if len(left) == 0:
            return
        yield left, left + distance


def _link(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Labels (n,), each the smallest member of a group, after the groups of the pairs (left, right) are joined."""
    while len(left):
        a, b = labels[left], labels[right]
        low, high = np.minimum(a, b), np.maximum(a, b)
        apart = low < high
        if not apart.any():
            break
        left, right = left[apart], right[apart]
        labels = labels.copy()
        np.minimum.at(labels, high[apart], low[apart])
        while True:  # follow the pointers to the smallest member
            shorter = labels[labels]
            if np.array_equal(shorter, labels):
                break
            labels = shorter
    return labels


def _groups(labels: np.ndarray, limit: int, complete: bool = True) -> Groups:
    """Rows of equal label as groups."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(labels[order]) != 0]) if len(labels) else np.zeros(0, int)
    sizes = np.diff(np.r_[starts, len(labels)])
    several = np.flatnonzero(sizes > 1)
    largest = several[np.argsort(-sizes[several], kind="stable")][:limit]
    listed = [
        Group(int(sizes[group]), order[starts[group] : starts[group] + min(sizes[group], LISTED)].tolist())
        for group in largest
    ]
    return Groups(len(several), int(sizes[several].sum()), listed, complete)
