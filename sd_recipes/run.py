"""A whole run: build, train, export, report, publish."""

from __future__ import annotations

import shutil
from pathlib import Path

from sd_recipes.build import build_training, describe, start_accelerator
from sd_recipes.console import hide_library_bars
from sd_recipes.hub import create_repository, publish
from sd_recipes.loop import fit
from sd_recipes.pipeline import export_pipeline
from sd_recipes.recipe import Recipe, recipe_text
from sd_recipes.report import write_report
from sd_recipes.signals import Stopped


def run(recipe: Recipe) -> None:
    """Train by a recipe, and leave a pipeline with its pictures and figures in the output folder.

    Raises RecipeError for what a person can mend, TrainingDiverged, Stopped, and PushError once the model is saved.
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
            print(f"\n{recipe_text(recipe)}", end="")
        accelerator.end_training()
        return

    try:
        fit(training)
    except Stopped:
        accelerator.end_training()  # trackers write what they hold
        raise
    if accelerator.is_main_process:
        with training.evaluated_weights():
            export_pipeline(training.components, output_dir)
        samples = sorted((output_dir / "samples").glob("step-*.png"))
        if samples:
            shutil.copy(samples[-1], output_dir / "samples.png")
        print("\n".join(["", f"pipeline        {output_dir}", *write_report(output_dir)]), flush=True)
        if repo_id:
            print(f"pushed          {publish(output_dir, repo_id, recipe)}", flush=True)
    accelerator.end_training()
