"""What would change a run's memory, at which price, and the fastest set of it that fits."""

from __future__ import annotations

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
SMALLEST = 40  # of the sets of changes, which are the costliest: one of them takes the least


@dataclass(frozen=True)
class Remedy:
    """A change of settings that takes less memory."""

    words: str
    changes: Callable[[Recipe], Changes | None]  # None where it changes nothing, or cannot be combined
    price: str
    # By which sets are ordered: how many times as long a step takes, measured as `price` says or else assumed, and more
    # where the training itself becomes another.
    cost: float


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
    "none, steps are four times as fast",
    0.25,
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
    "3 % longer steps",
    1.03,
)
VAE_SLICING = Remedy(
    "VAE one image at a time",
    lambda recipe: {"vae_slicing": True} if not recipe.vae_slicing and recipe.images_at_once > 1 else None,
    NOT_MEASURED,
    1.02,
)
BF16_WEIGHTS = Remedy(
    "weights in bf16 alone",
    lambda recipe: (
        {"weights_dtype": "bf16"}
        if recipe.mixed_precision == "bf16" and recipe.weights_dtype == "float32" and not recipe.trains_lora
        else None
    ),
    "23 % longer steps, and rounding",
    2.0,
)
FUSED_BACKWARD = Remedy(
    "steps in the backward pass",
    lambda recipe: (
        {"fused_backward_pass": True, "max_grad_norm": 0}
        if not recipe.fused_backward_pass and recipe.mixed_precision != "fp16" and one_pass(recipe)
        else None
    ),
    "77 % longer steps, and no clipping",
    3.0,
)
REMEDIES = (
    HALVED, PRECISION, CHECKPOINTING, EIGHT_BIT, HOST_AVERAGE, VAE_SLICING, BF16_WEIGHTS, FUSED_BACKWARD
)  # fmt: skip


def one_pass(recipe: Recipe) -> bool:
    """Whether a step has a single backward pass."""
    return recipe.images_at_once == recipe.train_batch_size and recipe.gradient_accumulation_steps == 1


@dataclass(frozen=True)
class Variation:
    """A run with one thing changed."""

    words: str
    flags: str
    plan: MemoryPlan
    price: str


def variations(planner: Planner, recipe: Recipe) -> Iterator[Variation]:
    """What would change the memory of a run, each by itself."""
    peak = planner.plan(recipe).phase
    for remedy in REMEDIES:
        changes = remedy.changes(recipe)
        if changes and (remedy is not VAE_SLICING or peak == "encoding"):
            plan = planner.plan(recipe.model_copy(update=changes), about=True)
            yield Variation(remedy.words, in_flags(changes), plan, remedy.price)
    if recipe.cache_latents == "off":
        kept = planner.plan(recipe, latents_are_kept=True)
        flags = "--cache_latents disk --center_crop, filled by `sd-recipes cache`"
        yield Variation("latents from the cache", flags, kept, "none, it saves the VAE's time; the crop is fixed")
    if planner.device == "cuda" and can_be_sharded(recipe):
        for number in PROCESSES:
            sharded = planner.plan(recipe, num_processes=number, is_sharded=True)
            yield Variation(f"FSDP over {number} GPUs", "accelerate_configs/fsdp2.yaml", sharded, NOT_MEASURED)


def can_be_sharded(recipe: Recipe) -> bool:
    """Whether FSDP goes with a recipe: see runtime/fsdp.py."""
    whole = recipe.offload_ema or recipe.fused_backward_pass or recipe.compile_unet or recipe.trains_lora
    plain = recipe.weights_dtype == "float32" and recipe.mixed_precision != "fp16"
    return recipe.optimizer in ("adamw", "sgd") and plain and not whole


def fastest_that_fits(planner: Planner, recipe: Recipe, flag: str) -> MemoryPlan:
    """The plan of the recipe with the changes that cost the least, of those that fit into the planner's capacity.

    A precision that the recipe gives is kept. Raises RecipeError, which blames `flag`, if nothing fits.
    """
    assert planner.capacity is not None
    sets = list(_sets(recipe, planner.device))
    for changed in sets:
        # The update alone is traced in less time, and tells of many that they do not fit; so does what is about right.
        if planner.least(changed) <= planner.capacity and planner.plan(changed, about=True).fits:
            plan = planner.plan(changed)
            if plan.fits:
                return plan
    smallest = planner.plan(min(sets[-SMALLEST:], key=planner.least))
    flags = in_flags(differing(recipe, smallest.recipe)) or "the settings as they are"
    raise RecipeError(
        f"{flag} {size_in_words(planner.capacity)} is too little for this model at {recipe.resolution} pixels: it "
        f"takes {size_in_words(smallest.total, up=True)}, with {flags}: raise it, or "
        "lower --resolution"
    )


def _sets(recipe: Recipe, device: str) -> Iterator[Recipe]:
    """The recipe with sets of changes, those that cost the least first."""
    found = [(1.0, recipe)]
    for remedy in REMEDIES:
        if remedy is PRECISION and (device == "cpu" or recipe.mixed_precision is not None):
            continue
        grown = []
        for cost, changed in found:
            while changes := remedy.changes(changed):
                cost, changed = cost * remedy.cost, changed.model_copy(update=changes)
                grown.append((cost, changed))
        found += grown
    return (changed for _, changed in sorted(found, key=lambda each: each[0]))


def differing(recipe: Recipe, other: Recipe) -> Changes:
    """The settings in which another recipe differs."""
    return {name: value for name, value in other if value != getattr(recipe, name)}


def in_flags(changes: Changes) -> str:
    """Settings as flags to be pasted."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in sorted(changes.items()))
