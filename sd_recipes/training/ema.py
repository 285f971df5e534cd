"""The exponential moving average of the UNet's weights: diffusers' EMAModel, kept on the right device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from sd_recipes.recipe import OptimConfig
from sd_recipes.runtime.fsdp import shard_like


class AveragedWeights:
    """EMA of a UNet's parameters, updated once an optimizer step with foreach operations.

    The decay of update n is that of diffusers: 0 for the first, then min(ema_decay, n / (9 + n)).
    """

    def __init__(self, unet: UNet2DConditionModel, config: OptimConfig) -> None:
        self.unet = unet
        self.device = unet.device
        self.offload = config.offload_ema
        self.model = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True)
        if self.offload:
            self.model.to("cpu")

    def step(self) -> None:
        if self.offload:
            self.model.to(self.device, non_blocking=True)
        self.model.step(self.unet.parameters())
        if self.offload:
            # Blocking: the next step must not read what is still on its way.
            self.model.to("cpu")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the UNet has the averaged weights."""
        self.model.store(self.unet.parameters())
        self.model.copy_to(self.unet.parameters())
        try:
            yield
        finally:
            self.model.restore(self.unet.parameters())

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """The averaged weights under the UNet's parameter names."""
        names = (name for name, _ in self.unet.named_parameters())
        return dict(zip(names, self.model.shadow_params, strict=True))

    def load(self, tensors: dict[str, torch.Tensor], optimization_step: int) -> None:
        """Restore what `named_tensors` gave, and the number of steps behind it."""
        for name, shadow in self.named_tensors().items():
            shadow.copy_(shard_like(shadow, tensors[name]))
        self.model.optimization_step = optimization_step
