"""What a run was started on, each time: starts.jsonl in its folder. Neither the host's name nor a path is written."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from accelerate import Accelerator

from sd_recipes import __version__
from sd_recipes.reading import StrangeFile, open_regular
from sd_recipes.runtime.history import MAX_LINE_BYTES
from sd_recipes.writing import replace_file

STARTS = "starts.jsonl"


@dataclass(frozen=True)
class Start:
    """One start of a run, from a step on: 0, or that of the checkpoint it resumed from."""

    time: str  # ISO 8601, UTC
    step: int
    device: str
    processes: int
    cpus: int  # of the first process's host
    precision: str
    versions: Mapping[str, str]


def record_start(output_dir: Path, step: int, accelerator: Accelerator) -> None:
    """Add a line to starts.jsonl, after those of the starts that led up to `step`: it has one line of history too."""
    device = accelerator.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
    start = Start(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        step=step,
        device=device,
        processes=accelerator.num_processes,
        cpus=os.cpu_count() or 1,
        precision=accelerator.mixed_precision,
        versions={
            "sd-recipes": __version__,
            **{name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "accelerate")},
            "python": platform.python_version(),
        },
    )
    earlier = [each for each in read_starts(output_dir) if each.step <= step] if step else []
    lines = [json.dumps(asdict(each)) + "\n" for each in (*earlier, start)]
    replace_file(output_dir / STARTS, "".join(lines))


def read_starts(output_dir: Path) -> list[Start]:
    """The starts of a run, oldest first; what is no such line, or no regular file, is left out."""
    try:
        with open_regular(output_dir / STARTS) as file:
            lines = list(iter(lambda: file.readline(MAX_LINE_BYTES), b""))
    except (FileNotFoundError, StrangeFile):
        return []
    return [start for line in lines if (start := _start(line)) is not None]


def _start(line: bytes) -> Start | None:
    try:
        start = Start(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    return start if isinstance(start.step, int) and isinstance(start.versions, dict) else None
