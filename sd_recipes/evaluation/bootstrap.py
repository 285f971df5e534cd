"""How much a score of images would vary with other images: percentile intervals by resampling (Efron 1979)."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Score:
    """A score and its interval."""

    value: float
    low: float  # NaN without resamples
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: from the score of sets of images that are drawn with repeats from those at hand.

    Images are drawn by a counter-based generator (Philox, Salmon et al. 2011) that depends on the seed, the set and the
    resample's number only: all scores meet the same resamples, and more of them begin with the same ones.
    `num_resamples=0` leaves intervals out. Raises ValueError for settings that are out of range.
    """

    num_resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_resamples < 0:
            raise ValueError(f"num_resamples is {self.num_resamples}: give 0, for no interval, or more")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}: give a number between 0 and 1, such as 0.95")
        if not 0 <= operator.index(self.seed) < 2**64:
            raise ValueError(f"seed is {self.seed}: give a number from 0 to 2**64 - 1")

    def counts(self, size: int, number: int) -> np.ndarray:
        """How often each of `size` images comes, (1 + num_resamples, size) uint16, in the set with this number.

        The first row is the set as it is: each image once. The others have at least two different images, since of
        one there is no spread.
        """
        counts = np.ones((1 + self.num_resamples, size), dtype=np.uint16)
        for resample in range(1, len(counts)):
            generator = self.generator(number, resample)
            counts[resample] = 0
            while np.count_nonzero(counts[resample]) < 2:
                counts[resample] = np.bincount(generator.integers(size, size=size), minlength=size)
        return counts

    def generator(self, number: int, resample: int) -> np.random.Generator:
        """A generator that depends only on the seed and the arguments."""
        key = np.array([self.seed, number], dtype=np.uint64)
        counter = np.array([0, resample, 0, 0], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def score(self, values: np.ndarray, lowest: float = -math.inf, highest: float = math.inf) -> Score:
        """From the score of the set as it is and of each resample, (1 + num_resamples,), by percentiles.

        Repeats add bias to some scores. It is taken off: the resamples' mean is moved to the score, and what then lies
        beyond the lowest and the highest that there can be is moved to those.
        """
        if not self.num_resamples:
            return Score(float(values[0]), math.nan, math.nan)
        resamples = (values[1:] + (values[0] - values[1:].mean())).clip(lowest, highest)
        outside = (1 - self.confidence) / 2
        low, high = np.quantile(resamples, [outside, 1 - outside])
        return Score(float(values[0]), float(low), float(high))
