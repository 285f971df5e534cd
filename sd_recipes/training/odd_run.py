"""Warnings about runs that are legal and pointless: what only shows once data and steps are known."""

from __future__ import annotations

import re
from pathlib import Path

from sd_recipes.data.workers import MOST, room_for_workers
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.cores import share_of_cores
from sd_recipes.training.description import batch_in_words
from sd_recipes.training.run import Run
from sd_recipes.training.run_length import num_epochs

MANY_EPOCHS = 500
FAR_SMALLER, FAR_LARGER = 0.7, 2.1  # of the side of the pictures that a model draws
LARGE_SHARE = 1 / 5  # of the rows, in one batch
# How many times as long a step takes on a CPU without bfloat16 instructions: with AVX-512, and with AVX2 only.
SLOWER_IN_BF16 = "2 to 7"


def odd_run(run: Run) -> list[str]:
    """What is probably a mistake in a run that was put together, each with the remedy; nothing if it is over."""
    if run.checkpoint and run.checkpoint[1].step >= run.num_steps:
        return []
    return [
        *odd_rates(run),
        *odd_length(run),
        *odd_resolution(run),
        *odd_validation(run),
        *odd_precision(run),
        *odd_workers(run.recipe, run.accelerator.device.type),
    ]


def odd_rates(run: Run) -> list[str]:
    """Of the learning rate: one that is never reached, and a warm-up without effect."""
    recipe, num_steps, warmup = run.recipe, run.num_steps, run.recipe.lr_warmup_steps
    if recipe.learning_rate == 0 and not recipe.param_groups:
        return ["--learning_rate 0 trains nothing: give one above 0, such as 1e-5."]
    if recipe.lr_scheduler == "constant":
        if warmup and is_given(recipe, "lr_warmup_steps"):
            return [
                f"--lr_warmup_steps {warmup} has no effect under --lr_scheduler constant: use --lr_scheduler "
                "constant_with_warmup, or --lr_warmup_steps 0."
            ]
        return []
    if 2 * warmup <= num_steps:
        return []
    highest = max(map(run.state.schedule.lr_lambdas[0], range(num_steps)))
    flag = shown(recipe, "lr_warmup_steps")
    remedy = f"--lr_warmup_steps {num_steps // 10}"
    if highest < 1:
        return [
            f"{flag} is longer than the run of {num_steps} steps: under --lr_scheduler {recipe.lr_scheduler} the "
            f"learning rate gets to {100 * highest:.2g} % of --learning_rate {recipe.learning_rate:g}. Use "
            f"{remedy}, or train longer."
        ]
    return [
        f"{flag} is more than half of the run of {num_steps} steps, and most of it has a lower rate than "
        f"--learning_rate {recipe.learning_rate:g}: use {remedy}, or train longer."
    ]


def odd_length(run: Run) -> list[str]:
    """Of batch and steps: too large for the data."""
    recipe, order = run.recipe, run.data.order
    if order is None:  # a stream, of which nobody knows the rows
        return []
    odd = []
    size, rows = run.data.global_batch_size, order.num_rows
    if size > 1 and size > LARGE_SHARE * rows:
        flags = batch_of_at_most(LARGE_SHARE * rows, recipe, run.accelerator.num_processes)
        odd.append(
            f"The global batch of {batch_in_words(run)} is more than a fifth of the {rows} rows: an epoch has only "
            f"{order.num_steps(1)} steps, which hardly differ. Use {flags}, or more rows."
        )
    epochs = num_epochs(run, order)
    if epochs > MANY_EPOCHS:
        length = "num_train_epochs" if recipe.max_train_steps is None else "max_train_steps"
        enough = MANY_EPOCHS if recipe.max_train_steps is None else MANY_EPOCHS * order.num_steps(1)
        odd.append(
            f"{shown(recipe, length)} goes {epochs:,.0f} times over the {rows} rows, and the model knows them by heart "
            f"long before that: use --{length} {enough} or less, or more rows."
        )
    return odd


