"""Timesteps drawn where the error is large, with weights that leave the expected gradient as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sd_recipes.data.timesteps import trained_timesteps
from sd_recipes.recipe import ObjectiveConfig

NUM_BINS = 10
DECAY = 0.99  # per step
UNIFORM_SHARE = 0.1  # of the probability, so that no weight exceeds its inverse


class RunningLosses:
    """The running mean loss in ten bins of the trained timesteps, over about the last hundred steps."""

    def __init__(self, num_train_timesteps: int, config: ObjectiveConfig, device: torch.device) -> None:
        trained = trained_timesteps(num_train_timesteps, config)
        bins = min(NUM_BINS, len(trained))
        edges = torch.linspace(trained.start, trained.stop, bins + 1, dtype=torch.float64).round()
        self.edges = edges.long().to(device)
        self.shares = self.edges.diff().double() / len(trained)  # (bins,) of the trained timesteps
        # Sums of losses and of their numbers, decaying: (2, bins).
        self.running = torch.zeros(2, bins, dtype=torch.float64, device=device)

    @property
    def means(self) -> Tensor:
        """(bins,) float64; NaN where no timestep was met."""
        losses, counts = self.running
        return losses / counts

    def sums(self, timesteps: Tensor, losses: Tensor, counts: Tensor) -> Tensor:
        """(2, bins) of the losses, (B,), at timesteps, (B,), and of their numbers; those that do not count are 0."""
        # A product instead of an indexed sum, whose order, and so its rounding, changes from run to run on a GPU.
        found = torch.stack([losses, counts]).double()
        return found @ F.one_hot(self.bins(timesteps), len(self.shares)).double()

    def take_in(self, sums: Tensor) -> None:
        """Take in a step's `sums`, of all processes."""
        self.running = DECAY * self.running + sums

    def bins(self, timesteps: Tensor) -> Tensor:
        """(B,) int64 bins of trained timesteps, (B,)."""
        return torch.searchsorted(self.edges, timesteps, right=True) - 1


class TimestepErrors(RunningLosses):
    """Timesteps from bins that are drawn with a probability p in proportion to their running mean loss.

    As in importance sampling by the loss (Nichol & Dhariwal 2021, section 3.3), with bins in place of single timesteps.
    A loss at a timestep drawn with probability p, of T, is weighted by 1 / (p·T): its expectation is that of uniform
    timesteps. The bins change once per optimizer step, from the losses of all processes, and are part of the run's
    state; the number in [0, 1) from which a timestep follows is drawn by position, like everything random.
    """

    def __init__(self, num_train_timesteps: int, config: ObjectiveConfig, device: torch.device) -> None:
        super().__init__(num_train_timesteps, config, device)
        self.of_step = torch.zeros_like(self.running)  # sums of the step that is running

    @property
    def probabilities(self) -> Tensor:
        """(bins,) float64, with which each bin is drawn; the uniform ones until all bins have been met."""
        losses, counts = self.running
        by_error = self.shares * losses / counts  # NaN where none was met
        total = by_error.sum()
        by_error = torch.where(total > 0, by_error / total, self.shares)
        return UNIFORM_SHARE * self.shares + (1 - UNIFORM_SHARE) * by_error

    def timesteps(self, u: Tensor) -> Tensor:
        """(B,) int64 timesteps by the inverse distribution function at u, (B,) float64 in [0, 1)."""
        probabilities = self.probabilities
        ends = probabilities.cumsum(0)
        bins = torch.searchsorted(ends, u, right=True).clamp(max=len(ends) - 1)  # the last end may be rounded below 1
        within = ((u - ends[bins]) / probabilities[bins] + 1).clamp(0, 1)
        first, end = self.edges[bins], self.edges[bins + 1]
        return torch.minimum(first + (within * (end - first)).long(), end - 1)

    def weights(self, timesteps: Tensor) -> Tensor:
        """1 / (p·T), (B,) float32, for timesteps that `timesteps` gave."""
        return (self.shares / self.probabilities)[self.bins(timesteps)].float()

    def add(self, timesteps: Tensor, losses: Tensor, weights: Tensor) -> None:
        """Note the losses, (B,), of a micro-batch's samples that count: those whose weight is not 0."""
        counts = (weights > 0) & losses.isfinite()
        self.of_step += self.sums(timesteps, losses.where(counts, 0), counts)

    def step(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Take in what was noted on all processes since the last step. Every process has to call it."""
        self.take_in(all_reduce(self.of_step))
        self.forget()

    def forget(self) -> None:
        """Leave out what was noted since the last step."""
        self.of_step = torch.zeros_like(self.running)

    def state_dict(self) -> dict[str, Tensor]:
        return {"running": self.running}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        self.running = tensors["running"].to(self.running.device)
