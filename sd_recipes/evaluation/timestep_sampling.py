"""Which timesteps to evaluate when not all: more of those that make up more of the sum, with weights that undo it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

UNIFORM_SHARE = 0.1  # of the probability, so that no weight is large where the pilot was wrong
MAX_KNOTS = 32


@dataclass(frozen=True, eq=False)
class TimestepSampling:
    """With which probabilities timesteps are drawn, (T,), and how many for an image.

    Raises ValueError unless there is one or more to draw, and every timestep has a chance.
    """

    probabilities: np.ndarray
    evaluations: int

    def __post_init__(self) -> None:
        if self.evaluations < 1:
            raise ValueError(f"{self.evaluations} timesteps for each image: give 1 or more, or None for all")
        if not (self.probabilities > 0).all() or not np.isclose(self.probabilities.sum(), 1):
            raise ValueError("probabilities of timesteps have to be above 0 and add up to 1: give other ones")

    @classmethod
    def uniform(cls, num_timesteps: int, evaluations: int) -> TimestepSampling:
        """The same chance for all."""
        return cls(np.full(num_timesteps, 1 / num_timesteps), evaluations)

    def proportional_to(self, contributions: np.ndarray) -> TimestepSampling:
        """As many, by each timestep's contribution to the sum, (T,), none negative; as they are if all are 0."""
        if not contributions.any():
            return self
        shares = contributions / contributions.sum()
        return replace(self, probabilities=UNIFORM_SHARE / len(shares) + (1 - UNIFORM_SHARE) * shares)

    def draw(self, u: float) -> np.ndarray:
        """(evaluations,) timesteps, rising, by systematic sampling from one u in [0, 1).

        Timestep t comes `evaluations * probabilities[t]` times on average over u, and less than once more or fewer.
        """
        points = (u + np.arange(self.evaluations)) / self.evaluations
        found = np.searchsorted(np.cumsum(self.probabilities), points, side="right")
        return found.clip(max=len(self.probabilities) - 1)  # the last sum may be rounded to below 1

    @property
    def weights(self) -> np.ndarray:
        """(T,): with them, the sum of a function over the drawn timesteps is on average its sum over all."""
        return 1 / (self.evaluations * self.probabilities)


def knots(num_timesteps: int) -> np.ndarray:
    """(K,) timesteps that grow geometrically: errors change with log t, and the first steps weigh most."""
    return np.unique(np.geomspace(1, num_timesteps, MAX_KNOTS).round().astype(int)) - 1


def smooth(timesteps: np.ndarray, squared_errors: np.ndarray, num_timesteps: int) -> np.ndarray:
    """(T,) mean squared errors from evaluations at some timesteps, both of any one shape.

    Evaluations are averaged around the nearest of the `knots`, with lines between the averages.
    """
    timesteps, squared_errors = timesteps.reshape(-1), squared_errors.reshape(-1)
    places = np.log1p(knots(num_timesteps))
    nearest = np.searchsorted((places[1:] + places[:-1]) / 2, np.log1p(timesteps))
    counts = np.bincount(nearest)
    met = counts > 0
    mean_timesteps, mean_errors = (
        np.bincount(nearest, weights=each)[met] / counts[met] for each in (timesteps, squared_errors)
    )
    return np.interp(np.arange(num_timesteps), mean_timesteps, mean_errors)
