"""The exponential moving average of a trained part's parameters, on their device or in host memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from sd_recipes.recipe import DIFFUSERS_LENGTH, OptimConfig
from sd_recipes.runtime.fsdp import shard_like
from sd_recipes.runtime.out_of_memory import once_more, unchanged
from sd_recipes.training.host_average import HostTensors
from sd_recipes.training.profiles import decay_at, diffusers_decay_at, gamma_of


class Average(ABC):
    """Weights of a trained part that are evaluated and exported in the place of those that are trained."""

    num_updates = 0

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.names, self.parameters = list(parameters), list(parameters.values())

    @abstractmethod
    def step(self) -> None:
        """Follow an optimizer step."""

    @abstractmethod
    def named_tensors(self) -> dict[str, torch.Tensor]:
        """The averages under the parameters' names."""

    def held(self) -> dict[str, torch.Tensor]:
        """Tensors of the same names, sizes and types that are there already: they are finite just if averages are."""
        return self.named_tensors()

    @abstractmethod
    def load(self, tensors: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Restore what `named_tensors` returned, and the number of updates behind it."""

    @contextmanager
    def applied(self, module: torch.nn.Module) -> Iterator[None]:
        """Within this context `module` has averages for parameters, and the parameters wait beside it.

        They are the averages themselves where these are on the device: that takes no memory, and loses no bit where the
        parameters are in bfloat16.
        """
        parameters = dict(zip(self.names, self.parameters, strict=True))
        try:
            for name, tensor in self.named_tensors().items():
                own = parameters[name]
                _set(module, name, torch.nn.Parameter(tensor.to(own.device), own.requires_grad))
            yield
        finally:
            for name, own in parameters.items():
                _set(module, name, own)


class AveragedWeights(Average):
    """Average of named parameters, in float32, updated once per optimizer step.

    Its profile is a power function of the relative width `length`. For None it is the recipe's: a power function of
    --ema_length or, at the default of that, diffusers' own, whose decay is 0 for the first update and then
    min(ema_decay, n / (9 + n)).
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], config: OptimConfig, length: float | None = None
    ) -> None:
        super().__init__(parameters)
        self.decay_at: Callable[[int], float]  # of an update, counted from 1
        if length is None and config.ema_length == DIFFUSERS_LENGTH:
            self.decay_at = partial(diffusers_decay_at, most=config.ema_decay)
        else:
            self.decay_at = partial(decay_at, gamma=gamma_of(length or config.ema_length))
        self.on_host: HostTensors | None = None
        if config.offload_ema and self.parameters[0].device.type == "cuda":
            self.on_host = HostTensors(self.parameters)
            self.tensors = self.on_host.tensors
        else:
            self.tensors = [_copy(each.detach()) for each in self.parameters]

    def step(self) -> None:
        """One update, after an optimizer step; tried once more if memory runs out before anything has changed.

        In host memory it is queued, and runs beside the next step.
        """
        number, is_unchanged = self.num_updates, unchanged(lambda: self.tensors)

        def is_undone() -> bool:
            self.num_updates = number
            return is_unchanged()

        once_more("an average of the weights", self._step, is_undone)

    def _step(self) -> None:
        self.num_updates += 1
        update = partial(move_towards, weight=1 - self.decay_at(self.num_updates))
        if self.on_host:
            self.on_host.update(update)
        else:
            update(self.tensors, self.parameters)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        self._wait()
        return dict(zip(self.names, self.tensors, strict=True))

    def load(self, tensors: Mapping[str, torch.Tensor], num_updates: int) -> None:
        for name, here in self.named_tensors().items():
            here.copy_(shard_like(here, tensors[name]))
        self.num_updates = num_updates

    def _wait(self) -> None:
        if self.on_host:
            self.on_host.wait()


def release_before_steps(optimizer: torch.optim.Optimizer, averages: Sequence[Average]) -> None:
    """Let every step of `optimizer` wait, on the device, for updates that still read the parameters."""

    def release(*_: object) -> None:
        for average in averages:
            if isinstance(average, AveragedWeights) and average.on_host:
                average.on_host.release()

    optimizer.register_step_pre_hook(release)


@torch.no_grad()
def move_towards(averages: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], weight: float) -> None:
    """Move float32 averages by `weight` of the way to the parameters, in place and in one pass."""
    same = [each.dtype == parameter.dtype for each, parameter in zip(averages, parameters, strict=True)]
    if all(same):
        torch._foreach_lerp_(list(averages), list(parameters), weight)
        return
    # The kernel takes one type. One parameter after the other, so that no copy of all of them is made.
    for average, parameter in zip(averages, parameters, strict=True):
        average.lerp_(parameter.to(average.dtype), weight)


def _set(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, parameter)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype, copy=True)
