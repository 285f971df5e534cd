"""Rows that are alike, by equal 64-bit digests, and by perceptual hashes that differ in only a few bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BANDS = 4
NEAR_BITS = BANDS - 1  # hashes that differ in fewer bits than there are bands agree in a whole band
LISTED = 10  # rows of a group that are named
WINDOW = 256  # neighbours in sorted order that a hash is compared with


@dataclass
class Group:
    """Rows that are alike: how many, and the first of them."""

    num_rows: int
    first_rows: list[int]


@dataclass
class Groups:
    """All groups of rows that are alike: how many, how many rows in them, and the largest, largest first."""

    num_groups: int
    num_rows: int
    largest: list[Group]
    complete: bool = True  # whether every pair that can be near was compared

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
    rows, instead of 5 · 10¹¹. Where more than WINDOW different hashes share a band, only those
    within WINDOW of each other in sorted order are compared; `complete` is then False.
    """
    values, inverse = np.unique(hashes, return_inverse=True)
    labels = np.arange(len(values), dtype=np.int32)
    complete = True
    for band in range(BANDS):
        order, ordered = _sorted_by_band(values, band)
        bands = (ordered >> np.uint64(48)).astype(np.uint16)
        complete &= not np.any(bands[WINDOW:] == bands[:-WINDOW])
        for pairs in _near_pairs(ordered, bands):
            labels = _link(labels, order[pairs])
    return _groups(labels[inverse], limit, complete)


def _sorted_by_band(values: np.ndarray, band: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of `values` when one of their bands is rotated to the front, and the rotated values in that order."""
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


def _near_pairs(ordered: np.ndarray, bands: np.ndarray) -> Iterator[np.ndarray]:
    """Positions (2, m) of neighbours that are near, many at a time: linking them is a pass over all labels."""
    pairs, number = [], 0
    for left, right in _neighbours(bands):
        near = np.bitwise_count(ordered[left] ^ ordered[right]) <= NEAR_BITS
        pairs.append(np.stack([left[near], right[near]]))
        number += pairs[-1].shape[1]
        if number >= len(bands) // 4:
            yield np.concatenate(pairs, axis=1)
            pairs, number = [], 0
    if number:
        yield np.concatenate(pairs, axis=1)


def _link(labels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Labels (n,) after the groups of the pairs (2, m) are joined; in the order of a group's first member."""
    left, right = labels[pairs]
    apart = left != right
    joined = coo_array((np.ones(apart.sum(), bool), (left[apart], right[apart])), shape=(len(labels),) * 2)
    return connected_components(joined, directed=False)[1][labels]


def _groups(labels: np.ndarray, limit: int, complete: bool = True) -> Groups:
    """Rows with equal labels as groups."""
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
