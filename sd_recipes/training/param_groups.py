"""Steps of a part of an optimizer's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def only(optimizer: torch.optim.Optimizer, number: int, parameters: list[torch.Tensor]) -> Iterator[None]:
    """Within this context `optimizer` steps these parameters alone, which are of its group `number`."""
    groups = optimizer.param_groups
    optimizer.param_groups = [{**groups[number], "params": parameters}]
    try:
        yield
    finally:
        optimizer.param_groups = groups
