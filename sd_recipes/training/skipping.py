"""A step that a device skips by itself, so that it has work while the host waits to learn whether it did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Reading:
    """A number on its way from a device to the host, which may do other things meanwhile."""

    def __init__(self, number: torch.Tensor) -> None:
        """`number` is a tensor of one element."""
        self._number = number
        self._is_there: torch.cuda.Event | None = None
        if number.device.type == "cuda":
            self._number = torch.empty_like(number, device="cpu", pin_memory=True).copy_(number, non_blocking=True)
            self._is_there = torch.cuda.Event()
            self._is_there.record()

    def value(self) -> float:
        """The number. The host waits for what leads to it, and not for what the device was given to do since."""
        if self._is_there:
            self._is_there.synchronize()
        return self._number.item()


def can_skip(optimizer: Any) -> bool:
    """Whether an optimizer's kernel asks the device whether it is to change anything, as torch's fused ones do."""
    return getattr(_inner(optimizer), "_step_supports_amp_scaling", False)


@contextmanager
def skipped_unless(usable: torch.Tensor, optimizer: Any) -> Iterator[None]:
    """Within this context a step of an optimizer that `can_skip` changes nothing unless `usable`, () bool, is true.

    By the attributes through which torch's GradScaler tells it: neither weights nor state change, nor the count of
    steps. For a parameter without state it makes the one that precedes a first step.
    """
    inner = _inner(optimizer)
    inner.grad_scale, inner.found_inf = None, (~usable).float()
    try:
        yield
    finally:
        del inner.grad_scale, inner.found_inf


def _inner(optimizer: Any) -> Any:
    """The optimizer within accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
