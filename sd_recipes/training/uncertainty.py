"""The learned uncertainty u(t), with which a run's loss is alike at all noise levels."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from sd_recipes.training.objective import NoiseSchedule

NUM_FEATURES = 16
LEARNING_RATE = 2e-2  # u has to follow the loss from the start, and is a single layer
CONFIG = json.dumps({"num_features": NUM_FEATURES})


class Uncertainty(torch.nn.Module):
    """u(t): one layer over Fourier features of the noise level, trained with e^-u · loss + u.

    Karras et al. 2024 (EDM2), after Kendall et al. 2018. The loss is least at u = log(mean loss): u(t) becomes the
    smoothed logarithm of the loss by timestep, and the UNet's gradients get the same size at all of them. It begins at
    0, where the loss is the plain one.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        # arctan(σ / α), which is finite where there is no signal left, in [0, π]: cosines are a basis there.
        level = 2 * torch.atan2(schedule.sigma, schedule.signal)
        order = torch.arange(NUM_FEATURES, device=level.device)
        # The finer, the smaller, so that u is smooth: Adam's steps are as large for all weights. No buffer, which the
        # checkpoints would hold.
        self.features = torch.cos(level[:, None] * order) / (1 + order)  # (T, F)
        self.weight = torch.nn.Parameter(torch.zeros(NUM_FEATURES, device=level.device))

    def forward(self, timesteps: Tensor) -> Tensor:
        """u(t), (B,) float32, of timesteps (B,)."""
        # No matrix product, which autocast would round.
        return (self.features[timesteps] * self.weight).sum(dim=1)

    def by_timestep(self, weight: Tensor) -> Tensor:
        """u(t) of all timesteps, (T,), with another weight, such as the averaged one."""
        return self.features @ weight.to(self.features.device)
