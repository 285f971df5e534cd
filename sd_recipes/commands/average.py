"""`sd-recipes average`: averages of any length, made after training from those that a run has kept.

    sd-recipes average runs/boats --length 0.05,0.10,0.15

The run is put together again, without training: its model and data have to be where they were.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sd_recipes.checkpoints.format import STATE, DamagedCheckpoint, read_json, step_of, verify_checkpoint
from sd_recipes.checkpoints.run_folder import holds_run
from sd_recipes.checkpoints.saver import FAILURES
from sd_recipes.checkpoints.snapshots import list_snapshots
from sd_recipes.commands.average_settings import Averaging
from sd_recipes.commands.of_run import settings_of
from sd_recipes.errors import RecipeError, one_line
from sd_recipes.evaluation.figures import samples
from sd_recipes.evaluation.sample_errors import HELD_OUT
from sd_recipes.export.pipeline import export_trained
from sd_recipes.flags import build_recipe
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import start_accelerator
from sd_recipes.runtime.console import hide_library_bars, say
from sd_recipes.runtime.output_dir import check_is_folder_of, check_output_dir
from sd_recipes.training.build import build_run
from sd_recipes.training.profiles import Combination, Profile, combine, gamma_of
from sd_recipes.training.run import Run
from sd_recipes.training.state import SNAPSHOTS
from sd_recipes.writing import replace_file

logger = logging.getLogger(__name__)

RESULTS = "averages.json"
# Of `Combination.error`; above it, the average differs visibly from the one that training would have kept.
LARGE_ERROR = 0.05


@dataclass(frozen=True)
class Stored:
    """One of the averages that a run has kept."""

    snapshot: Path
    suffix: str  # of the folders with the parts' weights
    profile: Profile


@dataclass(frozen=True)
class Average:
    """One of the averages that are made."""

    length: float
    combination: Combination
    loss: float | None  # held-out


def average(config: Averaging) -> None:
    """Make the averages that `config` asks for, print their table, and write the best as a pipeline.

    Without held-out rows to choose by, all of them are written. Raises RecipeError, and Stopped.
    """
    run_dir = Path(config.run)
    snapshots = find_snapshots(run_dir, config.step)
    output_dir = Path(config.output_dir) if config.output_dir else run_dir / "averaged"
    check_is_folder_of(RESULTS, output_dir)
    recipe = recipe_of(run_dir, config)
    stored = [each for path in snapshots for each in read_snapshot(path)]
    if not stored:  # the loss scaler has skipped all steps so far
        raise RecipeError(f"{snapshots[-1]} is from before the first update: train on, and take a later --step")
    step, updates = step_of(snapshots[-1]), stored[-1].profile.updates
    hide_library_bars()
    accelerator = start_accelerator(recipe)
    if accelerator.num_processes > 1:
        raise RecipeError("`sd-recipes average` runs in one process: start it without torchrun or accelerate launch")
    check_output_dir(output_dir)
    try:
        built = build_run(recipe, accelerator, None)
    except RecipeError as error:
        raise RecipeError(
            f"{error} ({run_dir / 'recipe.yaml'} says so; its relative paths begin where the run was started)"
        ) from error
    averages = []
    for length in config.lengths:
        combination = combine([each.profile for each in stored], Profile(gamma_of(length), updates))
        loss = None
        if recipe.validation_split:
            load_average(built, stored, combination)
            loss = held_out_loss(built)
        averages.append(Average(length, combination, loss))
    with_loss = {each.loss: each for each in averages if each.loss is not None}
    best = with_loss[min(with_loss)] if with_loss else None
    say(table(averages, f"step {step}, from {len(stored)} averages kept at {len(snapshots)} steps"))
    for each in averages:
        if each.combination.error > LARGE_ERROR:
            logger.warning(
                "The averages that %s has kept hardly tell that of length %g (error %.0f %%): a smaller "
                "--checkpointing_steps keeps more.", run_dir, each.length, 100 * each.combination.error,
            )  # fmt: skip
    try:
        # First, since it says whose folder this is.
        replace_file(output_dir / RESULTS, json.dumps(as_json(averages, stored, step, best), indent=1) + "\n")
        for each in [best] if best else averages:
            folder = output_dir if best or len(averages) == 1 else output_dir / f"length-{each.length:g}"
            load_average(built, stored, each.combination)
            export_trained(built.model.family, built.model.components, recipe, folder)
            built.state.export(folder, is_main=True)
            say(f"length {each.length:g}: {folder}")
    except FAILURES as error:
        raise RecipeError(
            f"--output_dir {output_dir} cannot be written ({one_line(error)}): make room, or choose another"
        ) from error
    accelerator.end_training()


def find_snapshots(run_dir: Path, step: int | None) -> list[Path]:
    """The run's snapshots up to `step`, or all, by step. Raises RecipeError if there are none of that step."""
    if not holds_run(run_dir):
        raise RecipeError(f"{run_dir} holds no run: give the --output_dir of one that was trained with --ema_snapshots")
    snapshots = list_snapshots(run_dir)
    if not snapshots:
        raise RecipeError(f"{run_dir} has kept no averages: train with --ema_snapshots, and up to a checkpoint")
    steps = [step_of(path) for path in snapshots]
    if step is not None and step not in steps:
        raise RecipeError(f"--step {step}: {run_dir} has kept no averages then, but at {', '.join(map(str, steps))}")
    return snapshots if step is None else snapshots[: steps.index(step) + 1]


