"""How much memory a run takes, and how a GPU's is managed."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import clear_device_cache

MUCH_UNUSED = 0.2  # of what torch holds of a GPU


def peak_memory_gb(device: torch.device) -> float:
    """The most that this process has held so far, in GB: on a GPU what torch has allocated there, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def fragmented_gb(device: torch.device) -> float | None:
    """How much torch holds of a GPU, in GB, if that is much more than was ever in use at once; else None."""
    if device.type != "cuda":
        return None
    held, used = torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device)
    return held / 1e9 if held - used > max(MUCH_UNUSED * held, 2**30) else None


@contextmanager
def another_phase(device: torch.device) -> Iterator[None]:
    """Within this context a GPU does other work, with tensors of other sizes: torch gives back what it holds unused
    before, and after. The host's allocator needs no such help, and collecting garbage would take it 0.4 s each time."""
    if device.type != "cpu":
        clear_device_cache(garbage_collection=True)
    try:
        yield
    finally:
        if device.type != "cpu":
            clear_device_cache(garbage_collection=True)
