"""`sd-recipes plan`: what a run will need of memory, what would change that, and the fastest set that fits."""

from __future__ import annotations

import json

from sd_recipes.commands.memory_dial import memory_here
from sd_recipes.commands.plan_settings import PlanSettings
from sd_recipes.errors import RecipeError
from sd_recipes.memory.plan import Planner
from sd_recipes.memory.remedies import fastest_that_fits, variations
from sd_recipes.memory.show import as_json, draw, in_lines
from sd_recipes.runtime.console import say


def plan(settings: PlanSettings) -> None:
    """Print the plan, and draw it where that is asked for. Raises RecipeError."""
    recipe = settings.recipe
    device = "cpu" if recipe.device == "cpu" else "cuda"
    capacity = settings.budget if settings.budget is not None else memory_here(device)
    planner = Planner(device, capacity)
    asked = planner.plan(recipe)
    best = None if capacity is None else fastest_that_fits(planner, recipe, "--budget")
    changed = list(variations(planner, recipe))
    if settings.output is not None:
        try:
            draw(asked, settings.output)
        except OSError as error:
            raise RecipeError(f"--output {settings.output} cannot be written: {error.strerror}") from None
    if settings.as_json:
        print(json.dumps(as_json(asked, changed, best), indent=1))
    else:
        say(in_lines(asked, changed, best))
