"""Find numbers that are not finite, so that they never reach the weights or a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from sd_recipes.errors import RunError
from sd_recipes.training.state import TrainState


class TrainingDiverged(RunError):
    """Loss, gradient or weights are not finite numbers."""

    status = 3


def are_finite(accelerator: Accelerator, tensors: Iterable[torch.Tensor]) -> bool:
    """The same answer on all processes, which all have to call it: each may hold a shard."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    are = torch.stack([part.isfinite().all().to(accelerator.device) for part in parts])
    return accelerator.reduce((~are).sum(), "sum").item() == 0


def has_finite_weights(state: TrainState, accelerator: Accelerator) -> bool:
    """Whether all weights are finite, and their averages: a finite gradient times a huge rate may overflow."""
    tensors: list[torch.Tensor] = []
    for part in state.parts.values():
        tensors += part.module.parameters()
        for average in part.averages.values():
            tensors += average.named_tensors().values()
    return are_finite(accelerator, tensors)
