"""Optimizers that some package might have, each with something that is in the way."""

from __future__ import annotations

from typing import Any

import torch


class KeepsLists(torch.optim.SGD):
    """Remembers where it was."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("history", []).append(parameter.detach().clone())


class CountsByItself(torch.optim.SGD):
    """Steps become smaller with their number, of which its state knows nothing."""

    num_steps = 0

    def step(self, closure: Any = None) -> None:
        self.num_steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad /= self.num_steps
        super().step()


class LooksAtNumbers(torch.optim.SGD):
    """Goes on to the bit, but cannot step without values."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.detach().numpy()
        super().step()


class HasNoRate(torch.optim.SGD):
    """Its rate has another name."""

    def __init__(self, params: Any, step_size: float = 0.1) -> None:
        super().__init__(params, lr=step_size)
