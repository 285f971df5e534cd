"""An optimizer at work on a part of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


@contextmanager
def narrowed(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within this context `optimizer` knows of these parameters alone; what it notes of its groups is forgotten."""
    wanted = {id(each) for each in parameters}
    groups = optimizer.param_groups
    optimizer.param_groups = [
        {**group, "params": [each for each in group["params"] if id(each) in wanted]} for group in groups
    ]
    try:
        yield
    finally:
        optimizer.param_groups = groups
