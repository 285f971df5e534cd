"""`sd-recipes train` and train_text_to_image.py: build a run, train, export, report and publish."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from sd_recipes.checkpoints.best import BEST, BestWeights, list_best, read_best, remove_best
from sd_recipes.checkpoints.format import (
    DamagedCheckpoint,
    list_checkpoints,
    resume_command,
    resume_hint,
    step_of,
)
from sd_recipes.checkpoints.of_diffusers import is_of_diffusers, load_from_diffusers, taken_over
from sd_recipes.checkpoints.resume import (
    choose_checkpoint,
    compare_identity,
    global_batch_size,
    identity_of,
    load_checkpoint,
)
from sd_recipes.checkpoints.run_folder import begin_history, find_resume_point, of_other_history, output_dir_lock
from sd_recipes.checkpoints.saver import FAILURES, BackgroundSaver, NotSaved
from sd_recipes.checkpoints.snapshots import keep_snapshot, remove_snapshots
from sd_recipes.commands.memory_dial import planned
from sd_recipes.data.training_data import load_training_data
from sd_recipes.errors import RecipeError, RunError, one_line
from sd_recipes.evaluation.class_pictures import draw_class_pictures, without_class_pictures_to_draw
from sd_recipes.evaluation.figures import best_of, held_out_losses
from sd_recipes.export.hub import create_repository, publish, sample_command
from sd_recipes.export.pipeline import export_trained
from sd_recipes.export.report import write_report
from sd_recipes.export.run_page import write_run_page
from sd_recipes.flags import recipe_text, written_settings
from sd_recipes.model.clip import known_tokenizer
from sd_recipes.model.families import check_trainable
from sd_recipes.model.lora_files import LORA_FILE
from sd_recipes.model.samplers import drawing_sampler
from sd_recipes.model.sources import MODEL
from sd_recipes.recipe import Recipe, odd_settings
from sd_recipes.runtime.accelerator import accelerate_left_unused, compiler_explained, start_accelerator
from sd_recipes.runtime.agreement import broadcast, wait_for_all
from sd_recipes.runtime.console import hide_library_bars, say
from sd_recipes.runtime.output_dir import NO_ROOM, check_output_dir
from sd_recipes.runtime.signals import Stopped, stop_request
from sd_recipes.runtime.starts import record_start
from sd_recipes.runtime.trackers import list_samples, read_metrics
from sd_recipes.runtime.trackers import step_of as step_of_sample
from sd_recipes.training.build import build_run
from sd_recipes.training.description import describe
from sd_recipes.training.finite import are_finite, has_finite_weights
from sd_recipes.training.loop import fit, length_flag
from sd_recipes.training.odd_run import odd_run
from sd_recipes.training.run import Checkpoint, Run
from sd_recipes.training.run_length import steps_of_run

logger = logging.getLogger(__name__)


def run(recipe: Recipe) -> None:
    """Train by a recipe, and write a pipeline with its pictures and figures to the output folder.

    Raises RecipeError for what the user can fix, TrainingDiverged, Stopped, NotSaved, and PushError once the model
    is saved.
    """
    hide_library_bars()
    if recipe.pretrained_model_name_or_path is None:
        show_data(recipe)
        return
    recipe, plan = planned(recipe)
    with accelerate_left_unused(), compiler_explained(recipe):
        accelerator = start_accelerator(recipe)
        if recipe.dry_run:
            show(recipe, accelerator)
        else:
            run_in_folder(recipe, accelerator, plan.measurable if plan else None)


def run_in_folder(recipe: Recipe, accelerator: Accelerator, planned_memory: int | None = None) -> None:
    """Own the output folder, and train there."""
    # Until it has saved something, a run that was given a checkpoint resumes from that one again.
    stop_request.resume_command = resume_command(recipe) if recipe.overwrite else "the same command"
    with output_dir_lock(recipe, accelerator.is_main_process) as resume_point:
        recipe, checkpoint = resolve(recipe, accelerator, resume_point)
        check_trainable(recipe)
        draw_class_pictures(recipe, accelerator)
        built = build_run(recipe, accelerator, checkpoint)
        built.planned_memory = planned_memory
        with closing(built.tracker):
            train(built)


def show(recipe: Recipe, accelerator: Accelerator) -> None:
    """A dry run: show what the run would be, and what it would refuse; nothing is written."""
    check_output_dir(Path(recipe.output_dir), writes=False)
    recipe, checkpoint = resolve(recipe, accelerator, find_resume_point(recipe))
    check_trainable(recipe)
    built = build_run(without_class_pictures_to_draw(recipe), accelerator, checkpoint)
    if checkpoint:
        path, manifest = checkpoint
        if not is_of_diffusers(path):
            compare_identity(identity(built), manifest, path)
        if others := of_other_history(built.output_dir, path, manifest):
            names = ", ".join(other.name for other in others)
            logger.warning("These did not lead up to %s and would be set aside: %s.", path, names)
    if accelerator.is_main_process:
        say(f"{describe(built)}\n\n{recipe_text(recipe).rstrip()}")
    for words in odd_run(built):
        logger.warning("%s", words)
    accelerator.end_training()


def show_data(recipe: Recipe) -> None:
    """A dry run without a model: show what the data are, and what of them would be refused; nothing is written."""
    for words in odd_settings(recipe):
        logger.warning("%s", words)
    accelerator = start_accelerator(recipe)
    shown = without_class_pictures_to_draw(recipe)
    size = global_batch_size(recipe, accelerator.num_processes, None)
    data = load_training_data(
        shown, known_tokenizer(), seed=recipe.seed or 0, global_batch_size=size, rank=accelerator.process_index
    )
    if accelerator.is_main_process:
        lines = {
            "global batch": size,
            "optimizer steps": f"{steps_of_run(recipe, data.order, None):,}",
            "model": f"none was named, and none was checked: add {MODEL}",
        }
        say("\n".join(f"  {name:<21}{value}" for name, value in lines.items()) + f"\n\n{recipe_text(recipe).rstrip()}")
    accelerator.end_training()


def resolve(recipe: Recipe, accelerator: Accelerator, resume_point: str | None) -> tuple[Recipe, Checkpoint | None]:
    """The recipe with all that it left open decided, the same on all processes, and the checkpoint to resume from.

    The precision may come from accelerate's configuration. The seed is the given one, the checkpoint's, or one that the
    first process draws for all. Raises RecipeError if there is no such checkpoint, or if its run had other settings
    that do not carry over.
    """
    recipe = recipe.model_copy(
        update={"mixed_precision": accelerator.mixed_precision, "resume_from_checkpoint": resume_point}
    )
    checkpoint = taken_over(recipe, accelerator.num_processes)
    if checkpoint is None:
        checkpoint = choose_checkpoint(recipe, accelerator.is_main_process)
    seed = recipe.seed
    if seed is None and checkpoint is not None:
        seed = checkpoint[1].settings["seed"]
    if seed is None:
        seed = broadcast(int(np.random.SeedSequence().generate_state(1, np.uint32)[0]))
    return recipe.model_copy(update={"seed": seed}), checkpoint


def train(built: Run) -> None:
    """Train to the end, export, report, and publish."""
    recipe, accelerator, state = built.recipe, built.accelerator, built.state
    is_main = accelerator.is_main_process
    if is_main:
        say(describe(built))
    for words in odd_run(built):
        logger.warning("%s", words)
    try:
        with memory_given_back(built):
            restore(built)
            # Only once folder, data, model and checkpoint are in order, and before any step is wasted.
            repo_id = repository(recipe, is_main)
            saver = train_to_end(built)
    except (Stopped, NotSaved):  # on all processes at once
        built.tracker.close()
        accelerator.end_training()
        raise
    try:
        state.export(built.output_dir, is_main=is_main)
        with exported_weights(built) as best_step:
            if is_main:
                report = write_results(built, best_step)
                of_step = "" if best_step is None else f", with the weights of step {best_step}, the best"
                place = built.output_dir / LORA_FILE if recipe.trains_lora else built.output_dir
                say("\n".join(["", f"{recipe.product:<16}{place}{of_step}", *report]))
        if repo_id and is_main:
            predicts = built.model.objective.prediction_type
            address = publish(built.output_dir, repo_id, recipe, built.model.family, predicts, best_step)
            say(f"pushed          {address}")
        built.tracker.close()
    except RunError:  # on the first process, which does this alone; the other processes finish as they would have
        with suppress(RuntimeError):
            wait_for_all()
        raise
    wait_for_all()
    accelerator.end_training()
    if saver.not_saved:
        raise NotSaved(
            f"the {recipe.product} is in {built.output_dir}, but no checkpoint could be written ({saver.not_saved}): "
            f"with a larger {length_flag(recipe)} {resume_command(recipe)} {resume_hint(recipe)}; make room, or choose "
            "another --output_dir"
        )


def restore(built: Run) -> None:
    """Load the checkpoint to resume from, if there is one. Raises RecipeError for weights that cannot be trained."""
    check_loaded(built)
    if built.checkpoint is None:
        return
    path, manifest = built.checkpoint
    if is_of_diffusers(path):
        load_from_diffusers(built.state, path, manifest, built.recipe)
    else:
        compare_identity(identity(built), manifest, path)
        load_checkpoint(built.state, path, manifest, is_main=built.accelerator.is_main_process)
    if not has_finite_weights(built.state, built.accelerator):
        others = [each.name for each in list_checkpoints(path.parent) if each.resolve() != path.resolve()]
        raise RecipeError(
            f"{path} holds weights that are not finite: go back with --resume_from_checkpoint to an older one "
            f"of {others or 'none'}, or start over with --overwrite"
        )


def train_to_end(built: Run) -> BackgroundSaver:
    """Train what was restored to the last step; returns what saved the run."""
    recipe, accelerator, state = built.recipe, built.accelerator, built.state
    known = identity(built)
    wait_for_all()  # a checkpoint fits on all processes
    try:
        if accelerator.is_main_process:
            begin_line(built)
        built.tracker.start_at(state.progress.global_step)
        if accelerator.is_main_process:  # once recipe.yaml marks the folder as a run's
            record_start(built.output_dir, state.progress.global_step, accelerator)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise RecipeError(
            f"--output_dir {built.output_dir} cannot be written ({error}): make room, or choose another"
        ) from error
    saver = BackgroundSaver(
        state,
        accelerator,
        recipe,
        built.output_dir,
        settings=written_settings(recipe),
        identity=known,
        num_steps=built.num_steps,
    )
    best = BestWeights(state, built.output_dir, saver.manifest, is_main=accelerator.is_main_process)
    fit(built, saver, best)
    if built.store is not None:
        built.store.flush()
        wait_for_all()
        built.store.close()
    return saver


def begin_line(built: Run) -> None:
    """Leave in the output folder only what led up to where the run stands, and its averages with it."""
    if built.checkpoint is None:
        remove_snapshots(built.output_dir)
    else:
        begin_history(built.output_dir, *built.checkpoint)
        if built.state.quiet_loss.row_losses:
            built.state.quiet_loss.row_losses.load(built.output_dir)
        keep_snapshot(*built.checkpoint, built.output_dir, built.recipe.ema_snapshots_limit)
    remove_best(built.output_dir, built.state.progress.global_step)


@contextmanager
def memory_given_back(built: Run) -> Iterator[None]:
    """A latent store in memory ends with the run, even if the run is ended early.

    With several processes only for a stop, on which they agree: one that fails must not take it away from the others,
    which are left to the launcher and the next run.
    """
    try:
        yield
    except BaseException as error:
        alone = built.accelerator.num_processes == 1
        if built.store and (alone or isinstance(error, (Stopped, NotSaved))):
            built.store.give_back()
        raise


def identity(built: Run) -> dict[str, Any]:
    """Which run this is, as its checkpoints record it."""
    return identity_of(
        built.recipe,
        built.state,
        built.data.order,
        prediction_type=built.model.objective.prediction_type,
        num_rows=built.data.num_rows,
        global_batch_size=built.data.global_batch_size,
        num_steps=built.num_steps,
        is_main=built.accelerator.is_main_process,
    )


def check_loaded(built: Run) -> None:
    """Raises RecipeError for a model whose weights are not finite in the run's precision."""
    recipe = built.recipe
    for name in ("unet", "vae", *built.model.family.text_models):
        if not are_finite(built.accelerator, getattr(built.model.components, name).parameters()):
            of_flag = name == "vae" and recipe.vae
            place = f"--vae {recipe.vae}" if of_flag else f"{MODEL} {recipe.pretrained_model_name_or_path}"
            raise RecipeError(
                f"{place}: {name} holds weights that are not finite in {recipe.mixed_precision} mixed precision: use "
                "another copy or --variant of the model, or --mixed_precision no"
            )


