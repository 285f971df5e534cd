"""Speed and memory of the training loop, one row for each set of flags.

    python benchmarks/gpu_rows.py --shape sd15 --work_dir /dev/shm/benchmark

Each row puts a run together from its flags, as the script does, and trains it with the real loop. Checkpoints are the
one thing left out: of a full-size model they are 14 GB, and writing them takes longer than all steps. Memory is what
torch allocated at the peak, and what it reserved for that. "At once" are the images that a step takes at once in the
end: fewer than its batch where memory ran out and it was done again. MFU is the UNet's arithmetic against the
device's peak, and wait the share of the time that the loop waits for data, in percent. These two, the speed and the
loss are of the second half of the steps, in which no validation falls. Where steps are profiled, their tables by
phase follow the rows, with the waits and the pageable copies of a step. Each row has a process of its own, which
begins with an empty GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import shutil
import sys
import time
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from make_model import build
from make_xl_model import XL_SHAPES

from sd_recipes.checkpoints.saver import BackgroundSaver
from sd_recipes.commands.train import resolve, train_to_end
from sd_recipes.errors import one_line
from sd_recipes.flags import load_recipe
from sd_recipes.runtime.accelerator import accelerate_left_unused, start_accelerator
from sd_recipes.runtime.console import hide_library_bars
from sd_recipes.training.build import build_run

# The best first: a machine may be there for minutes only. Compiling takes as long as several rows: what says least
# about it comes last. Flags of a row count over the common ones.
#
# Kept from the second epoch on, which the second half is in: of 256 pictures, 32 steps of 8, 16 of 16 and 4 of 64.
KEPT = "--cache_latents memory --center_crop --cache_text"
BEST = f"--mixed_precision bf16 --use_ema {KEPT}"
ROWS = {
    "bf16": "--mixed_precision bf16 --profile_steps 2",
    "bf16, average, kept, 16": f"{BEST} --train_batch_size 16 --max_train_steps 50 --profile_steps 2",
    "bf16, average, kept, 64": f"{BEST} --train_batch_size 64 --max_train_steps 50",
    "kept, 64, blocks compiled": f"{BEST} --train_batch_size 64 --max_train_steps 50 --compile blocks",
    "kept, 64, CUDA graphs": f"{BEST} --train_batch_size 64 --max_train_steps 50 --compile graphs --profile_steps 2",
    "bf16, average, kept, 64, cuDNN timed": f"{BEST} --train_batch_size 64 --max_train_steps 50 --cudnn_benchmark",
    "fp32": "",
    "fp32, cuDNN timed": "--cudnn_benchmark",
    "fp32, TF32": "--allow_tf32",
    "fp32, TF32, channels_last always": "--allow_tf32 --channels_last always",
    "bf16, cuDNN timed": "--mixed_precision bf16 --cudnn_benchmark",
    "bf16, no loader processes": "--mixed_precision bf16 --dataloader_num_workers 0",
    "fp16, scaled loss": "--mixed_precision fp16 --profile_steps 2",
    "bf16, 8-bit AdamW": "--mixed_precision bf16 --use_8bit_adam --profile_steps 2",
    "bf16, average on the host": "--mixed_precision bf16 --use_ema --offload_ema --profile_steps 2",
    "bf16, LoRA of rank 8": "--mixed_precision bf16 --lora_rank 8 --learning_rate 1e-4 --profile_steps 2",
    "bf16, checkpointing": "--mixed_precision bf16 --gradient_checkpointing",
    "bf16 weights": "--mixed_precision bf16 --weights_dtype bf16",
    "bf16, fused backward": "--mixed_precision bf16 --fused_backward_pass --max_grad_norm 0",
    "bf16, paged 8-bit AdamW": "--mixed_precision bf16 --optimizer paged_adamw8bit",
    "bf16, checkpointing down.0 up.3": "--mixed_precision bf16 --gradient_checkpointing_blocks down.0 up.3",
    "bf16 weights, average on the host": "--mixed_precision bf16 --weights_dtype bf16 --use_ema --offload_ema",
    "bf16, the least": (
        "--mixed_precision bf16 --weights_dtype bf16 --use_8bit_adam --fused_backward_pass --max_grad_norm 0 --use_ema "
        "--offload_ema --gradient_checkpointing --vae_slicing"
    ),
    "bf16, text encoder too": "--mixed_precision bf16 --train_text_encoder --text_encoder_learning_rate 1e-6",
    "fp16, LoRA, text encoder": "--mixed_precision fp16 --lora_rank 8 --lora_text_encoder --learning_rate 1e-4 "
    "--gradient_checkpointing",
    "bf16, DoRA of all layers": "--mixed_precision bf16 --lora_rank 4 --lora_targets all --lora_use_dora",
    "bf16, channels_last never": "--mixed_precision bf16 --channels_last never",
    "bf16, score prediction": "--mixed_precision bf16 --prediction_type score",
    "bf16, no clipping": "--mixed_precision bf16 --max_grad_norm 0",
    "kept, 64, UNet compiled": f"{BEST} --train_batch_size 64 --max_train_steps 50 --compile unet",
    "bf16, CUDA graphs, accumulated": f"{BEST} --max_train_steps 80 --compile graphs --gradient_accumulation_steps 2",
}

ROW_LIMIT = 180  # seconds

LEAST = (
    "--mixed_precision bf16 --weights_dtype bf16 --use_8bit_adam --fused_backward_pass --max_grad_norm 0 "
    "--gradient_checkpointing"
)
XL_ROWS = {  # of SDXL, at batch 1
    "bf16, LoRA of rank 16": "--mixed_precision bf16 --lora_rank 16 --learning_rate 1e-4",
    "bf16, LoRA, checkpointing": "--mixed_precision bf16 --lora_rank 16 --learning_rate 1e-4 --gradient_checkpointing",
    "bf16, LoRA, text encoders too": "--mixed_precision bf16 --lora_rank 16 --lora_text_encoder --learning_rate 1e-4 "
    "--gradient_checkpointing",
    "fp16, LoRA, checkpointing": "--mixed_precision fp16 --lora_rank 16 --learning_rate 1e-4 --gradient_checkpointing",
    "bf16, 8-bit AdamW, checkpointing": "--mixed_precision bf16 --use_8bit_adam --gradient_checkpointing",
    "the same, batch 4": "--mixed_precision bf16 --use_8bit_adam --gradient_checkpointing --train_batch_size 4",
    "the same, batch 4, moments kept": "--mixed_precision bf16 --use_8bit_adam --gradient_checkpointing "
    "--train_batch_size 4 --cache_latents memory --center_crop",  # 16 steps an epoch, of 64 pictures
    "bf16, the least": LEAST,
}


def flags_of(folder: Path, device: str, steps: int, batch_size: int, row: str) -> list[str]:
    """The command line of a row; what the row says comes last, and counts."""
    common = (
        f"--pretrained_model_name_or_path {folder}/model --train_data_dir {folder}/pictures --cache_dir {folder}/cache "
        f"--train_batch_size {batch_size} --max_train_steps {steps} --lr_warmup_steps 0 "
        f"--learning_rate 1e-5 --validation_steps {10**9} --seed 0 --report_to none --device {device} "
        f"--output_dir {folder}/out --overwrite"
    )
    flags = [*common.split(), *row.split()]
    last = len(flags) - flags[::-1].index("--max_train_steps")
    return [*flags, "--logging_steps", str(int(flags[last]) // 2)]  # the second half is what is measured


def measure(flags: list[str]) -> tuple[str, str]:
    """Train by these flags; returns the figures of the row, and its table by phase, if there is one."""
    recipe = load_recipe(flags)
    with accelerate_left_unused():
        accelerator = start_accelerator(recipe)
        Path(recipe.output_dir).mkdir(parents=True)
        recipe, _ = resolve(recipe, accelerator, None)
        on_gpu = accelerator.device.type == "cuda"
        run = build_run(recipe, accelerator, None)
        with closing(run.tracker):
            train_to_end(run)
        lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()
        last = [line for line in map(json.loads, lines) if "train_loss" in line][-1]
        phases = "".join(path.read_text() for path in Path(recipe.output_dir).glob("profile/*.txt"))
        at_once = last.get("micro_batch", recipe.train_batch_size)
        reserved = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else float("nan")
        figures = (
            f"{at_once:7d} {last['images_per_second']:8.1f} {last['memory_gb'] * 1e9 / 2**30:10.2f} {reserved:9.2f} "
            f"{100 * last.get('mfu', float('nan')):6.1f} {100 * last['data_wait']:6.1f} {last['train_loss']:8.4f}"
        )
        return figures, phases


def measure_into(answer: Any, flags: list[str]) -> None:
    """In a process of its own: send the figures, or what went wrong."""
    BackgroundSaver.save = BackgroundSaver.allocate_buffers = lambda self: None
    hide_library_bars()
    with redirect_stdout(sys.stderr):  # what a run says is not of the table
        try:
            answer.send((*measure(flags), True))
        except Exception as error:
            answer.send((f"FAILED: {type(error).__name__}: {one_line(error)}", "", False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="sd15")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--resolution", default=None, help="512, or 1024 for SDXL")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="a regular expression: the rows whose names it is found in")
    parser.add_argument("--budget", type=float, default=300, help="seconds after which no new row begins")
    args = parser.parse_args()
    folder = args.work_dir / args.shape
    rows, batch_size, usual = (XL_ROWS, 1, 1024) if args.shape in XL_SHAPES else (ROWS, 8, 512)
    resolution = args.resolution or str(usual)
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU
    if not (folder / "model").exists():
        building = spawn.Process(target=build, args=(args.shape, folder, int(resolution)))
        building.start()
        building.join()
    begun, failed, tables = time.monotonic(), False, {}
    print(
        f"{'':<36} {'at once':>7} {'images/s':>8} {'allocated':>10} {'reserved':>9} {'MFU, %':>6} {'wait':>6} "
        f"{'loss':>8}   GiB; {args.shape}, batch {batch_size} and {args.steps} steps where the row does not say"
    )
    chosen = {name: row for name, row in rows.items() if re.search(args.only, name)}
    for name, row in chosen.items():
        if time.monotonic() - begun > args.budget:
            print(f"{name:<36} left out: {args.budget:.0f} s are over", flush=True)
            continue
        shutil.rmtree(folder / "out", ignore_errors=True)
        started = time.monotonic()
        receiving, sending = spawn.Pipe(duplex=False)
        flags = [*flags_of(folder, args.device, args.steps, batch_size, row), "--resolution", resolution]
        process = spawn.Process(target=measure_into, args=(sending, flags))
        process.start()
        sending.close()
        figures, phases, is_right = f"FAILED: no answer in {ROW_LIMIT} s", "", False
        try:
            if receiving.poll(ROW_LIMIT):
                figures, phases, is_right = receiving.recv()
        except EOFError:
            figures = "FAILED: its process ended without an answer"
        process.kill()  # if it still runs: what was asked of it is here, or will not come
        process.join()
        print(f"{name:<36} {figures}   in {time.monotonic() - started:.0f} s", flush=True)
        failed |= not is_right
        if phases:
            tables[name] = phases
    for name, phases in tables.items():
        print(f"{name}, a step by phase:\n{phases}", end="")
    sys.exit(failed)


if __name__ == "__main__":
    main()
