"""Seconds until a model has learned the emoji flags to a stated held-out loss: ours, and diffusers' script.

    python benchmarks/time_to_loss.py --peer_script path/to/diffusers/examples/text_to_image/train_text_to_image.py

Both train the embedded base on the 254 flags with the same command line, and write a checkpoint every --every steps.
Afterwards this program, which knows neither script, measures the held-out loss of each checkpoint: the mean squared
error of the prediction on the 16 flags that nobody trained on, at 64 fixed timesteps and noises each, in float32. The
time of a checkpoint is that of its last file, from the command on: imports, loading and the writing of checkpoints are
part of it, as for a user. --our_flags adds flags to ours alone, for a third run of each seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from make_model import copy_emoji
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).parent
OURS = HERE.parent / "train_text_to_image.py"
RECIPE = "--learning_rate 1e-3 --train_batch_size 32 --lr_scheduler cosine --lr_warmup_steps 10 --random_flip"
DRAWS = 64  # timesteps and noises of each held-out picture


class HeldOutLoss:
    """The loss of a UNet on held-out pictures, always with the same draws."""

    @torch.no_grad()
    def __init__(self, model: Path, pictures: Path) -> None:
        vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
        text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
        self.scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
        rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text("utf-8").splitlines()]
        pixels = np.stack([np.asarray(Image.open(pictures / row["file_name"]).convert("RGB")) for row in rows])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        self.latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
        ids = tokenizer(
            [row["text"] for row in rows], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        self.states = text_encoder(ids)[0]
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(DRAWS, *self.latents.shape, generator=generator)
        steps = self.scheduler.config.num_train_timesteps
        self.timesteps = torch.randint(steps, (DRAWS, len(rows)), generator=generator)

    @torch.no_grad()
    def __call__(self, unet_folder: Path) -> float:
        unet = UNet2DConditionModel.from_pretrained(unet_folder).eval()
        losses = []
        for noise, timesteps in zip(self.noise, self.timesteps, strict=True):
            noisy = self.scheduler.add_noise(self.latents, noise, timesteps)
            target = noise
            if self.scheduler.config.prediction_type == "v_prediction":
                target = self.scheduler.get_velocity(self.latents, noise, timesteps)
            prediction = unet(noisy, timesteps, self.states, return_dict=False)[0]
            losses.append(float((prediction - target).square().mean()))
        return statistics.mean(losses)


def train(script: Path, work: Path, flags: list[str], output_dir: Path) -> dict[int, float]:
    """Run a script to its end; returns the seconds from its command until each of its checkpoints was written."""
    shutil.rmtree(output_dir, ignore_errors=True)
    begin = time.time()
    environment = {**os.environ, "PEAK_FILE": str(work / "peak"), "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, HERE / "measured_run.py", script, *flags, "--output_dir", output_dir]
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {script} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    return {
        int(folder.name.rpartition("-")[2]): max(file.stat().st_mtime for file in folder.rglob("*")) - begin
        for folder in output_dir.glob("checkpoint-*")
    }


def time_to(loss: float, times: dict[int, float], losses: dict[int, float]) -> float | None:
    """When the loss was reached, linear in the time between two checkpoints; None if it was not."""
    for one, other in itertools.pairwise(sorted(times)):
        if losses[other] <= loss:
            share = (losses[one] - loss) / (losses[one] - losses[other]) if losses[one] > loss else 0.0
            return times[one] + share * (times[other] - times[one])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer_script", "--peer-script", type=Path, required=True)
    parser.add_argument("--loss", type=float, default=0.5, help="to be reached")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--our_flags",
        default="--cache_latents memory --center_crop --cache_text",
        help="of our second way, in one string",
    )
    args = parser.parse_args()
    print(f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}; flags of both: {RECIPE}")
    print(f"ours, second way: {args.our_flags}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        copy_emoji(work / "flags", "flags")
        copy_emoji(work / "held_out", "flags_heldout")
        held_out_loss = HeldOutLoss(work / "flags" / "model", work / "held_out" / "pictures")
        print(f"held-out loss of the base: {held_out_loss(work / 'flags' / 'model' / 'unet'):.4f}")
        print(f"| seed | way | seconds to {args.loss} | held-out loss after {args.steps} steps | seconds of those |")
        print("|---|---|---|---|---|")
        for seed in args.seeds:
            shared = [
                "--pretrained_model_name_or_path", work / "flags" / "model", "--resolution", 64, "--seed", seed,
                "--train_data_dir", work / "flags" / "pictures", "--max_train_steps", args.steps,
                "--checkpointing_steps", args.every, "--cache_dir", work / "cache", *RECIPE.split(),
            ]  # fmt: skip
            for way, script, extra in (
                ("diffusers", args.peer_script, ""),
                ("ours", OURS, ""),
                ("ours, second way", OURS, args.our_flags),
            ):
                output_dir = work / "run"
                times = train(script, work, [*map(str, shared), *extra.split()], output_dir)
                losses = {step: held_out_loss(output_dir / f"checkpoint-{step}" / "unet") for step in times}
                reached = time_to(args.loss, times, losses)
                words = "not reached" if reached is None else f"{reached:.1f}"
                last = max(times)
                print(f"| {seed} | {way} | {words} | {losses[last]:.4f} | {times[last]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
