"""A whole run: build, train, export, report, publish."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from sd_recipes.build import build_training, describe, start_accelerator
from sd_recipes.console import hide_library_bars
from sd_recipes.hub import PushError, create_repository, publish
from sd_recipes.loop import TrainingDiverged, fit
from sd_recipes.pipeline import export_pipeline
from sd_recipes.recipe import Recipe
from sd_recipes.report import write_report


def run(recipe: Recipe) -> None:
    """Train by a recipe, and leave a pipeline with its pictures and figures in the output folder.

    Raises RecipeError for what a person can mend. Leaves with status 3 if the loss diverged, and with
    4 if the model was saved but could not be pushed.
    """
    hide_library_bars()
    accelerator = start_accelerator(recipe)
    pushes = recipe.push_to_hub and accelerator.is_main_process and not recipe.dry_run
    repo_id = create_repository(recipe) if pushes else None
    training = build_training(recipe, accelerator)
    output_dir = Path(recipe.output_dir)
    if accelerator.is_main_process:
        print(describe(training), flush=True)
    if recipe.dry_run:
        if accelerator.is_main_process:
            print((output_dir / "recipe.yaml").read_text())
        accelerator.end_training()
        return
    try:
        fit(training)
    except TrainingDiverged as error:
        sys.exit(_say(accelerator.is_main_process, f"error: {error}", status=3))

    if accelerator.is_main_process:
        with training.evaluated_weights():
            export_pipeline(training.components, output_dir)
        samples = sorted((output_dir / "samples").glob("step-*.png"))
        if samples:
            shutil.copy(samples[-1], output_dir / "samples.png")
        print("\n".join(["", f"pipeline        {output_dir}", *write_report(output_dir)]), flush=True)
        if repo_id:
            try:
                print(f"pushed          {publish(output_dir, repo_id, recipe)}")
            except PushError as error:
                sys.exit(_say(True, f"error: {error}", status=4))
    accelerator.end_training()


def _say(aloud: bool, words: str, *, status: int) -> int:
    if aloud:
        print(words, file=sys.stderr)
    return status
