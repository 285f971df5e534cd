"""The exponential moving average of a trained part's parameters: diffusers' EMAModel, kept on the right device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel

from sd_recipes.recipe import OptimConfig
from sd_recipes.runtime.fsdp import shard_like


class AveragedWeights:
    """EMA of named parameters, updated once per optimizer step with foreach operations.

    The decay of update n is that of diffusers: 0 for the first, then min(ema_decay, n / (9 + n)).
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], config: OptimConfig) -> None:
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.device = self.parameters[0].device
        self.offload = config.offload_ema
        self.model = EMAModel(self.parameters, decay=config.ema_decay, foreach=True)
        if self.offload:
            self.model.to("cpu")

    @property
    def num_updates(self) -> int:
        return self.model.optimization_step

    def step(self) -> None:
        """One update, after an optimizer step."""
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
