"""What processes tell each other over the host's network, so that it never waits for a device."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from sd_recipes.signals import stop_request

# While the first process validates the others wait, longer than torch's ten minutes, or thirty of gloo.
LONGEST_WAIT = timedelta(hours=2)


def exchange(num_processes: int) -> Callable[[Any], list[Any]]:
    """A function that gives every process's value, by rank, for this one's; every process has to call it."""
    if num_processes == 1:
        return lambda value: [value]
    group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * num_processes
        distributed.all_gather_object(values, value, group=group)
        return values

    return gather


class StopAgreement:
    """Whether any process was asked to stop: the same answer on all, given once a step.

    The question goes round while the next step is computed, so the answer is that of the step before,
    unless it is waited for.
    """

    def __init__(self, num_processes: int) -> None:
        self._group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT) if num_processes > 1 else None
        self._asked: tuple[torch.Tensor, Any] | None = None

    def __call__(self, *, wait: bool) -> bool:
        if self._group is None:
            return stop_request.reason is not None
        flag = torch.tensor(int(stop_request.reason is not None))
        work = distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        before, self._asked = self._asked, (flag, work)
        answered = self._asked if wait else before
        if answered is None:
            return False
        flag, work = answered
        work.wait()
        return bool(flag)
