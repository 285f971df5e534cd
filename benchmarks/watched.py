"""A command whose memory is watched."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import psutil

INTERVAL = 0.5  # seconds


class Watched(NamedTuple):
    seconds: float
    peak: int  # bytes that the process and its children held together, without mapped files and shared memory


def run_watched(command: Sequence[object], *, good: Sequence[int] = (0,)) -> Watched:
    """Run a command to its end. Leaves with what it wrote if its status is none of the `good` ones.

    Neither mapped files nor shared memory are counted. Files' pages are the system's cache, which gives them up when
    there is need.
    """
    started, peak = time.perf_counter(), 0
    arguments = [str(each) for each in command]
    with tempfile.TemporaryFile() as errors, subprocess.Popen(arguments, stdout=errors, stderr=errors) as process:
        while process.poll() is None:
            held = 0
            with contextlib.suppress(psutil.NoSuchProcess):  # a worker may end while it is looked at
                for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                    memory = each.memory_info()
                    held += memory.rss - memory.shared
            peak = max(peak, held)
            time.sleep(INTERVAL)
        seconds = time.perf_counter() - started
        errors.seek(0)
        if process.returncode not in good:
            sys.exit(f"error: {arguments[1]} failed with {process.returncode}:\n{errors.read().decode()[-3000:]}")
    return Watched(seconds, peak)
