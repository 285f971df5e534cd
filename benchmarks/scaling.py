"""Cost of growth: time per image and memory of the main process, by the number of rows and by the step.

    python benchmarks/scaling.py rows [--rows 1000 1000000] [--steps 400] [--repeats 3]
    python benchmarks/scaling.py steps [--steps 10000]

`rows` trains the smallest UNet, on pictures of 32 x 32 in parquet files of that many rows, in turn, and compares images
per second from step 50 to the end. `steps` trains it for many steps and compares windows of them. Speed, and memory
with mapped files, are those that the run itself logs; without them, memory is watched from outside.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from make_model import build_model
from PIL import Image
from watched import run_watched

SCRIPT = Path(__file__).parent.parent / "train_text_to_image.py"
FILE_ROWS = 50_000
LOGGED = 50  # steps between two logged figures


def write_rows(folder: Path, number: int) -> None:
    """Parquet files of `number` pictures in PNG, 64 different ones, with captions that all differ."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(64):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        pictures.append({"bytes": file.getvalue(), "path": None})
    for start in range(0, number, FILE_ROWS):
        rows = range(start, min(start + FILE_ROWS, number))
        table = pyarrow.table({
            "image": [pictures[row % len(pictures)] for row in rows],
            "text": [f"picture number {row}" for row in rows],
        })  # fmt: skip
        pyarrow.parquet.write_table(table, folder / f"train-{start // FILE_ROWS:05d}.parquet", row_group_size=1000)


def run(work: Path, data: Path, steps: int, batch: int) -> tuple[list[dict[str, Any]], int]:
    """The lines that a run logs, and the most bytes of memory that it held, without mapped files."""
    output_dir = work / "run"
    flags = {
        "pretrained_model_name_or_path": work / "model", "train_data_dir": data, "resolution": 32, "seed": 0,
        "train_batch_size": batch, "max_train_steps": steps, "logging_steps": LOGGED, "checkpointing_steps": 10**9,
        "validation_pictures": 0, "report_to": "none", "device": "cpu", "output_dir": output_dir,
        "cache_dir": work / "cache",
    }  # fmt: skip
    command = [sys.executable, SCRIPT, *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]
    shutil.rmtree(output_dir, ignore_errors=True)
    peak = run_watched(command).peak
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "images_per_second" in line], peak


def speed(lines: list[dict[str, Any]], first: int, last: int) -> float:
    """Median images per second of the logged windows from step `first`, exclusive, to step `last`."""
    return statistics.median(line["images_per_second"] for line in lines if first < line["step"] <= last)


def rows(work: Path, args: argparse.Namespace) -> None:
    folders = {number: work / f"rows-{number}" for number in args.rows}
    for number, folder in folders.items():
        write_rows(folder, number)
    print("| rows | images/s of each run | ms per image | over the first | memory, GB | with mapped files, GB |")
    print("|---|---|---|---|---|---|")
    runs: dict[int, list[tuple[list[dict[str, Any]], int]]] = {number: [] for number in args.rows}
    for _ in range(args.repeats):
        for number, folder in folders.items():
            runs[number].append(run(work, folder, args.steps, batch=4))
    speeds = {number: [speed(lines, LOGGED, args.steps) for lines, _ in found] for number, found in runs.items()}
    for number in args.rows:
        ratio = statistics.median(a / b for a, b in zip(speeds[args.rows[0]], speeds[number], strict=True))
        each = ", ".join(f"{value:.1f}" for value in speeds[number])
        memory = statistics.median(peak for _, peak in runs[number]) / 1e9
        resident = statistics.median(lines[-1]["memory_gb"] for lines, _ in runs[number])
        print(
            f"| {number:,} | {each} | {1000 / statistics.median(speeds[number]):.2f} | {ratio:.3f} | {memory:.3f} "
            f"| {resident:.3f} |"
        )


def steps(work: Path, args: argparse.Namespace) -> None:
    write_rows(work / "rows", args.rows[0])
    lines, peak = run(work, work / "rows", args.steps, batch=2)  # where what is done once a step shows more
    print("| steps | images/s | ms per image | over the first | with mapped files, GB |\n|---|---|---|---|---|")
    bounds = [LOGGED * round(each / LOGGED) for each in np.geomspace(LOGGED, args.steps, 6)]
    first = None
    for begin, end in itertools.pairwise(bounds):
        found = speed(lines, begin, end)
        first = first or found
        memory = next(line["memory_gb"] for line in lines if line["step"] >= end)
        print(f"| {begin:,} to {end:,} | {found:.1f} | {1000 / found:.2f} | {first / found:.3f} | {memory:.3f} |")
    print(f"memory of the process at its end, without mapped files: {peak / 1e9:.3f} GB at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rows", "steps"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.steps = args.steps or {"rows": 400, "steps": 10_000}[args.what]
    print(f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        build_model("micro", work / "model")
        {"rows": rows, "steps": steps}[args.what](work, args)


if __name__ == "__main__":
    main()
