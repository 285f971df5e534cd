"""What would change a run's memory, at which price, and the fastest set of it that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sd_recipes.errors import RecipeError
from sd_recipes.memory.plan import MemoryPlan, Planner
from sd_recipes.optimizers import steps_one_by_one
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
    lambda recipe: (
        None
        if recipe.gradient_checkpointing or recipe.gradient_checkpointing_blocks
        else {"gradient_checkpointing": True}
    ),
    "27 % longer steps",
    1.27,
)
EIGHT_BIT = Remedy(
    "8-bit AdamW",
    lambda recipe: (
        {"optimizer": "adamw8bit"}
        if recipe.optimizer == "adamw" and not recipe.optimizer_kwargs and recipe.channels_last != "always"
        else None
    ),
    "22 % longer steps at batch 8, less with accumulation",
    1.22,
)
HOST_AVERAGE = Remedy(
    "average on the host",
    lambda recipe: (
        {"offload_ema": True} if (recipe.use_ema or recipe.ema_snapshots) and not recipe.offload_ema else None
    ),
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
        if recipe.mixed_precision == "bf16"
        and recipe.weights_dtype == "float32"
        and not recipe.trains_lora
        and steps_one_by_one(recipe.optimizer)
        else None
    ),
    "23 % longer steps, and rounding",
    2.0,
)
FUSED_BACKWARD = Remedy(
    "steps in the backward pass",
    lambda recipe: (
        {"fused_backward_pass": True, "max_grad_norm": 0}
        if not recipe.fused_backward_pass
        and recipe.mixed_precision != "fp16"
        and one_pass(recipe)
        and steps_one_by_one(recipe.optimizer)
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


def changes_by(remedy: Remedy, recipe: Recipe, planner: Planner) -> Changes | None:
    """What a remedy changes; None if nothing, or if the run would refuse it on its device and number of processes."""
    if remedy is FUSED_BACKWARD and planner.num_processes > 1:
        return None
    if remedy is HOST_AVERAGE and planner.device == "cpu":
        return None
    return remedy.changes(recipe)


def variations(planner: Planner, recipe: Recipe) -> Iterator[Variation]:
    """What would change the memory of a run, each by itself."""
    peak = planner.plan(recipe).phase
    for remedy in REMEDIES:
        changes = changes_by(remedy, recipe, planner)
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
    whole = recipe.offload_ema or recipe.fused_backward_pass or bool(recipe.compile) or recipe.trains_lora
    plain = recipe.weights_dtype == "float32" and recipe.mixed_precision != "fp16"
    return recipe.optimizer in ("adamw", "sgd") and plain and not whole


class NothingFits(RecipeError):
    """No set of changes fits into the memory; `least` is the plan of the one that takes the least."""

    def __init__(self, words: str, least: MemoryPlan) -> None:
        super().__init__(words)
        self.least = least


def fastest_that_fits(planner: Planner, recipe: Recipe, flag: str | None) -> MemoryPlan:
    """The plan of the recipe with the changes that cost the least, of those that fit into the planner's capacity.

    A precision that the recipe gives is kept. Raises NothingFits, which blames `flag`, or else what there is here.
    """
    assert planner.capacity is not None
    smallest = list(_smallest(planner, recipe))
    may_fit = any(planner.least(each) <= planner.capacity for each in smallest)
    for changed in _sets(planner, recipe) if may_fit else ():
        # The update alone is traced in less time, and tells of many that they do not fit; so does what is about right.
        if planner.least(changed) <= planner.capacity and planner.plan(changed, about=True).fits:
            plan = planner.plan(changed)
            if plan.fits:
                return plan
    least = min((planner.plan(each) for each in smallest), key=lambda plan: plan.total)
    changes = in_flags(differing(recipe, least.recipe))
    what, way_out = (flag, "raise it") if flag else ("the memory here, of", "train where there is more")
    raise NothingFits(
        f"{what} {size_in_words(planner.capacity)} is too little for this model at {recipe.resolution} pixels: it "
        f"takes {size_in_words(least.total, up=True)}, with {changes or 'the settings as they are'}: {way_out}, or "
        "lower --resolution",
        least,
    )


def _remedies(planner: Planner, recipe: Recipe) -> list[Remedy]:
    """Those that may be chosen: a precision that the recipe gives is kept."""
    keeps = planner.device == "cpu" or recipe.mixed_precision is not None
    return [each for each in REMEDIES if not (each is PRECISION and keeps)]


def _sets(planner: Planner, recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with sets of changes, those that cost the least first."""
    found = [(1.0, recipe)]
    for remedy in _remedies(planner, recipe):
        grown = []
        for cost, changed in found:
            while changes := changes_by(remedy, changed, planner):
                cost, changed = cost * remedy.cost, changed.model_copy(update=changes)
                grown.append((cost, changed))
        found += grown
    return (changed for _, changed in sorted(found, key=lambda each: each[0]))


def _smallest(planner: Planner, recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with all that may be chosen, and without what may cost more than it saves or excludes another."""
    remedies = _remedies(planner, recipe)
    for left_out in ((FUSED_BACKWARD,), (HALVED,), (FUSED_BACKWARD, HOST_AVERAGE), (HALVED, HOST_AVERAGE)):
        changed = recipe
        for remedy in remedies:
            while remedy not in left_out and (changes := changes_by(remedy, changed, planner)):
                changed = changed.model_copy(update=changes)
        yield changed


def differing(recipe: Recipe, other: Recipe) -> Changes:
    """The settings in which another recipe differs."""
    return {name: value for name, value in other if value != getattr(recipe, name)}


def in_flags(changes: Changes) -> str:
    """Settings as flags to be pasted."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in sorted(changes.items()))