def recipe_of(run_dir: Path, config: Averaging) -> Recipe:
    """The recipe of a run, with what is not trained left out. Raises RecipeError."""
    changes: dict[str, Any] = {"device": config.device}
    if config.mixed_precision is not None:
        changes["mixed_precision"] = config.mixed_precision
    return build_recipe(settings_of(run_dir, changes))


def read_snapshot(path: Path) -> list[Stored]:
    """The averages in a snapshot, once its files are verified. Raises RecipeError."""
    try:
        verify_checkpoint(path)
        updates = max(read_json(path / STATE)["averages"].values())
    except (DamagedCheckpoint, OSError) as error:
        raise RecipeError(
            f"{path} cannot be used ({one_line(error)}): remove it, and the others will do without it"
        ) from error
    profiles = {suffix: Profile(gamma_of(length), updates) for suffix, length in SNAPSHOTS.items()}
    return [Stored(path, suffix, profile) for suffix, profile in profiles.items() if updates]


def load_average(built: Run, stored: list[Stored], combination: Combination) -> None:
    """Give the run's trained parts the sum of the stored averages. Raises RecipeError if they do not fit."""
    for name, part in built.state.parts.items():
        files = [each.snapshot / f"{name}{each.suffix}" / part.weights_file for each in stored]
        try:
            part.module.load_state_dict(part.module.state_dict() | weighted_sum(files, combination))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise RecipeError(
                f"the averages of {stored[-1].snapshot} do not fit the {name} of "
                f"{built.recipe.pretrained_model_name_or_path} ({one_line(error)}): is that still the run's model?"
            ) from error


def weighted_sum(files: list[Path], combination: Combination) -> dict[str, torch.Tensor]:
    """The sum of the tensors of each name, added up in float64, one name at a time."""
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        return {
            name: sum(
                coefficient * file.get_tensor(name).double()
                for coefficient, file in zip(combination.coefficients.tolist(), opened, strict=True)
            ).float()
            for name in opened[-1].keys()  # noqa: SIM118 - it is not a mapping
        }


def held_out_loss(built: Run) -> float | None:
    """Loss on the held-out rows of the weights as they are; the same rows, timesteps and noise as in training."""
    errors = built.validator.errors()
    if errors is None:
        return None
    return float(samples(errors, HELD_OUT, None)[1].mean())


def table(averages: list[Average], title: str) -> str:
    lines = [title, f"  {'length':<8} {'held-out loss':<14} error of the profile"]
    for each in averages:
        loss = "-" if each.loss is None else f"{each.loss:.6f}"
        lines.append(f"  {each.length:<8g} {loss:<14} {each.combination.error:.1e}")
    return "\n".join(lines)


def as_json(averages: list[Average], stored: list[Stored], step: int, best: Average | None) -> Mapping[str, Any]:
    """What averages.json says of what was made, and from what."""
    return {
        "step": step,
        "updates": stored[-1].profile.updates,
        "best_length": best and best.length,
        "averages": [
            {
                "length": each.length,
                "gamma": gamma_of(each.length),
                "validation_loss": each.loss,
                "profile_error": each.combination.error,
                "coefficients": [
                    {"step": step_of(part.snapshot), "length": SNAPSHOTS[part.suffix], "coefficient": coefficient}
                    for part, coefficient in zip(stored, each.combination.coefficients.tolist(), strict=True)
                ],
            }
            for each in averages
        ],
    }
