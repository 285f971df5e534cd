"""How far `sd-recipes plan` is from what a step takes: planned against measured, over a grid of runs in one process.

On a GPU against torch's allocator, on the CPU against the plan's own tracer over the real step:

python benchmarks/plan_accuracy.py --device cuda
python benchmarks/plan_accuracy.py --device cpu
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sd_recipes.assets import CONFIGURATIONS
from sd_recipes.memory.plan import Planner
from sd_recipes.memory.step import blank_batch
from sd_recipes.memory.tracer import Tracer
from sd_recipes.model.components import load_scheduler
from sd_recipes.model.families import family_of
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import DTYPES, forget_accelerator, start_accelerator
from sd_recipes.training.build_model import build_model
from sd_recipes.training.build_parts import choose_trained
from sd_recipes.training.loop import backward, update

# Stable Diffusion 1.5's shape by the width of its UNet's first block, at a resolution, with two batches.
GRID = {
    "cuda": [(128, 512, (2, 8)), (256, 512, (2, 8)), (320, 512, (1, 4))],
    "cpu": [(32, 64, (1, 4)), (32, 128, (1, 4)), (64, 64, (1, 4))],
}
TINY_TEXT = {
    "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 1000
}  # fmt: skip
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
MOST = 0.10  # error that is asked for
STEPS = 3


@dataclass(frozen=True)
class Measured:
    allocated: int
    reserved: int


def write_model(folder: Path, width: int) -> Path:
    """The configuration, without weights, of a Stable Diffusion 1 whose UNet has another width, and a VAE like it."""
    for part in ("unet", "vae", "text_encoder", "scheduler", "tokenizer"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (source,) = (CONFIGURATIONS[1] / part).glob("*.json")
        config = json.loads(source.read_text())
        if part == "unet":
            config["block_out_channels"] = [width, 2 * width, 4 * width, 4 * width]
            config["norm_num_groups"] = 16  # which divide all of these widths
            config["cross_attention_dim"] = TINY_TEXT["hidden_size"] if width < 80 else 768
        elif part == "text_encoder" and width < 80:
            config |= TINY_TEXT
        elif part == "vae" and width < 320:
            config["block_out_channels"] = [max(32, width * each // 320 // 32 * 32) for each in (128, 256, 512, 512)]
        (folder / part / source.name).write_text(json.dumps(config))
    return folder


def recipes(device: str, work_dir: Path) -> Iterator[tuple[str, Recipe]]:
    """The grid, with a name for each."""
    for width, resolution, batches in GRID[device]:
        model = write_model(work_dir / f"{width}-{resolution}", width)
        for precision, checkpointing, optimizer, batch in itertools.product(
            ("no", "bf16"), (False, True), OPTIMIZERS, batches
        ):
            passes = "checkpointing" if checkpointing else ""
            name = f"{width:<4}{resolution:<4}{precision:<5}{passes:<14}{optimizer:<10}{batch:>3}"
            yield (
                name,
                recipe_of(
                    model,
                    device,
                    resolution=resolution,
                    mixed_precision=precision,
                    gradient_checkpointing=checkpointing,
                    optimizer=optimizer,
                    train_batch_size=batch,
                ),
            )


def recipe_of(model: Path, device: str, **settings: Any) -> Recipe:
    return Recipe(
        pretrained_model_name_or_path=str(model),
        train_data_dir="unread",
        device=device,
        report_to="none",
        seed=0,
        lr_warmup_steps=0,
        **settings,
    )


def measure(recipe: Recipe) -> Measured:
    """What some real steps of this recipe take, with random weights; of its last steps, as the plan tells."""
    forget_accelerator()
    accelerator = start_accelerator(recipe)
    cuda = accelerator.device.type == "cuda"
    torch.manual_seed(0)
    family = family_of(recipe)
    components = family.load(recipe, load_scheduler(recipe), (), weights=False)
    choose_trained(recipe, family, components)
    for name in ("unet", "vae", *family.text_models):
        draw_weights(getattr(components, name), accelerator.device)
    tracer = Tracer(torch.device("cpu"), block=64)
    number = recipe.train_batch_size
    model, state = build_model(
        recipe,
        family,
        components,
        accelerator,
        vae_dtype=DTYPES[accelerator.mixed_precision],
        batch_size=number,
        num_steps=STEPS,
        num_rows=None,
    )
    frozen = [getattr(components, name) for name in ("vae", *family.text_models)]
    if not cuda:
        tracer.see([*state.parameters.values(), *(each for module in frozen for each in module.parameters())])
        tracer.see([*components.unet.buffers(), *(each for module in frozen for each in module.buffers())])
        for part in state.parts.values():
            for average in part.averages.values():
                tracer.see(average.named_tensors().values())
    for step in range(STEPS):
        if step == 1:
            tracer.moments.clear()
            tracer.begin("step")
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        batch = blank_batch(recipe, family, components, number)
        if cuda:
            one_step(batch, model, state, accelerator, recipe)
        else:
            with tracer:
                one_step(batch, model, state, accelerator, recipe)
    if cuda:
        return Measured(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    return Measured(tracer.moments["step"].total, 0)


def one_step(batch: Any, model: Any, state: Any, accelerator: Any, recipe: Recipe) -> None:
    model.exchange.begin()
    backward([batch], model, None, accelerator)
    model.exchange.finish(failed=False)
    update(state, accelerator, recipe.max_grad_norm)


def draw_weights(module: torch.nn.Module, device: torch.device) -> None:
    """Give a module on the meta device small random weights; its buffers are there."""
    for parent in module.modules():
        for name, parameter in parent.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, device=device).normal_(std=0.02)
            setattr(parent, name, torch.nn.Parameter(values, requires_grad=parameter.requires_grad))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=GRID, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="run only what has this in its name")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    errors, reserved_errors = [], []
    planners: dict[str | None, Planner] = {}
    print(f"{'GiB':<37}{'planned':>9}{'measured':>9}{'ratio':>7}   {'reserved planned':>17}{'measured':>9}{'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in recipes(arguments.device, Path(folder)):
            if arguments.only not in name:
                continue
            began = time.perf_counter()
            of_model = recipe.pretrained_model_name_or_path
            if of_model not in planners:
                planners = {of_model: Planner(arguments.device)}
            plan = planners[of_model].plan(recipe)
            traced = time.perf_counter()
            found = measure(recipe)
            ended = time.perf_counter()
            gc.collect()
            planned = plan.allocated if arguments.device == "cuda" else plan.tensors
            errors.append(planned / found.allocated - 1)
            line = f"{name:<37}{planned / 2**30:9.3f}{found.allocated / 2**30:9.3f}{1 + errors[-1]:7.3f}"
            if arguments.device == "cuda":
                reserved = plan.total - plan.overhead["CUDA context"]
                reserved_errors.append(reserved / found.reserved - 1)
                line += f"   {reserved / 2**30:17.3f}{found.reserved / 2**30:9.3f}{1 + reserved_errors[-1]:7.3f}"
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            print(f"{line}   {plan.phase:<10}{traced - began:5.1f} s +{ended - traced:5.1f} s", flush=True)
    if not errors:
        sys.exit(f"error: --only {arguments.only!r} is in the name of no run")
    print(f"largest error of {len(errors)}: {max(map(abs, errors)):.1%}", end="")
    print(f", of what is reserved {max(map(abs, reserved_errors)):.1%}" if reserved_errors else "")
    if arguments.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        used = (total - free - torch.cuda.memory_reserved()) / 2**20
        print(f"besides what torch has reserved, the device holds {used:.0f} MiB")
        print(
            f"the process has held {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB of the host's"
        )
    sys.exit(max(map(abs, errors)) > MOST)


if __name__ == "__main__":
    main()
