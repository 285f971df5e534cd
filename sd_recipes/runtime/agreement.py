"""What processes tell each other over the host's network, so that it never waits for a device."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from sd_recipes.runtime.signals import stop_request

# For what one process does alone, such as a validation, while the others wait over the host's network.
LONGEST_WAIT = timedelta(hours=2)
# For what devices all_gather_in_thread at every step: one that hangs is noticed after it.
STEP_WAIT = timedelta(minutes=10)

_host_group: Any = None  # the process's, as the default group is; None with one process


def open_host_group() -> None:
    """Make the group over which the functions below wait. Every process has to call it, once it has joined the others.

    A wait on the default group would keep the devices busy, be ended by their shorter time-out, and answer no signal.
    """
    global _host_group
    several = distributed.is_initialized() and distributed.get_world_size() > 1
    _host_group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT) if several else None


def wait_for_all() -> None:
    """Until every process is here, whatever one of them does alone before."""
    if _host_group is not None:
        distributed.barrier(group=_host_group)


def broadcast(value: Any) -> Any:
    """The first process's value, on all; every process has to call it."""
    values = [value]
    if _host_group is not None:
        distributed.broadcast_object_list(values, src=0, group=_host_group)
    return values[0]


def all_gather(value: Any) -> list[Any]:
    """Every process's value, by rank; every process has to call it."""
    values = [value]
    if _host_group is not None:
        values = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value, group=_host_group)
    return values


def all_gather_in_thread(num_processes: int) -> Callable[[Any], list[Any]]:
    """`all_gather` over a group of its own, for a thread beside the training; every process has to call it."""
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
