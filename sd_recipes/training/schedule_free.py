"""Optimizers that train at one point and evaluate at another (Defazio et al. 2024, "The Road Less Scheduled").

The weights that a step changes are y, where gradients are taken. Those that are evaluated, x, are an average of the
optimizer's z; `eval()` of such an optimizer turns y into x, and `train()` x into y. The way there and back is not
exact, so that a run would depend on when it was validated and saved: here only copies go there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sd_recipes.training.ema import Average
from sd_recipes.training.optimizer_state import bare
from sd_recipes.training.param_groups import narrowed


def has_modes(optimizer: Any) -> bool:
    """Whether an optimizer evaluates other weights than those that it trains."""
    return all(callable(getattr(bare(optimizer), mode, None)) for mode in ("train", "eval"))


def begin_training(optimizer: Any) -> None:
    """Let the steps of an optimizer that was just made train, and not refuse to."""
    if has_modes(optimizer):
        optimizer.train()


class EvaluationWeights(Average):
    """A part's weights as its optimizer evaluates them, made anew whenever they are asked for.

    They follow from the weights and the optimizer's state, so that a checkpoint has them to be read, not to resume.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], optimizer: Any) -> None:
        super().__init__(parameters)
        self.optimizer: Any = bare(optimizer)

    def step(self) -> None:
        """There is nothing to be done."""

    @torch.no_grad()
    def named_tensors(self) -> dict[str, torch.Tensor]:
        trained = [each.data for each in self.parameters]
        try:
            for parameter in self.parameters:
                parameter.data = parameter.data.clone()
            with narrowed(self.optimizer, self.parameters):
                self.optimizer.eval()
            return {name: each.data for name, each in zip(self.names, self.parameters, strict=True)}
        finally:
            for parameter, data in zip(self.parameters, trained, strict=True):
                parameter.data = data

    def held(self) -> dict[str, torch.Tensor]:
        return {name: each.detach() for name, each in zip(self.names, self.parameters, strict=True)}

    def load(self, tensors: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """There is nothing to be restored."""
