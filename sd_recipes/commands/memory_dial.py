"""What a run needs of memory, said before anything is loaded; and --memory, which chooses settings so that it fits."""

from __future__ import annotations

import logging
import os

import torch

from sd_recipes.commands.plan_settings import with_known_configuration
from sd_recipes.errors import RecipeError, one_line
from sd_recipes.memory.plan import MemoryPlan, Planner, Untraceable
from sd_recipes.memory.remedies import differing, fastest_that_fits, in_flags
from sd_recipes.memory.show import fit_in_words, sum_in_words
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.console import is_main_process
from sd_recipes.runtime.fsdp import FSDP_VARIABLE, is_set
from sd_recipes.runtime.launcher import MIXED_PRECISION
from sd_recipes.sizes import bytes_of

logger = logging.getLogger(__name__)


def planned(recipe: Recipe) -> tuple[Recipe, MemoryPlan | None]:
    """The recipe with what --memory chooses, and its plan, which is said.

    Without --memory a run on the CPU has no plan, since tracing takes as long there as small runs take to start. To be
    called before an Accelerator is made, whose precision may be chosen here; with --memory by every process, which all
    choose alike. Raises RecipeError if nothing fits.
    """
    device = device_of(recipe)
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    is_sharded = num_processes > 1 and is_set(FSDP_VARIABLE)
    if recipe.memory is None:
        if device == "cpu" or not is_main_process():
            return recipe, None
        try:
            as_it_is = with_precision(with_known_configuration(recipe), device)
            planner = Planner(device, memory_here(device), num_processes=num_processes)
            plan = planner.plan(as_it_is, is_sharded=is_sharded)
        except Exception as error:  # whatever it is: a run must not end because it cannot be foretold
            if isinstance(error, RecipeError) and not isinstance(error, Untraceable):
                raise
            logger.warning(
                "What the run needs of memory cannot be told (%s: %s).", type(error).__name__, one_line(error)
            )
            return recipe, None
        tell(plan)
        return recipe, plan
    if is_sharded:
        raise RecipeError(
            f"--memory {recipe.memory} chooses among settings that need whole weights, which FSDP shards: drop it, and "
            "use --micro_batch and --gradient_checkpointing"
        )
    planner = Planner(device, bytes_of(recipe.memory), num_processes=num_processes)
    before = with_precision(with_known_configuration(recipe), device)
    plan = fastest_that_fits(planner, before, "--memory")
    changes = differing(before, plan.recipe)
    if is_main_process():
        logger.info("--memory %s: %s.", recipe.memory, in_flags(changes) or "it fits as it is")
        tell(plan)
    return recipe.model_copy(update=changes), plan


def with_precision(recipe: Recipe, device: str) -> Recipe:
    """The recipe with the precision that the launcher's configuration or the hardware decides, if one of them does."""
    given = recipe.mixed_precision or os.environ.get(MIXED_PRECISION)
    if given is None and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        given = "no"
    return recipe.model_copy(update={"mixed_precision": given})


def tell(plan: MemoryPlan) -> None:
    """Say the plan in one line, and warn if it does not fit."""
    words = f"{sum_in_words(plan)}{fit_in_words(plan)}"
    logger.info("Memory: %s; the peak is in the step's %s phase.", words, plan.phase)
    if not plan.fits:
        assert plan.capacity is not None
        logger.warning(
            "Memory will probably run out. `sd-recipes plan` with the same flags says what would change that, and "
            "--memory %dMB chooses what fits.", plan.capacity // 10**6,
        )  # fmt: skip


def memory_here(device: str) -> int | None:
    """Bytes of the present device of that kind; None if there is none."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def device_of(recipe: Recipe) -> str:
    """The kind of device that a run trains on here."""
    on_cpu = recipe.device == "cpu" or is_set("ACCELERATE_USE_CPU")
    return "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
