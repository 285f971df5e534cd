"""`sd-recipes plan`: what a run will need of memory, what would change that, and the fastest set that fits."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tqdm.auto import tqdm

from sd_recipes.commands.memory_dial import memory_here
from sd_recipes.commands.plan_settings import PlanSettings
from sd_recipes.errors import RecipeError
from sd_recipes.memory.plan import MemoryPlan, Planner
from sd_recipes.memory.remedies import NothingFits, Variation, fastest_that_fits, variations
from sd_recipes.memory.show import as_json, best_in_lines, draw, in_lines, variations_in_lines
from sd_recipes.model.families import check_trainable
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.console import say


def plan(settings: PlanSettings) -> None:
    """Print the plan, and draw it where that is asked for. Raises RecipeError, if nothing fits after all else."""
    recipe, number = settings.recipe, settings.num_processes
    check_trainable(recipe)
    device = "cpu" if recipe.device == "cpu" else "cuda"
    capacity = settings.budget if settings.budget is not None else memory_here(device)
    refusal: NothingFits | None = None
    best: MemoryPlan | None = None
    # Forked before anything is traced: autograd's threads would not come along.
    with (
        ProcessPoolExecutor(1, mp_context=get_context("fork")) as beside,
        tqdm(desc="Planning", unit="trace", leave=False, disable=None) as bar,
    ):
        changed = beside.submit(_variations, recipe, device, number)
        planner = Planner(device, capacity, num_processes=number, told=bar.update)
        asked = planner.plan(recipe)
        if settings.output is not None:
            try:
                draw(asked, settings.output)
            except OSError as error:
                raise RecipeError(f"--output {settings.output} cannot be written: {error.strerror}") from None
        if not settings.as_json:
            bar.clear()
            say(in_lines(asked))
        if capacity is not None:
            try:
                best = fastest_that_fits(planner, recipe, settings.budget_flag)
            except NothingFits as error:
                refusal = error
        found = changed.result()
    if settings.as_json:
        print(json.dumps(as_json(asked, found, best, refusal.least if refusal else None), indent=1))
    else:
        say(variations_in_lines(asked, found))
        if best is not None:
            say(best_in_lines(asked, best))
    if refusal is not None:
        raise refusal


def _variations(recipe: Recipe, device: str, num_processes: int) -> list[Variation]:
    return list(variations(Planner(device, num_processes=num_processes), recipe))
