"""Which images of features (N, D) lie among others, and which are nearest to them, by blocks of pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

BLOCK = 2048  # images a side, of which kernels and distances are held at once: 32 MB
# Squared distances that differ by less than this share of the features' mean square count as equal: a float32 network
# gives a picture features that differ between batches by up to some 1e-6 of their size, the square of which is less.
ROUNDING = 1e-11


def among(judged: np.ndarray, others: np.ndarray, of_others: np.ndarray, k: int) -> np.ndarray:
    """(1 + R, N) bool: whether an image is no farther from one of the others than that one's k-th nearest of them.

    For each row of counts of the others, of which those are there that come once or more.
    """
    # So many that k of them are there in all resamples: each is there with a probability of 63 %.
    numbers, distances = nearest(others, others, min(3 * k + 20, len(others) - 1))
    distances += rounding(others)
    there = of_others > 0
    found = np.zeros((len(there), len(judged)), dtype=bool)
    for columns in blocks(len(others)):
        radii = np.full((len(there), columns.stop - columns.start), -math.inf)
        passed = np.zeros(radii.shape, dtype=np.uint16)
        for number, distance in zip(numbers[columns].T, distances[columns].T, strict=True):
            np.copyto(radii, distance, where=there[:, number] & (passed < k))
            passed += there[:, number]
        radii[~there[:, columns]] = -math.inf
        for rows in blocks(len(judged)):
            between = squared_distances(judged[rows], others[columns])
            image, other = np.nonzero(between <= radii.max(axis=0))
            between = between[image, other]
            for row, radius in zip(found[:, rows], radii, strict=True):
                row[image[between <= radius[other]]] = True
    return found


def nearest(features: np.ndarray, others: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of each image's k nearest of the others, and squared distances to them, rising; (N, k) both.

    Itself left out if both are one and the same array.
    """
    numbers, distances = np.zeros((len(features), k), dtype=int), np.full((len(features), k), math.inf)
    for rows in blocks(len(features)):
        for columns in blocks(len(others)):
            between = squared_distances(features[rows], others[columns])
            if features is others and rows == columns:
                np.fill_diagonal(between, math.inf)
            candidates = np.hstack([distances[rows], between])
            order = np.argpartition(candidates, k - 1, axis=1)[:, :k]
            these = np.broadcast_to(np.arange(columns.start, columns.stop), between.shape)
            numbers[rows] = np.take_along_axis(np.hstack([numbers[rows], these]), order, axis=1)
            distances[rows] = np.take_along_axis(candidates, order, axis=1)
    order = distances.argsort(axis=1)
    return np.take_along_axis(numbers, order, axis=1), np.take_along_axis(distances, order, axis=1)


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, M); off by a few 1e-16 of the squared norms, so that equal images may be a little apart."""
    return np.square(x).sum(axis=1)[:, None] - 2 * (x @ y.T) + np.square(y).sum(axis=1)


def rounding(features: np.ndarray) -> float:
    """How much squared distances between such features differ without meaning."""
    return ROUNDING * float(np.square(features).sum(axis=1).mean())


def blocks(size: int) -> Iterator[slice]:
    """Slices that cover `size` images."""
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))
