"""A whole run: build, train, export, report, publish."""

from __future__ import annotations

import logging
import shutil
from contextlib import closing, suppress
from pathlib import Path

from sd_recipes.checkpoints.format import resume_command, resume_hint
from sd_recipes.checkpoints.resume import compare_identity, identity_of
from sd_recipes.checkpoints.run_folder import find_resume_point, of_other_history, output_dir_lock
from sd_recipes.checkpoints.saver import FAILURES, NotSaved
from sd_recipes.errors import RecipeError, RunError
from sd_recipes.export.hub import create_repository, publish
from sd_recipes.export.pipeline import export_pipeline
from sd_recipes.export.report import write_report
from sd_recipes.flags import recipe_text
from sd_recipes.model.components import Components
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import start_accelerator
from sd_recipes.runtime.agreement import broadcast, wait_for_all
from sd_recipes.runtime.console import hide_library_bars, say
from sd_recipes.runtime.signals import Stopped, stop_request
from sd_recipes.runtime.trackers import list_samples
from sd_recipes.training.build import Training, build_training, describe
from sd_recipes.training.loop import fit, length_of

logger = logging.getLogger(__name__)


def run(recipe: Recipe) -> None:
    """Train by a recipe, and leave a pipeline with its pictures and figures in the output folder.

    Raises RecipeError for what a person can mend, TrainingDiverged, Stopped, NotSaved, and PushError once the model
    is saved.
    """
    hide_library_bars()
    accelerator = start_accelerator(recipe)
    if recipe.dry_run:
        recipe.resume_from_checkpoint = find_resume_point(recipe)
        training = build_training(recipe, accelerator)
        if training.checkpoint:
            path, manifest = training.checkpoint
            compare_identity(identity_of(training), manifest, path)
            if others := of_other_history(Path(recipe.output_dir), path, manifest):
                names = ", ".join(other.name for other in others)
                logger.warning("Set aside would be what did not lead up to %s: %s.", path, names)
        if accelerator.is_main_process:
            say(f"{describe(training)}\n\n{recipe_text(recipe).rstrip()}")
        accelerator.end_training()
        return
    # Until it has saved something, a run from a checkpoint that was named goes on from there again.
    stop_request.resume_command = resume_command(recipe) if recipe.overwrite else "the same command"
    with output_dir_lock(recipe, accelerator.is_main_process):
        training = build_training(recipe, accelerator)
        with closing(training.tracker):
            _run(training)


def write_results(components: Components, recipe: Recipe) -> list[str]:
    """The pipeline with its pictures and figures; lines that sum these up. Raises NotSaved if there is no room."""
    output_dir = Path(recipe.output_dir)
    try:
        export_pipeline(components, output_dir)
        samples = list_samples(output_dir)
        if samples:
            shutil.copy(samples[-1], output_dir / "samples.png")
        return write_report(output_dir)
    except FAILURES as error:
        words = " ".join(str(error).split())
        raise NotSaved(
            f"the pipeline cannot be written to {output_dir} ({words}): make room, and {resume_command(recipe)} "
            f"{resume_hint(recipe)}"
        ) from error


def _repository(recipe: Recipe, is_main: bool) -> str | None:
    """The repository to push to, made by the first process for all. Raises RecipeError, on all."""
    answer: list[str | None] = [None, None]
    if is_main and recipe.push_to_hub:
        try:
            answer = [create_repository(recipe), None]
        except RecipeError as error:
            answer = [None, str(error)]
    repo_id, problem = broadcast(answer)
    if problem:
        raise RecipeError(problem)
    return repo_id


def _run(training: Training) -> None:
    recipe, accelerator = training.recipe, training.accelerator
    output_dir = Path(recipe.output_dir)
    if accelerator.is_main_process:
        say(describe(training))
    # Only now that folder, data and model are in order, and before a step is made in vain.
    repo_id = _repository(recipe, accelerator.is_main_process)

    try:
        progress = fit(training)
    except (Stopped, NotSaved):  # on all processes at once
        training.tracker.close()
        accelerator.end_training()
        raise
    try:
        with training.evaluated_weights():
            if accelerator.is_main_process:
                report = write_results(training.components, recipe)
                say("\n".join(["", f"pipeline        {output_dir}", *report]))
        if repo_id and accelerator.is_main_process:
            say(f"pushed          {publish(output_dir, repo_id, recipe)}")
        training.tracker.close()
    except RunError:  # of the first process, which does this alone: the others end as they would have
        with suppress(RuntimeError):
            wait_for_all()
        raise
    wait_for_all()
    accelerator.end_training()
    if progress.not_saved:
        raise NotSaved(
            f"the pipeline is in {output_dir}, but no checkpoint could be written ({progress.not_saved}): with a "
            f"larger {length_of(recipe)} {resume_command(recipe)} {resume_hint(recipe)}; make room, or choose another "
            "--output_dir"
        )