def repository(recipe: Recipe, is_main: bool) -> str | None:
    """The repository to push to, made by the first process for all. Raises RecipeError on all processes."""
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


@contextmanager
def exported_weights(built: Run) -> Iterator[int | None]:
    """Within this context the first process's components have the weights that the pipeline gets.

    With --export best, those of the best step, which it yields. Every process has to enter it. Raises NotSaved, on all
    of them, if they cannot be read.
    """
    state, components, is_main = built.state, built.model.components, built.accelerator.is_main_process
    best, problem = None, None
    if is_main and built.recipe.export == "best":
        try:
            best = best_weights(built)
        except NotSaved as error:
            problem = str(error)
    step, problem = broadcast((best and best[0], problem))
    if problem:
        raise NotSaved(problem)
    with ExitStack() as applied:
        if step is None:
            applied.enter_context(state.evaluated(components, wanted=is_main))
        elif best is not None:
            applied.enter_context(state.replaced(components, best[1]))
            for name, part in state.parts.items():
                if part.export:
                    part.export(best[1][name], built.output_dir)
        yield step


def best_weights(built: Run) -> tuple[int, dict[str, dict[str, torch.Tensor]]] | None:
    """The step with the lowest held-out loss, and its tensors by part and name; None, and a warning, if not kept.

    Raises NotSaved if they cannot be read.
    """
    best = best_of(held_out_losses(read_metrics(built.output_dir / "metrics.jsonl")))
    kept = list_best(built.output_dir)
    if best is None or not kept or step_of(kept[-1]) != best.step:
        logger.warning(
            "--export best: the weights of the best step%s are not in %s, so that those of the last step are "
            "exported.", f", {best.step}," if best else "", built.output_dir / BEST,
        )  # fmt: skip
        return None
    try:
        return best.step, read_best(kept[-1])
    except (DamagedCheckpoint, *FAILURES) as error:
        raise NotSaved(
            f"--export best: {kept[-1]} cannot be read ({one_line(error)}); with --export end, the same command "
            "exports the last step's weights"
        ) from error


