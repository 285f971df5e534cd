"""Time of a training step's parts on a CPU, each done in two ways, in turn in one process.

    python benchmarks/cpu_step.py --shape quarter [--threads 2] [--repeats 7]

Prints a table: each row is one part of a step of that shape's generated model, done in two ways: the median processor
time of either, and the median of the ratios of neighbouring measurements. Then the operators that take most time.
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
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from make_model import SHAPES, build_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sd_recipes.model.latents import images_at_once, most_pixels
from sd_recipes.model.narrow_heads import WIDTH, widen_narrow_heads
from sd_recipes.training.ema import move_towards

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


def norm(channels: int, batch: int, side: int, layout: torch.memory_format) -> Callable[[], None]:
    """A group norm of the UNet's first level, forward and backward."""
    layer = torch.nn.GroupNorm(channels // 16, channels).to(memory_format=layout)
    states = torch.randn(batch, channels, side, side).to(memory_format=layout).requires_grad_()

    def both_ways() -> None:
        layer(states).backward(states.detach())

    return both_ways


def attention(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], channels: int, heads: int, batch: int, queries: int, keys: int
) -> Callable[[], None]:
    """Attention of heads that have been filled up, as in the UNet, forward and backward."""
    width = max(WIDTH, channels // heads)
    query, key, value = (
        torch.randn(batch, number, heads * width, requires_grad=True).unflatten(-1, (heads, width)).transpose(1, 2)
        for number in (queries, keys, keys)
    )

    def both_ways() -> None:
        found = attend(query, key, value)
        torch.autograd.grad(found, (query, key, value), torch.ones_like(found))

    return both_ways


def by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by two products of matrices and a softmax between them."""
    return (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1) @ value


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
    channels = plain.config.block_out_channels[0]
    heads = plain.down_blocks[0].attentions[0].transformer_blocks[0].attn1.heads
    average = [parameter.detach().clone() for parameter in plain.parameters()]
    weights = [parameter.detach() for parameter in plain.parameters()]
    at_once = images_at_once(most_pixels("cpu"), resolution**2)
    adamw = {fused: torch.optim.AdamW(plain.parameters(), lr=0.0, fused=fused).step for fused in (None, True)}
    rows = (
        ("UNet, NCHW → channels_last", steps["NCHW"], steps["channels_last"]),
        ("UNet, channels_last → wider heads", steps["channels_last"], steps["wider heads"]),
        ("VAE, NCHW → channels_last", lambda: vaes[0].encode(pixels), lambda: vaes[1].encode(pixels)),
        (
            f"VAE, channels_last, {batch} images at once → {at_once}",
            lambda: vaes[1].encode(pixels),
            lambda: [vaes[1].encode(each) for each in pixels.split(at_once)],
        ),
        (
            f"a group norm of {channels}, NCHW → channels_last",
            norm(channels, batch, side, torch.contiguous_format),
            norm(channels, batch, side, torch.channels_last),
        ),
        *(
            (
                f"an attention, {side**2} × {keys}, torch's → products",
                *(
                    attention(attend, channels, heads, batch, side**2, keys)
                    for attend in (F.scaled_dot_product_attention, by_products)
                ),
            )
            for keys in (side**2, TEXT_TOKENS)
        ),
        ("AdamW, foreach → fused", adamw[None], adamw[True]),
        (
            "an average, a parameter at a time → all",
            lambda: [each.lerp_(weight, 0.1) for each, weight in zip(average, weights, strict=True)],
            lambda: move_towards(average, weights, 0.1),
        ),
    )
    print(
        f"{args.shape}, batch {batch}, {resolution}², {args.threads} threads; {platform.machine()}, "
        f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )
    print("| part, and two ways of it | first, ms | second, ms | second / first |\n|---|---|---|---|")
    for part, one, other in rows:
        first, second, ratio = compare(one, other, args.repeats)
        print(f"| {part} | {1000 * first:.1f} | {1000 * second:.1f} | {ratio:.2f} |", flush=True)
    for name, step in steps.items():
        for key, ms, count in operators(step, args.operators):
            print(f"  {name:14} {ms:9.1f} ms {count:5d} calls  {key}")


if __name__ == "__main__":
    main()
