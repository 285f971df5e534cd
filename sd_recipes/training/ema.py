"""The exponential moving average of a trained part's parameters: diffusers' EMAModel, kept on the right device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel

from sd_recipes.recipe import DIFFUSERS_LENGTH, OptimConfig
from sd_recipes.runtime.fsdp import shard_like
from sd_recipes.runtime.out_of_memory import once_more, unchanged
from sd_recipes.training.profiles import decay_at, gamma_of


class PowerFunctionAverage(EMAModel):
    """An EMAModel whose decays give the power-function profile of a relative width: see `profiles`."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], length: float) -> None:
        super().__init__(parameters, foreach=True)
        self.gamma = gamma_of(length)

    def get_decay(self, optimization_step: int) -> float:
        return decay_at(optimization_step, self.gamma)


class AveragedWeights:
    """Average of named parameters, updated once per optimizer step with foreach operations.

    Its profile is a power function of the relative width `length`. For None it is the recipe's: a power function of
    --ema_length or, at the default of that, diffusers' own, whose decay is 0 for the first update and then
    min(ema_decay, n / (9 + n)).
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], config: OptimConfig, length: float | None = None
    ) -> None:
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.device = self.parameters[0].device
        self.offload = config.offload_ema
        if length is None and config.ema_length == DIFFUSERS_LENGTH:
            self.model = EMAModel(self.parameters, decay=config.ema_decay, foreach=True)
        else:
            self.model = PowerFunctionAverage(self.parameters, length or config.ema_length)
        if self.offload:
            self.model.to("cpu")

    @property
    def num_updates(self) -> int:
        return self.model.optimization_step

    def step(self) -> None:
        """One update, after an optimizer step; tried once more if memory runs out before anything has changed."""
        number, is_unchanged = self.num_updates, unchanged(lambda: self.model.shadow_params)

        def is_undone() -> bool:
            self.model.optimization_step = number
            return is_unchanged()

        once_more("an average of the weights", self._step, is_undone)

    def _step(self) -> None:
        if self.offload:
            self.model.to(self.device, non_blocking=True)
        self.model.step(self.parameters)
        if self.offload:
            # Blocking: the next step must not read what is still on its way.
            self.model.to("cpu")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the parameters have the averaged values, and the average has theirs."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange both, one tensor at a time: EMAModel would copy all parameters into host memory."""
        for parameter, shadow in zip(self.parameters, self.model.shadow_params, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(shadow)
            shadow.copy_(held)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """The averages under the parameters' names."""
        return dict(zip(self.names, self.model.shadow_params, strict=True))

    def load(self, tensors: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Restore what `named_tensors` returned, and the number of updates behind it."""
        for name, shadow in self.named_tensors().items():
            shadow.copy_(shard_like(shadow, tensors[name]))
        self.model.optimization_step = num_updates