def how_to_draw(built: Run) -> list[str]:
    """Lines about a pipeline that diffusers loads and does not sample from."""
    if built.model.objective.prediction_type != "score":
        return []
    return [
        f"to draw         {sample_command(str(built.output_dir), 'a photo')}",
        "                diffusers by itself refuses to sample from scores: pipeline.scheduler = "
        f"{drawing_sampler.__module__}.{drawing_sampler.__name__}(pipeline.scheduler)",
    ]


def write_results(built: Run, best_step: int | None) -> list[str]:
    """Write the pipeline, pictures and figures; returns lines that sum them up. Raises NotSaved if there is no room.

    `best_step` is that of the weights, if these are not the last step's.
    """
    output_dir, recipe = built.output_dir, built.recipe
    try:
        export_trained(built.model.family, built.model.components, recipe, output_dir)
        samples = list_samples(output_dir)
        if best_step is not None:
            samples = [path for path in samples if step_of_sample(path) <= best_step]
        if samples and recipe.validation_prompts:  # captions of the data are not for the Hub
            shutil.copy(samples[-1], output_dir / "samples.png")
        page = write_run_page(output_dir)
        return [*write_report(output_dir, best_step), f"page            {page}", *how_to_draw(built)]
    except FAILURES as error:
        raise NotSaved(
            f"the {recipe.product} cannot be written to {output_dir} ({one_line(error)}): make room, and "
            f"{resume_command(recipe)} {resume_hint(recipe)}"
        ) from error
