"""The settings of `sd-recipes plan`. Imports no torch, so that a mistake is reported at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sd_recipes import assets
from sd_recipes.errors import RecipeError
from sd_recipes.flags import Command, build_parser, build_recipe, explain, parse_flags, read_files
from sd_recipes.recipe import OF_ONE_SOURCE, SECTIONS, Recipe, Section, setting
from sd_recipes.sizes import bytes_of

PLAN = Command(
    "sd-recipes plan",
    "Tell what a run will need of memory, and what would change it, with the flags of `train`. Neither weights nor a\n"
    "GPU are needed: only the model's configuration is read. --device says what is planned for: a GPU, or the CPU.",
    """
    sd-recipes plan --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --budget 12GB
    sd-recipes plan --config sd15_12gb
""",
)
NO_DATA = "the pictures"  # stands for data that a plan does not need

# Published models whose configurations come with the package, but for what memory does not depend on.
STABLE_DIFFUSION_1 = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-1",
    "CompVis/stable-diffusion-v1-2", "CompVis/stable-diffusion-v1-3", "CompVis/stable-diffusion-v1-4",
)  # fmt: skip
STABLE_DIFFUSION_2 = tuple(
    f"{owner}/stable-diffusion-2{version}"
    for owner in ("sd2-community", "stabilityai")
    for version in ("", "-base", "-1", "-1-base")
)
STABLE_DIFFUSION_XL = ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-base-0.9")
PUBLISHED: dict[str, assets.Generation] = {
    **dict.fromkeys(STABLE_DIFFUSION_1, 1),
    **dict.fromkeys(STABLE_DIFFUSION_2, 2),
    **dict.fromkeys(STABLE_DIFFUSION_XL, "XL"),
}


class PlanConfig(Section):
    """Plan: how much memory there is, and how the plan is shown."""

    budget: str | None = setting(
        None, "free", "How much memory there may be, such as 12GB; if not given, that of the GPU which is here, if any."
    )
    processes: int = setting(1, "free", "How many processes the run has, each on a GPU of its own; without FSDP.", ge=1)
    output: str | None = setting(None, "free", "Also draw the plan, into this .svg file.")


@dataclass(frozen=True)
class PlanSettings:
    recipe: Recipe
    budget: int | None  # bytes
    budget_flag: str | None  # that gave it
    num_processes: int
    output: Path | None
    as_json: bool


def read_settings(argv: list[str]) -> PlanSettings:
    """The settings in `argv`. Raises RecipeError."""
    parser = build_parser((PlanConfig, *SECTIONS), PLAN)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, for machines")
    flags = parse_flags(argv, parser)
    as_json = flags.pop("json", False)
    own = {name: flags.pop(name, None) for name in PlanConfig.model_fields}
    settings, places = read_files(flags)
    settings |= flags
    if not settings.get("data_sources") and all(settings.get(name) is None for name in OF_ONE_SOURCE[:2]):
        settings["train_data_dir"] = NO_DATA
    recipe = with_known_configuration(build_recipe(settings, places))
    output = own["output"]
    if output is not None and Path(output).suffix != ".svg":
        raise RecipeError(f"--output {output}: the plan is drawn as SVG: name a file that ends in .svg")
    if own["budget"] is not None and recipe.memory is not None:
        raise RecipeError(f"--budget {own['budget']} and --memory {recipe.memory} both say how much there is: drop one")
    try:
        config = PlanConfig(**{name: value for name, value in own.items() if value is not None})
    except ValidationError as error:
        raise RecipeError("; ".join(explain(problem, {}) for problem in error.errors())) from None
    flag, size = ("--memory", recipe.memory) if config.budget is None else ("--budget", config.budget)
    return PlanSettings(
        recipe,
        _budget(size),
        None if size is None else flag,
        config.processes,
        output and Path(output),
        as_json,
    )


def with_known_configuration(recipe: Recipe) -> Recipe:
    """The recipe with the configuration that comes with the package, where it names a model that has that one."""
    update: dict[str, Any] = {}
    for name in ("pretrained_model_name_or_path", "base", "vae"):
        value = getattr(recipe, name)
        if value in PUBLISHED and not Path(value).exists():
            update[name] = str(assets.CONFIGURATIONS[PUBLISHED[value]])
    return recipe.model_copy(update=update)


def _budget(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return bytes_of(text)
    except ValueError as error:
        raise RecipeError(f"--budget {text or repr(text)}: {error}") from None
