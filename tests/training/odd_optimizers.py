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


class KeepsListsOfKernels(KeepsLists):
    """Remembers where its convolutions were."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for parameter, state in self.state.items():
            if parameter.dim() < 4:
                del state["history"]


class CountsToFive(torch.optim.SGD):
    """Rests every fifth step, by a number of its own."""

    num_steps = 0

    def step(self, closure: Any = None) -> None:
        self.num_steps += 1
        if self.num_steps % 5:
            super().step()


class KeepsItsMode(torch.optim.SGD):
    """Evaluates half of the weights, once."""

    trains = False

    def train(self) -> None:
        self.trains = True

    def eval(self) -> None:
        if self.trains:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(0.5)
        self.trains = False


class Leaves(torch.optim.SGD):
    """Does without what it needs by leaving."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        raise SystemExit(2)


class LacksAPackage(torch.optim.SGD):
    """Imports when it is made."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        import a_package_of_nobody  # noqa: F401
