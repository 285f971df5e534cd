"""What would change a run's memory, at which price, and the fastest set of it that fits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sd_recipes.errors import RecipeError
from sd_recipes.memory.plan import MemoryPlan, Planner
from sd_recipes.recipe import Recipe
from sd_recipes.sizes import size_in_words

Changes = dict[str, Any]  # settings, by name
NOT_MEASURED = "not measured"
PROCESSES = (2, 4, 8)  # that FSDP is planned for


@dataclass(frozen=True)
class Remedy:
    """A change of settings that takes less memory."""

    words: str
    changes: Callable[[Recipe], Changes | None]  # None where it changes nothing, or cannot be combined
    price: str
    # How many times as long a step takes, by which sets are ordered: measured as `price` says, else assumed.
    slower: float


# Times are those of 20 steps of Stable Diffusion 1.5's shape at 512², bf16, batch 8, on an H100 with torch 2.11.
HALVED = Remedy(
    "half as many images at once",
    lambda recipe: (
        {"micro_batch": recipe.images_at_once // 2}
        if recipe.images_at_once > 1 and not recipe.fused_backward_pass
        else None
    ),
    NOT_MEASURED,
    1.05,
)
PRECISION = Remedy(
    "mixed precision",
    lambda recipe: {"mixed_precision": "bf16"} if recipe.mixed_precision in (None, "no") else None,
    f"faster since Ampere ({NOT_MEASURED})",
    0.5,
)
CHECKPOINTING = Remedy(
    "gradient checkpointing",
    lambda recipe: None if recipe.gradient_checkpointing else {"gradient_checkpointing": True},
    "27 % longer steps",
    1.27,
)
EIGHT_BIT = Remedy(
    "8-bit AdamW",
    lambda recipe: (
        {"optimizer": "adamw8bit"} if recipe.optimizer == "adamw" and recipe.channels_last != "always" else None
    ),
    "22 % longer steps at batch 8, less with accumulation",
    1.22,
)
HOST_AVERAGE = Remedy(
    "average on the host",
    lambda recipe: {"offload_ema": True} if recipe.use_ema and not recipe.offload_ema else None,
    NOT_MEASURED,
    1.1,
)
REMEDIES = (HALVED, PRECISION, CHECKPOINTING, EIGHT_BIT, HOST_AVERAGE)


@dataclass(frozen=True)
class Variation:
    """A run with one thing changed."""

    words: str
    flags: str
    plan: MemoryPlan
    price: str


def variations(planner: Planner, recipe: Recipe) -> Iterator[Variation]:
    """What would change the memory of a run, each by itself."""
    for remedy in REMEDIES:
        if changes := remedy.changes(recipe):
            plan = planner.plan(recipe.model_copy(update=changes))
            yield Variation(remedy.words, in_flags(changes), plan, remedy.price)
    if recipe.cache_latents == "off":
        kept = planner.plan(recipe, latents_are_kept=True)
        flags = "--cache_latents disk --center_crop, filled by `sd-recipes cache`"
        yield Variation("latents from the cache", flags, kept, "none: it saves the VAE's time, and fixes the crop")
    if planner.device == "cuda" and recipe.optimizer in ("adamw", "sgd") and not recipe.offload_ema:
        for number in PROCESSES:
            sharded = planner.plan(recipe, num_processes=number, is_sharded=True)
            yield Variation(f"FSDP over {number} GPUs", "accelerate_configs/fsdp2.yaml", sharded, NOT_MEASURED)


def fastest_that_fits(planner: Planner, recipe: Recipe, flag: str) -> MemoryPlan:
    """The plan of the recipe with the changes that take the least time, of those that fit into the planner's capacity.

    A precision that the recipe gives is kept. Raises RecipeError, which blames `flag`, if nothing fits.
    """
    assert planner.capacity is not None
    least: MemoryPlan | None = None
    for changes in _sets(recipe, planner.device):
        changed = recipe.model_copy(update=changes)
        plan = planner.plan(changed, about=True)
        if plan.fits:
            return planner.plan(changed)
        least = plan if least is None or plan.total < least.total else least
    assert least is not None
    changed = in_flags(differing(recipe, least.recipe))
    raise RecipeError(
        f"{flag} {size_in_words(planner.capacity)} is too little for {recipe.resolution} pixels: the least is "
        f"{size_in_words(least.total, up=True)}{f', with {changed}' if changed else ''}: use a smaller --resolution, or a "
        "device with more memory"
    )


def _sets(recipe: Recipe, device: str) -> Iterator[Changes]:
    """Sets of changes, those that take the least time first."""
    choices: list[list[tuple[float, Changes]]] = [[(1.0, {})] for _ in REMEDIES]
    for found, remedy in zip(choices, REMEDIES, strict=True):
        if remedy is PRECISION and (device == "cpu" or recipe.mixed_precision is not None):
            continue
        changes = remedy.changes(recipe)
        slower = remedy.slower
        while changes:
            found.append((slower, changes))
            changes = remedy.changes(recipe.model_copy(update=changes))
            slower *= remedy.slower
    together = []
    for chosen in itertools.product(*choices):
        price, update = 1.0, {}
        for slower, changes in chosen:
            price, update = price * slower, update | changes
        together.append((price, update))
    return (update for _, update in sorted(together, key=lambda each: each[0]))


def differing(recipe: Recipe, other: Recipe) -> Changes:
    """The settings in which another recipe differs."""
    return {name: value for name, value in other if value != getattr(recipe, name)}


def in_flags(changes: Changes) -> str:
    """Settings as flags to be pasted."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changes.items())
