"""A step that a device skips by itself, so that it has work while the host waits to learn whether it did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sd_recipes.training.optimizer_state import bare


def can_skip(optimizer: Any) -> bool:
    """Whether an optimizer's kernel asks the device whether it is to change anything: Adam's and AdamW's fused ones.

    No others. What says so by `_step_supports_amp_scaling` may do something all the same: torch's (2.13) fused SGD
    takes whatever lies in memory for its momentum after a first step that was skipped, and classes of other packages
    may not look, or do work of their own in their step.
    """
    inner = bare(optimizer)
    return type(inner) in (torch.optim.Adam, torch.optim.AdamW) and all(group["fused"] for group in inner.param_groups)


@contextmanager
def skipped_unless(usable: torch.Tensor, optimizer: Any) -> Iterator[None]:
    """Within this context a step of an optimizer that `can_skip` changes nothing unless `usable`, () bool, is true.

    By the attributes through which torch's GradScaler tells it: neither weights nor state change, nor the count of
    steps. What had no state has that of 0 steps afterwards.
    """
    inner: Any = bare(optimizer)
    inner.grad_scale, inner.found_inf = None, (~usable).float()
    try:
        yield
    finally:
        del inner.grad_scale, inner.found_inf
