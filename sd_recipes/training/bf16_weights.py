"""Weights in bfloat16 alone: updated in float32, a few at a time, and rounded up or down at random.

bfloat16 keeps 8 bits of a number, and an update is often smaller than half of the last one: rounded to the nearest, the
weight stays where it was, for ever. Rounded stochastically, a number between two neighbours becomes the upper one with
the probability (number - lower) / (upper - lower), so that its expectation is the number itself (Gupta et al. 2015,
"Deep Learning with Limited Numerical Precision").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from sd_recipes.training.param_groups import only

CHUNK_BYTES = 64 * 2**20  # of float32 weights


class Bf16Weights(torch.optim.Optimizer):
    """Goes before an optimizer's class, which then updates float32 copies of the bfloat16 parameters.

    Its own parameters are stand-ins: they hold a copy during their update, and nothing otherwise. So the optimizer's
    state is in float32, and is saved and loaded as ever. Parameters of other types it updates themselves.

    The random numbers are a function of (`seed`, `step_number()`, the parameter's place), so that a resumed run and
    every process round alike.
    """

    seed: int
    step_number: Callable[[], int]

    def __init__(self, groups: Any, lr: float, **settings: Any) -> None:
        self.stands_for: dict[torch.Tensor, torch.Tensor] = {}  # the parameter, by its stand-in; in order
        groups = [{**group, "params": [self._stand_in(each) for each in group["params"]]} for group in groups]
        super().__init__(groups, lr=lr, **settings)  # type: ignore[call-arg]  # of the class that comes after this one
        self.places = {stand_in: place for place, stand_in in enumerate(self.stands_for)}
        self.generators: dict[torch.device, torch.Generator] = {}

    def _stand_in(self, parameter: torch.Tensor) -> torch.Tensor:
        stand_in = parameter
        if parameter.dtype == torch.bfloat16:
            stand_in = torch.nn.Parameter(parameter.new_empty(0, dtype=torch.float32))
        self.stands_for[stand_in] = parameter
        return stand_in

    def zero_grad(self, set_to_none: bool = True) -> None:
        assert set_to_none
        for parameter in self.stands_for.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, of all parameters that have a gradient."""
        seed = int(np.random.SeedSequence((self.seed, self.step_number())).generate_state(1, np.uint64)[0])
        for number, group in enumerate(self.param_groups):
            for chunk in self._chunks(group["params"]):
                narrow = [each for each in chunk if self.stands_for[each] is not each]
                for stand_in in narrow:
                    parameter = self.stands_for[stand_in]
                    assert parameter.grad is not None
                    stand_in.data, stand_in.grad = parameter.float(), parameter.grad.float()
                with only(self, number, chunk):
                    super().step()
                for stand_in in narrow:
                    generator = self._generator(stand_in.device, seed + self.places[stand_in])
                    self.stands_for[stand_in].copy_(rounded(stand_in.data, generator))
                    stand_in.data, stand_in.grad = stand_in.data.new_empty(0), None

    def _chunks(self, stand_ins: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Those with a gradient, as many at a time as take CHUNK_BYTES in float32, or one that is larger."""
        chunk: list[torch.Tensor] = []
        nbytes = 0
        for stand_in in stand_ins:
            parameter = self.stands_for[stand_in]
            if parameter.grad is None:
                continue
            if chunk and nbytes + 4 * parameter.numel() > CHUNK_BYTES:
                yield chunk
                chunk, nbytes = [], 0
            chunk.append(stand_in)
            nbytes += 4 * parameter.numel()
        if chunk:
            yield chunk

    def _generator(self, device: torch.device, seed: int) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device)
        return self.generators[device].manual_seed(seed % 2**63)


def with_bf16_weights(
    make: type[torch.optim.Optimizer], *, seed: int, step_number: Callable[[], int]
) -> type[torch.optim.Optimizer]:
    """An optimizer's class for bfloat16 parameters."""
    return type(f"Bf16{make.__name__}", (Bf16Weights, make), {"seed": seed, "step_number": staticmethod(step_number)})


def rounded(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 values, one of whose two neighbours in bfloat16 they become, in place; returns them.

    A bfloat16 is a float32 whose last 16 bits are 0. A random number below 2¹⁶ carries into the bits before with just
    the probability that they stand for, also from one power of two into the next; numbers beyond the largest become
    infinite, and what is infinite or NaN stays so.
    """
    bits = values.view(torch.int32)
    bits += torch.randint(2**16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    bits &= -(2**16)
    return values
