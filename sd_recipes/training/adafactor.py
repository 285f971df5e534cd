"""Adafactor (Shazeer and Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Adafactor(torch.optim.Adafactor):
    """torch's (2.13), whose own step waits for the GPU twice a parameter: to know its size and its update's.

    Here both stay on the device. The result is torch's up to rounding.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, of all parameters that have a gradient."""
        for group in self.param_groups:
            lists: list[list[Any]] = [[] for _ in range(6)]
            self._init_group(group, *lists)
            for parameter, gradient, row, column, variance, step in zip(*lists, strict=True):
                _update(group, parameter, gradient, row, column, variance, step)


def _update(
    group: dict[str, Any],
    parameter: Tensor,
    gradient: Tensor,
    row: Tensor | None,
    column: Tensor | None,
    variance: Tensor | None,
    step: Tensor,  # in the host's memory
) -> None:
    """The paper's algorithm 4 for a matrix or a stack of them, algorithm 5 for a vector, with torch's names."""
    eps1, eps2 = group["eps"]
    eps1 = torch.finfo(parameter.dtype).eps if eps1 is None else eps1
    gradient = -gradient if group["maximize"] else gradient
    step += 1
    newest = step.item() ** group["beta2_decay"]  # its weight in the running means
    rate = root_mean_square(parameter).clamp_(min=eps2).mul_(min(group["lr"], step.item() ** -0.5))
    if group["weight_decay"]:
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
    if variance is not None:
        estimate = variance.lerp_(gradient.square(), newest).clone()
    else:
        assert row is not None
        assert column is not None
        for mean, dim in ((row, -1), (column, -2)):
            squares = torch.norm(gradient, dim=dim, keepdim=True).square_()  # without a square of the whole gradient
            mean.lerp_(squares.div_(gradient.size(dim)), newest)
        estimate = (row @ column).div_(row.mean(dim=-2, keepdim=True).clamp_(min=eps1))
    update = estimate.clamp_(min=eps1**2).rsqrt_().mul_(gradient)
    clip = root_mean_square(update).div_(group["d"]).clamp_(min=1.0)
    parameter.sub_(update.mul_(rate / clip))


def root_mean_square(tensor: Tensor) -> Tensor:
    """() float32, on the tensor's device."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float32) / tensor.numel() ** 0.5
