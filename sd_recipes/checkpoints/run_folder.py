"""Which run is in a folder, whether it is continued, and what of it makes way for a new one."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sd_recipes.checkpoints.best import BEST, list_best
from sd_recipes.checkpoints.format import MANIFEST, Manifest, list_checkpoints, remove, remove_leftovers, step_of
from sd_recipes.checkpoints.of_diffusers import refuse_folder
from sd_recipes.checkpoints.snapshots import AVERAGES, list_snapshots
from sd_recipes.errors import RecipeError
from sd_recipes.flags import is_resolved_recipe
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.agreement import broadcast
from sd_recipes.runtime.output_dir import check_output_dir, lock_output_dir, release
from sd_recipes.runtime.starts import STARTS
from sd_recipes.runtime.trackers import EVALUATION, PROFILE, VALIDATION, list_samples, read_metrics

logger = logging.getLogger(__name__)

ABANDONED = ".abandoned"  # suffix of what belongs to another line of history than the resumed run
# What a folder may hold before its first run: output that a shell wrote there, and what `sd-recipes cache` wrote.
HARMLESS = re.compile(r"\..*|latents|bad_rows.*\.jsonl|lost\+found|.*\.(log|out|err)")
# What one line of history leaves of its steps.
CURVE = ("metrics.jsonl", "incidents.jsonl", "samples", VALIDATION, STARTS)
EVALUATIONS = ("evaluation.*", "errors-*.parquet", "bits-*.parquet", "pictures-*.png")
# What a run writes and a new one would mix with its own files; not the latent cache, nor the exported pipeline, which
# is replaced when the new run is done.
RUN_ARTIFACTS = (
    "metrics.jsonl", "incidents.jsonl", "bad_rows*.jsonl", "samples.png", "loss_curve.png", "before_after.png",
    "report.html", STARTS, f"{PROFILE}/step-*", f"{VALIDATION}/step-*.parquet", f"{VALIDATION}/*rows.parquet",
    f"{BEST}/step-*", f"{AVERAGES}/snapshot-*", f"checkpoint-*{ABANDONED}*", *(f"{name}{ABANDONED}*" for name in CURVE),
    *(f"{EVALUATION}/{name}" for name in EVALUATIONS),
)  # fmt: skip


def holds_run(output_dir: Path) -> bool:
    """Whether a run of this program, finished or not, is in the folder."""
    return is_resolved_recipe(output_dir / "recipe.yaml") or any(
        (path / MANIFEST).is_file() for path in list_checkpoints(output_dir)
    )


@contextmanager
def output_dir_lock(recipe: Recipe, is_main: bool) -> Iterator[str | None]:
    """Own `--output_dir`, by the first process for all, so that no other run can; yields what the run resumes from.

    A run that is there is continued, from `latest` if nothing else is asked for, or removed with `--overwrite`. Raises
    RecipeError if another run owns the folder, or if it holds anything else.
    """
    output_dir = Path(recipe.output_dir)
    lock = None
    answer: list[str | None] = [None, None]
    if is_main:
        try:
            _check_not_foreign(output_dir, recipe)
            check_output_dir(output_dir)
            lock = lock_output_dir(output_dir)
            answer = [_prepare(recipe, output_dir), None]
        except RecipeError as error:
            answer = [None, str(error)]
    try:
        resume, problem = broadcast(answer)
        if problem:
            raise RecipeError(problem)
        yield resume
    finally:
        if lock is not None:
            release(lock, output_dir)


def find_resume_point(recipe: Recipe) -> str | None:
    """What a run by this recipe would resume from, found without changing anything. Raises RecipeError."""
    output_dir = Path(recipe.output_dir)
    _check_not_foreign(output_dir, recipe)
    if recipe.resume_from_checkpoint is None and not recipe.overwrite and holds_run(output_dir):
        return "latest"
    return recipe.resume_from_checkpoint


def _prepare(recipe: Recipe, output_dir: Path) -> str | None:
    """Make the folder ready; returns what the run resumes from."""
    remove_leftovers(output_dir)
    if recipe.overwrite:
        remove_run(output_dir, recipe.logging_dir)
    return find_resume_point(recipe)


def of_other_history(output_dir: Path, source: Path, manifest: Manifest) -> list[Path]:
    """What in a folder did not lead up to `source`, the checkpoint that a run resumes from; newest first.

    If it is the folder's own, the later checkpoints and snapshots; if it is another folder's, all of them, and an
    earlier curve with its incidents and its pictures.
    """
    checkpoints = list_checkpoints(output_dir)
    saved = [*list_best(output_dir), *list_snapshots(output_dir), *checkpoints]
    if any(path.samefile(source) for path in checkpoints):
        if step_of(checkpoints[-1]) == manifest.step:
            saved = list_snapshots(output_dir)  # the best weights that a killed run kept after it are made again
        return [path for path in reversed(saved) if step_of(path) > manifest.step]
    curve = [output_dir / name for name in CURVE]
    has_curve = any(line["step"] <= manifest.step for line in read_metrics(output_dir / "metrics.jsonl"))
    return [*reversed(saved), *(path for path in curve if has_curve and path.exists())]


def begin_history(output_dir: Path, source: Path, manifest: Manifest) -> None:
    """Set aside, under other names, what belongs to another history than that of a run resumed from `source`.

    What is left is one line, whose last checkpoint is the newest. A kill in between leaves the other line shorter, but
    just as whole.
    """
    names = {}
    for path in of_other_history(output_dir, source, manifest):
        aside, number = path.with_name(path.name + ABANDONED), 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"{path.name}{ABANDONED}-{number}")
        os.replace(path, aside)
        names[path.name] = aside.name
    if names:
        logger.warning(
            "The run resumes from %s, and these in %s did not lead up to it: %s. They are set aside under the new "
            "names until you remove them; --resume_from_checkpoint takes such a checkpoint too.",
            source, output_dir, ", ".join(f"{old} -> {new}" for old, new in names.items()),
        )  # fmt: skip


def remove_run(output_dir: Path, logging_dir: str) -> None:
    """Remove the files of an earlier run, except its recipe, which marks the folder as a run's until it has another.

    Removes nothing that a run did not write, and nothing in a log folder elsewhere, which may hold other runs' logs.
    """
    if not holds_run(output_dir):
        return
    logger.info("Removing the run in %s (--overwrite).", output_dir)
    for path in list_checkpoints(output_dir):
        remove(path)
    for pattern in RUN_ARTIFACTS:
        for path in output_dir.glob(pattern):
            remove(path)
    for path in list_samples(output_dir):
        remove(path)
    for name in ("samples", AVERAGES, BEST, VALIDATION, PROFILE):
        with suppress(OSError):  # there are others' files in it, or it is a link
            (output_dir / name).rmdir()
    logs = output_dir / logging_dir
    if logs.resolve().is_relative_to(output_dir.resolve()):
        for path in logs.rglob("*"):
            if path.name.startswith("events.out.tfevents") or path.name == "hparams.yml":
                remove(path)


def _check_not_foreign(output_dir: Path, recipe: Recipe) -> None:
    if not output_dir.is_dir() or holds_run(output_dir):
        return
    refuse_folder(output_dir, recipe.pretrained_model_name_or_path)
    foreign = sorted(path.name for path in output_dir.iterdir() if not HARMLESS.fullmatch(path.name))
    if foreign:
        raise RecipeError(
            f"--output_dir {output_dir} holds no run of this program, but {', '.join(map(repr, foreign[:3]))}"
            f"{' and more' if len(foreign) > 3 else ''}: choose a new or an empty folder"
        )
