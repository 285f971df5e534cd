"""What checkpoints cost: the stall of a save in the background against a synchronous one, and the time to resume.

    python benchmarks/checkpoint.py stall --shape quarter
    python benchmarks/checkpoint.py resume --shape quarter

A checkpoint has the UNet, its average and AdamW's two moments, all in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))
SCRIPT = HERE.parent / "train_text_to_image.py"

from make_model import SHAPES, build  # noqa: E402


def recipe_of(work: Path, out: str) -> dict[str, Any]:
    """Small pictures, one at a time: what a checkpoint costs does not depend on them."""
    return {
        "pretrained_model_name_or_path": str(work / "model"), "train_data_dir": str(work / "pictures"),
        "resolution": 64, "train_batch_size": 1, "center_crop": True, "use_ema": True, "seed": 0,
        "learning_rate": 1e-5, "report_to": "none", "logging_steps": 1, "output_dir": str(work / out),
    }  # fmt: skip


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f}, {len(seconds)} runs)"


def synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_stall(work: Path, runs: int) -> None:
    """Time of `save`, for which the loop stands still, and of writing the same checkpoint without a thread."""
    from sd_recipes.checkpoints.format import write_checkpoint
    from sd_recipes.checkpoints.saver import BackgroundSaver
    from sd_recipes.commands.train import identity, resolve, restore, train_to_end
    from sd_recipes.flags import written_settings
    from sd_recipes.recipe import Recipe
    from sd_recipes.runtime.accelerator import start_accelerator
    from sd_recipes.runtime.output_dir import check_output_dir
    from sd_recipes.training.build import build_run

    settings = recipe_of(work, "run") | {"max_train_steps": 2, "checkpoints_total_limit": 2}
    recipe = Recipe(**settings)
    check_output_dir(work / "run")
    accelerator = start_accelerator(recipe)
    recipe, checkpoint = resolve(recipe, accelerator, None)
    run = build_run(recipe, accelerator, checkpoint)
    restore(run)
    train_to_end(run)  # so that the optimizer has its state
    state, progress = run.state, run.state.progress
    saver = BackgroundSaver(
        state, accelerator, recipe, run.output_dir,
        settings=written_settings(recipe), identity=identity(run), num_steps=run.num_steps,
    )  # fmt: skip
    stalls, synchronous = [], []
    with saver:
        for number in range(runs + 1):
            progress.global_step = 10 + number
            synchronize(accelerator.device)
            started = time.perf_counter()
            saver.save()
            synchronize(accelerator.device)  # its copies to the host stand before the next step
            stalls.append(time.perf_counter() - started)
            saver.wait()
            # As it would be without a thread: nothing is copied first if the tensors are in host memory.
            progress.global_step = 1000 + number
            synchronize(accelerator.device)
            started = time.perf_counter()
            live = state.state_dict()
            contents = saver._contents(live, [None])
            contents.tensors = {
                file: {name: tensor.detach().cpu() for name, tensor in named.items()}
                for file, named in live.tensors.items()
            }
            path = write_checkpoint(contents, run.output_dir, 2)
            synchronous.append(time.perf_counter() - started)
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    first, *stalls = stalls
    synchronous = synchronous[1:]
    print(f"checkpoint          {size / 1e6:.0f} MB")
    print(f"synchronous save    {spread(synchronous)}")
    print(f"stall of the loop   {spread(stalls)}; {first:.3f} s the first time, when the buffers are made")
    print(f"share               {statistics.median(stalls) / statistics.median(synchronous):.1%}")


def seconds_to_first_step(settings: dict[str, Any], step: int) -> float:
    """From the start of the process to that step's line in metrics.jsonl; then the process is killed."""
    flags: list[str] = []
    for name, value in settings.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    metrics = Path(settings["output_dir"]) / "metrics.jsonl"
    started = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *flags], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None:
            if metrics.is_file() and f'"step": {step},' in metrics.read_text():
                return time.perf_counter() - started
            time.sleep(0.01)
        raise RuntimeError(f"the run ended with status {process.returncode} before step {step}")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def measure_resume(work: Path, runs: int) -> None:
    settings = recipe_of(work, "begun") | {"max_train_steps": 1000, "checkpointing_steps": 1}
    seconds_to_first_step(settings, 3)  # checkpoint-1 is whole, since the save of step 2 waited for it
    begun = work / "begun"
    fresh, resumed = [], []
    for number in range(runs):
        for name in ("fresh", "resumed"):
            out = work / f"{name}-{number}"
            step = 1
            if name == "resumed":
                out.mkdir()
                shutil.copytree(begun / "checkpoint-1", out / "checkpoint-1")
                shutil.copy(begun / "recipe.yaml", out)
                step = 2
            # No checkpoint is written before the step is logged.
            changes = {"output_dir": str(out), "checkpointing_steps": 500}
            (fresh if name == "fresh" else resumed).append(seconds_to_first_step(settings | changes, step))
            shutil.rmtree(out)
    print(f"fresh start to its first step    {spread(fresh)}")
    print(f"resume to its first step         {spread(resumed)}")
    print(f"ratio                            {statistics.median(resumed) / statistics.median(fresh):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stall", "resume"])
    parser.add_argument("--shape", choices=list(SHAPES), default="quarter")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work_dir", help="on the disk that is to be measured; otherwise the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        work = Path(folder)
        build(arguments.shape, work, resolution=64)
        print(json.dumps({"machine": platform.machine(), "cores": os.cpu_count(), "shape": arguments.shape}))
        {"stall": measure_stall, "resume": measure_resume}[arguments.what](work, arguments.runs)


if __name__ == "__main__":
    main()
