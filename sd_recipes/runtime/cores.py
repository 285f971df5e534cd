"""The cores that a process may use."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Those of this process, which a scheduler may have given a part of the machine; where unknown, the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_local_processes() -> int:
    """Processes that a launcher has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def share_of_cores() -> int:
    """Those for each of these processes, at least one."""
    return max(1, num_cores() // num_local_processes())