def odd_resolution(run: Run) -> list[str]:
    """A size of pictures that the model was not made for, as its UNet's configuration says."""
    recipe, components = run.recipe, run.model.components
    latents = components.unet.config.sample_size
    if recipe.train_from_scratch or not isinstance(latents, int):
        return []
    usual = latents * components.vae_scale_factor
    if FAR_SMALLER * usual <= recipe.resolution <= FAR_LARGER * usual:
        return []
    return [
        f"{shown(recipe, 'resolution')} is far from the {usual} pixels a side that the model draws at, and it has much "
        f"to learn anew: use --resolution {usual}."
    ]


def odd_validation(run: Run) -> list[str]:
    """Of validations that never come, before the one at the end."""
    recipe, order = run.recipe, run.data.order
    if not (recipe.validation_prompts or recipe.validation_split):
        return [
            f"{shown(recipe, name)} has no effect without --validation_prompts or --validation_split: add one of them."
            for name in ("validation_epochs", "validation_steps", "validate_before_training")
            if is_given(recipe, name)
        ]
    before = "before it, " if recipe.validation_split else ""
    if recipe.validation_steps is not None:
        flag, is_beyond = shown(recipe, "validation_steps"), recipe.validation_steps > run.num_steps
        length, otherwise = f"{run.num_steps} steps", f"{before}at its end only"
    elif order is not None:
        epochs = num_epochs(run, order)
        flag, is_beyond = shown(recipe, "validation_epochs"), recipe.validation_epochs > epochs
        length = "1 epoch" if epochs == 1 else f"{epochs:.3g} epochs"
        otherwise = f"{before}{'after its first epoch and ' if epochs > 1 else ''}at its end only"
    else:
        return []
    if not is_beyond:
        return []
    return [
        f"{flag} is beyond the end of the run of {length}, which is validated {otherwise}: use --validation_steps "
        f"{max(1, run.num_steps // 10)} for more."
    ]


def odd_precision(run: Run) -> list[str]:
    """bfloat16 on a CPU that has no instructions for it."""
    on_cpu = run.accelerator.device.type == "cpu" and run.accelerator.mixed_precision == "bf16"
    if not on_cpu or cpu_has_bf16():
        return []
    return [
        f"This CPU has no bfloat16 instructions, and bf16 mixed precision makes a step {SLOWER_IN_BF16} times as long "
        "(measured, see docs/running.md): use --mixed_precision no."
    ]


def odd_workers(recipe: Recipe, device: str) -> list[str]:
    """Fewer loader processes than a GPU would have, because of a container's small shared memory."""
    wanted, room = min(MOST, share_of_cores()), room_for_workers(recipe)
    if device != "cuda" or recipe.dataloader_num_workers is not None or room >= wanted:
        return []
    return [
        f"Shared memory (/dev/shm) has room for what {room} loader processes read ahead, instead of {wanted}: start "
        "the container with more, such as docker's --shm-size 2g, or lower --train_batch_size."
    ]


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU computes with bfloat16; True where the system does not say, as on macOS."""
    try:
        flags = re.findall(r"^(?:flags|Features)\s*:(.*)", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return True
    return not flags or bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags[0].split()))


def batch_of_at_most(size: float, recipe: Recipe, num_processes: int) -> str:
    """Flags of a global batch that is no larger than that, or else the smallest."""
    accumulated = recipe.gradient_accumulation_steps
    if per_device := int(size / (accumulated * num_processes)):
        return f"--train_batch_size {per_device}"
    smallest = "--train_batch_size 1"
    if accumulated > 1:
        smallest += f" --gradient_accumulation_steps {max(1, int(size / num_processes))}"
    return smallest if size >= num_processes else f"{smallest} and fewer processes"


def is_given(recipe: Recipe, name: str) -> bool:
    """Whether someone chose that value: a resolved recipe gives every setting, at its default too."""
    is_default = getattr(recipe, name) == Recipe.model_fields[name].default
    return name in recipe.model_fields_set and not (is_default and recipe.config)


def shown(recipe: Recipe, name: str) -> str:
    """A flag as it would be typed, and whether it is the default."""
    value = getattr(recipe, name)
    flag = f"--{name}" if value is True else f"--{name} {value}"
    return flag if is_given(recipe, name) else f"{flag} (the default)"
