"""What the time of a step goes to: a trace of some steps, and a table by phase."""

from __future__ import annotations

import gzip
import json
import logging
import math
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from sd_recipes.errors import one_line

logger = logging.getLogger(__name__)

PHASES = ("data", "encode", "forward", "backward", "optimizer", "average", "log")
WARM_UP = 3  # steps before the first that is profiled: kernels are chosen and compiled, memory is found
PREFIX = "phase: "
ON_HOST = ("cuda_runtime", "cuda_driver")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # kinds of events in a trace
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")

_is_profiled = False


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What is done within this context, and what it gives a device to do, belongs to that phase of a step."""
    assert name in PHASES
    if not _is_profiled:  # a mark is an operator, which would be seen by whatever looks at operators
        yield
        return
    with record_function(PREFIX + name):
        yield


class Profiler:
    """Profiles `num_steps` steps of a process, from the fourth on that it makes; none if it is 0.

    A context: what is profiled ends with it. Whatever goes wrong, training continues.
    """

    def __init__(self, folder: Path, num_steps: int, device: torch.device, tell: Callable[[str], object]) -> None:
        """`tell` is given the table."""
        self.folder, self.num_steps, self.device, self.tell = folder, num_steps, device, tell
        self._profile: torch.profiler.profile | None = None
        self._first: int | None = None  # number of the process's first step
        self._begun: int | None = None  # and of the first that is profiled
        self._began_at = 0.0  # by `time.perf_counter`

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is not None:
            with self._survived():
                self._stop()

    def step(self, number: int) -> None:
        """Before the step of that number: begins and ends what is profiled."""
        self._first = number if self._first is None else self._first
        if self._begun is not None and number == self._begun + self.num_steps:
            self.close(number)
        elif self._begun is None and self.num_steps and number == self._first + WARM_UP:
            with self._survived():
                self._begin(number)

    @contextmanager
    def _survived(self) -> Iterator[None]:
        """Errors are of the disk, of torch's profiler, and of what it writes."""
        try:
            yield
        except Exception as error:
            logger.warning(
                "No profile in %s (%s: %s): training continues.", self.folder, type(error).__name__, one_line(error)
            )

    def _begin(self, number: int) -> None:
        global _is_profiled
        self._begun = number
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        profile = torch.profiler.profile(activities=activities)
        profile.start()
        self._profile, self._began_at, _is_profiled = profile, time.perf_counter(), True

    def _stop(self) -> torch.profiler.profile | None:
        global _is_profiled
        profile, self._profile, _is_profiled = self._profile, None, False
        if profile is not None:
            profile.stop()
        return profile

    def close(self, number: int) -> None:
        """After the step before `number`: write the trace and the table of what was profiled until here."""
        if self.num_steps and self._begun is None:
            logger.warning("--profile_steps profiled nothing: the run made no more than its first %d steps.", WARM_UP)
        seconds = time.perf_counter() - self._began_at
        with self._survived():
            if (profile := self._stop()) is None:
                return
            assert self._begun is not None
            path = self.folder / f"step-{number:06d}.json.gz"
            self.folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))
            found = table(read_trace(path), number - self._begun, seconds)
            path.with_name(f"step-{number:06d}.txt").write_text(found + "\n", encoding="utf-8")
            self.tell(f"{found}\n  of steps {self._begun + 1} to {number}, whose trace is {path} (for Perfetto)")


@dataclass
class Trace:
    """What a trace says of a step's phases."""

    host: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # microseconds
    device: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    waits: Counter[str] = field(default_factory=Counter)  # of the host for the device
    pageable: Counter[str] = field(default_factory=Counter)  # copies from or to memory that is not pinned


def read_trace(path: Path) -> Trace:
    """Read a trace of torch's profiler. Raises OSError."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return phases_of(json.load(file)["traceEvents"])


def phases_of(events: Sequence[dict[str, Any]]) -> Trace:
    """What a device does belongs to the phase in which the host asked for it, from whichever thread."""
    found = Trace()
    spans = sorted(
        (event["ts"], -event["dur"], event["name"].removeprefix(PREFIX))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)
    )
    begins, names = [0.0], ["other"]  # of pieces of the time, since a phase may lie within another
    open_until: list[tuple[float, str]] = []

    def begin(time: float) -> None:
        begins.append(time)
        names.append(open_until[-1][1] if open_until else "other")

    for start, negative, name in [*spans, (math.inf, 0.0, "other")]:
        while open_until and open_until[-1][0] <= start:
            end, _ = open_until.pop()
            begin(end)
        open_until.append((start - negative, name))
        begin(start)
    for name, start, end in zip(names, begins, begins[1:], strict=False):
        if name != "other":
            found.host[name] += end - start

    def phase_at(time: float) -> str:
        return names[bisect_right(begins, time) - 1]

    asked: dict[int, float] = {}
    for event in events:
        if event.get("cat") in ON_HOST:
            if "correlation" in event["args"]:
                asked[event["args"]["correlation"]] = event["ts"]
            if event["name"] in WAITS:
                found.waits[phase_at(event["ts"])] += 1
    for event in events:
        if event.get("cat") in ON_DEVICE:
            name = phase_at(asked.get(event["args"].get("correlation"), 0.0))
            found.device[name] += event["dur"]
            if "Pageable" in event["name"]:
                found.pageable[name] += 1
    return found


def table(trace: Trace, num_steps: int, seconds: float) -> str:
    """Milliseconds of a step by phase, on the host and on a device; and what the host waited for.

    All of the host's are the time that passed, `seconds` for all steps.
    """
    host = {**trace.host, "other": max(0.0, 1e6 * seconds - sum(trace.host.values()))}
    has_device = bool(trace.device)
    head = f"  {'phase':<12}{'host, ms':>10}" + (
        f"{'device, ms':>12}{'waits':>8}{'pageable copies':>17}" if has_device else ""
    )
    lines = [head + "   of a step"]
    shown = [name for name in (*PHASES, "other") if name in host or name in trace.device or trace.waits[name]]
    for name in [*shown, "all"]:

        def of(values: Any, name: str = name) -> float:
            return float(sum(values.values()) if name == "all" else values.get(name, 0)) / num_steps

        line = f"  {name:<12}{of(host) / 1000:>10.2f}"
        if has_device:
            line += f"{of(trace.device) / 1000:>12.2f}{of(trace.waits):>8.1f}{of(trace.pageable):>17.1f}"
        lines.append(line)
    return "\n".join(lines)
