"""What validations cost: seconds and peak memory of the first, which encodes the held-out rows, and of later ones.

    python benchmarks/validation.py --shape sd15 --work_dir /dev/shm/benchmark

256 held-out and 256 training samples with the weights and their average, and four pictures of 20 steps: before a run of
two steps, and after each of them, when the optimizer has its state. Before it there are neither average nor pictures.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
from make_model import SHAPES, build

from sd_recipes.checkpoints.best import BestWeights
from sd_recipes.checkpoints.saver import BackgroundSaver
from sd_recipes.commands.train import resolve, restore, train_to_end
from sd_recipes.evaluation.figures import Best
from sd_recipes.flags import load_recipe
from sd_recipes.runtime.accelerator import start_accelerator
from sd_recipes.runtime.console import hide_library_bars
from sd_recipes.runtime.memory import peak_memory_gb
from sd_recipes.runtime.output_dir import check_output_dir
from sd_recipes.training import loop
from sd_recipes.training.build import build_run
from sd_recipes.training.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="sd15")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--flags", default="--mixed_precision bf16 --use_ema", help="of the run, in one string")
    args = parser.parse_args()
    folder, resolution = args.work_dir / args.shape, args.resolution or SHAPES[args.shape][4]
    if not (folder / "model").exists():
        build(args.shape, folder, resolution)
    hide_library_bars()
    recipe = load_recipe([
        *f"--pretrained_model_name_or_path {folder}/model --train_data_dir {folder}/pictures --resolution {resolution} "
        f"--cache_dir {folder}/cache --train_batch_size 8 --max_train_steps 2 --validation_steps 1 --seed 0 "
        f"--report_to none --device {args.device} --output_dir {folder}/validated --validation_split 0.25 "
        f"--no-keep_best {args.flags}".split()
    ])  # fmt: skip
    check_output_dir(folder / "validated")
    BackgroundSaver.save = BackgroundSaver.allocate_buffers = lambda self: None  # a checkpoint is 14 GB
    validate = loop.validate

    def timed(run: Run, best_weights: BestWeights) -> Best | None:
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        best = validate(run, best_weights)
        seconds = time.perf_counter() - began
        peak = peak_memory_gb(accelerator.device) * 1e9 / 2**30
        words = f"validation of step {run.state.progress.global_step}"
        print(f"{words:<34} {seconds:8.1f} s       {peak:8.2f} GiB peak", file=table, flush=True)
        return best

    loop.validate = timed
    accelerator, table = start_accelerator(recipe), sys.stdout
    with redirect_stdout(sys.stderr):  # what a run says is not of the table
        recipe, checkpoint = resolve(recipe, accelerator, None)
        run = build_run(recipe, accelerator, checkpoint)
        restore(run)
        train_to_end(run)


if __name__ == "__main__":
    main()
