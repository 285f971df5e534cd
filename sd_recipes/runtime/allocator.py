"""torch's allocator of GPU memory, set up before torch is imported."""

from __future__ import annotations

import os
import sys

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def set_up_allocator() -> None:
    """Let torch's segments of GPU memory grow, unless the user has set up the allocator: pieces of several sizes, of a
    training step and a validation, of buckets, then leave no gaps that are of no use to the others.

    Without a GPU it changes nothing. torch has it on Linux only.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in VARIABLES):
        os.environ[VARIABLES[0]] = "expandable_segments:True"
