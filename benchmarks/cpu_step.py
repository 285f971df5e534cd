"""Time of a training step's parts on a CPU, each done in two ways, in turn in one process.

    python benchmarks/cpu_step.py --shape quarter [--threads 2] [--repeats 7]

Prints a table: each row is one part of a step of that shape's generated model, done in two ways: the median processor
seconds of either, and the median of the ratios of neighbouring measurements. Then the operators that take most time.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from make_model import SHAPES, build_model
from torch.profiler import ProfilerActivity, profile

from sd_recipes.model.narrow_heads import widen_narrow_heads

TEXT_TOKENS = 77


def seconds(work: Callable[[], object]) -> float:
    """Of all threads together: other programs on the machine disturb them less than the clock's."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def compare(one: Callable[[], object], other: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median seconds of two works that are done in turn, and the median of the second's over the first's."""
    one(), other()  # warm-up
    pairs = [(seconds(one), seconds(other)) for _ in range(repeats)]
    return *(statistics.median(each) for each in zip(*pairs, strict=True)), statistics.median(b / a for a, b in pairs)


def unet_step(unet: UNet2DConditionModel, latents: torch.Tensor, text: torch.Tensor) -> Callable[[], None]:
    timesteps = torch.arange(len(latents)) * 50

    def step() -> None:
        unet(latents, timesteps, text, return_dict=False)[0].square().mean().backward()

    return step


def operators(step: Callable[[], object], number: int) -> list[tuple[str, float, int]]:
    """The operators that take most time of a step of their own: (name, ms, calls)."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return [(event.key, event.self_cpu_time_total / 1e3, event.count) for event in events[:number]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="quarter")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--operators",
        type=int,
        default=12,
        help="how many to list of each UNet",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    *_, resolution, batch, _, _ = SHAPES[args.shape]
    batch = args.batch or batch
    with tempfile.TemporaryDirectory() as folder:
        build_model(args.shape, Path(folder))

        def unet(layout: torch.memory_format) -> UNet2DConditionModel:
            return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").train().to(memory_format=layout)

        plain, channels_last, widened = (
            unet(layout) for layout in (torch.contiguous_format, torch.channels_last, torch.channels_last)
        )
        widen_narrow_heads(widened)
        vaes = [AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False) for _ in range(2)]
    vaes[1].to(memory_format=torch.channels_last)
    side = resolution // 2 ** (len(vaes[0].config.block_out_channels) - 1)
    text = torch.randn(batch, TEXT_TOKENS, plain.config.cross_attention_dim)
    latents, pixels = torch.randn(batch, 4, side, side), torch.randn(batch, 3, resolution, resolution)
    steps = {
        "NCHW": unet_step(plain, latents, text),
        "channels_last": unet_step(channels_last, latents.to(memory_format=torch.channels_last), text),
        "wider heads": unet_step(widened, latents.to(memory_format=torch.channels_last), text),
    }
    steps["NCHW"](), steps["channels_last"]()  # gradients, for the optimizer
    adamw = {fused: torch.optim.AdamW(plain.parameters(), lr=0.0, fused=fused).step for fused in (None, True)}
    rows = (
        ("UNet, NCHW → channels_last", steps["NCHW"], steps["channels_last"]),
        ("UNet, channels_last → wider heads", steps["channels_last"], steps["wider heads"]),
        ("VAE, NCHW → channels_last", lambda: vaes[0].encode(pixels), lambda: vaes[1].encode(pixels)),
        (
            "VAE, channels_last, at once → one by one",
            lambda: vaes[1].encode(pixels),
            lambda: [vaes[1].encode(each) for each in pixels.split(1)],
        ),
        ("AdamW, foreach → fused", adamw[None], adamw[True]),
    )
    print(
        f"{args.shape}, batch {batch}, {resolution}², {args.threads} threads; {platform.machine()}, "
        f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )
    print("| part, and two ways of it | first, s | second, s | second / first |\n|---|---|---|---|")
    for part, one, other in rows:
        first, second, ratio = compare(one, other, args.repeats)
        print(f"| {part} | {first:.3f} | {second:.3f} | {ratio:.2f} |", flush=True)
    for name, step in steps.items():
        for key, ms, count in operators(step, args.operators):
            print(f"  {name:14} {ms:9.1f} ms {count:5d} calls  {key}")


if __name__ == "__main__":
    main()
