"""What processes exchange over the host's network, so that they never wait for a device."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from sd_recipes.runtime.signals import stop_request

# For what one process does alone, such as the export, while the others wait over the host's network.
LONGEST_WAIT = timedelta(hours=2)
# For what devices exchange at every step: one that hangs is noticed after this time.
STEP_WAIT = timedelta(minutes=10)

_host_group: Any = None  # one for the whole process, like the default group; None if there is only one process


def open_host_group() -> None:
    """Make the group that the functions below use. Every process has to call it, once it has joined the others.

    Waiting in the default group would keep the devices busy, end at their shorter timeout, and ignore signals.
    """
    global _host_group
    several = distributed.is_initialized() and distributed.get_world_size() > 1
    _host_group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT) if several else None


def wait_for_all() -> None:
    """Wait until every process is here, whatever one of them does alone first."""
    if _host_group is not None:
        distributed.barrier(group=_host_group)


def broadcast(value: Any) -> Any:
    """The first process's value, on all of them; every process has to call it."""
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


def begin_sum(*values: int) -> Callable[[], list[int]]:
    """Begin to add up every process's values; what it returns waits for the sums. Every process has to call both.

    Devices may be given work in between.
    """
    totals = torch.tensor(values)
    work = None if _host_group is None else distributed.all_reduce(totals, group=_host_group, async_op=True)

    def wait() -> list[int]:
        if work is not None:
            work.wait()
        return totals.tolist()

    return wait


def all_gather_in_thread(num_processes: int) -> Callable[[Any], list[Any]]:
    """`all_gather` over a group of its own, for a thread that runs next to training; every process has to call it."""
    if num_processes == 1:
        return lambda value: [value]
    group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * num_processes
        distributed.all_gather_object(values, value, group=group)
        return values

    return gather


class StopAgreement:
    """Whether any process was asked to stop: the same answer on all of them, once per step.

    The exchange runs while the next step is computed, so the answer is the previous step's, unless it is to `wait`.
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
