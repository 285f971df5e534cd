"""Find numbers that are not finite, so that they never reach the weights or a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from sd_recipes.errors import RunError
from sd_recipes.training.state import TrainState


class TrainingDiverged(RunError):
    """Loss, gradient or weights are not finite numbers."""

    status = 3


def are_finite(accelerator: Accelerator, tensors: Iterable[torch.Tensor]) -> bool:
    """The same answer on all processes, which all have to call it: each may hold a shard."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    parts = [part for part in parts if part.numel()]  # of few rows some processes have none
    largest = get_total_norm(parts, math.inf).to(accelerator.device)  # in few calls, however many tensors there are
    return accelerator.reduce((~largest.isfinite()).float(), "sum").item() == 0


def is_not_finite(grad_norm: float, loss: torch.Tensor, accelerator: Accelerator) -> bool:
    """Whether a step's numbers, of usable rows, are not finite: its gradient's norm, the same on all processes.

    fp16's loss scaler finds its scale by infinite gradients, and skips those steps itself. They are an incident where
    no scale helps: if the loss, each process's share, is not finite, or the scale has fallen below 1.
    """
    if math.isfinite(grad_norm):
        return False
    return accelerator.scaler is None or accelerator.scaler.get_scale() < 1 or not are_finite(accelerator, [loss])


def has_finite_weights(state: TrainState, accelerator: Accelerator) -> bool:
    """Whether all trained weights are finite, and their averages: a finite gradient times a huge rate may overflow."""
    tensors: list[torch.Tensor] = []
    for part in state.parts.values():
        tensors += part.parameters.values()
        for average in part.averages.values():
            tensors += average.held().values()
    return are_finite(accelerator, tensors)
