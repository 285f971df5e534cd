"""A run's recipe, for commands that look at what it has learned without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_recipes.errors import RecipeError
from sd_recipes.flags import is_resolved_recipe, read_recipe_file
from sd_recipes.recipe import DIFFUSERS_LENGTH

# What is left out of a run that is not trained, only evaluated.
NOT_TRAINED: dict[str, Any] = {
    "dry_run": True, "use_ema": False, "offload_ema": False, "ema_length": DIFFUSERS_LENGTH, "ema_snapshots": False,
    "ema_snapshots_limit": None, "compile_unet": False, "weights_dtype": "float32", "fused_backward_pass": False,
    "cache_latents": "off", "check_data": "off", "report_to": "none", "validation_prompts": None,
    "validation_clip_model": None, "validation_pictures": 0, "early_stopping": None, "export": "end",
}  # fmt: skip


def settings_of(run_dir: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run in a folder, with changes and what is not trained left out. Raises RecipeError."""
    path = run_dir / "recipe.yaml"
    if not is_resolved_recipe(path):
        raise RecipeError(f"{path} is not as the run wrote it: start the run once more, which writes it")
    return {**read_recipe_file(str(path)), **NOT_TRAINED, "output_dir": str(run_dir), **changes}
