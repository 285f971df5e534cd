"""A run's folder: whose it is, one owner at a time, and what of an old run makes way for a new one."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sd_recipes.checkpoints.format import MANIFEST, Manifest, list_checkpoints, remove, remove_leftovers, step_of
from sd_recipes.errors import RecipeError
from sd_recipes.flags import is_resolved_recipe
from sd_recipes.reading import read_text
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.agreement import broadcast
from sd_recipes.runtime.trackers import list_samples, read_metrics, replace_file
from sd_recipes.training.build import check_output_dir

logger = logging.getLogger(__name__)

LOCK, OWNER = ".lock", ".owner.json"
MAX_OWNER_BYTES = 2**16
ABANDONED = ".abandoned"  # ends the names of what is of another line of history than the run that goes on
DYING_SECONDS = 10.0  # for which the children of a killed run may outlive it
# What may stand in a folder before its first run: the output that a shell wrote there, and what `sd-recipes cache` did.
HARMLESS = re.compile(r"\..*|latents|bad_rows.*\.jsonl|lost\+found|.*\.(log|out|err)")
# What a run writes and a new one would mix with its own; not the latent cache, nor the exported pipeline, which is
# replaced when the new one is done.
RUN_ARTIFACTS = (
    "metrics.jsonl", "bad_rows*.jsonl", "samples.png", "loss_curve.png", "before_after.png",
    f"checkpoint-*{ABANDONED}*", f"metrics.jsonl{ABANDONED}*", f"samples{ABANDONED}*",
)  # fmt: skip


def holds_run(output_dir: Path) -> bool:
    """Whether a run of this program, finished or not, is in the folder."""
    return is_resolved_recipe(output_dir / "recipe.yaml") or any(
        (path / MANIFEST).is_file() for path in list_checkpoints(output_dir)
    )


@contextmanager
def output_dir_lock(recipe: Recipe, is_main: bool) -> Iterator[None]:
    """Own `--output_dir`, on the first process for all; within it no other run can.

    A run that is there is continued (`recipe.resume_from_checkpoint` becomes `latest`), or removed with
    `--overwrite`. Raises RecipeError if another run owns the folder, or if it holds anything else.
    """
    output_dir = Path(recipe.output_dir)
    lock = None
    answer: list[str | None] = [None, None]
    if is_main:
        try:
            _check_not_foreign(output_dir)
            check_output_dir(output_dir)
            lock = _lock(output_dir)
            answer = [_prepare(recipe, output_dir), None]
        except RecipeError as error:
            answer = [None, str(error)]
    try:
        resume, problem = broadcast(answer)
        if problem:
            raise RecipeError(problem)
        recipe.resume_from_checkpoint = resume
        yield
    finally:
        if lock is not None:
            with suppress(OSError):  # the folder has become read-only: the lock goes with the process
                (output_dir / OWNER).unlink(missing_ok=True)
            lock.release()


def find_resume_point(recipe: Recipe) -> str | None:
    """From what a run by this recipe would resume, found without changing anything. Raises RecipeError."""
    output_dir = Path(recipe.output_dir)
    _check_not_foreign(output_dir)
    if recipe.resume_from_checkpoint is None and not recipe.overwrite and holds_run(output_dir):
        return "latest"
    return recipe.resume_from_checkpoint


def _prepare(recipe: Recipe, output_dir: Path) -> str | None:
    """Make the folder ready; from what the run resumes."""
    remove_leftovers(output_dir)
    if recipe.overwrite:
        remove_run(output_dir, recipe.logging_dir)
    return find_resume_point(recipe)


def of_other_history(output_dir: Path, source: Path, manifest: Manifest) -> list[Path]:
    """What in a folder did not lead up to `source`, the checkpoint that a run goes on from; the newest first.

    Of the folder's own checkpoints those are the later ones; if it is another folder's, all, and an earlier curve
    and pictures with them.
    """
    checkpoints = list_checkpoints(output_dir)
    if any(path.samefile(source) for path in checkpoints):
        return [path for path in reversed(checkpoints) if step_of(path) > manifest.step]
    metrics, samples = output_dir / "metrics.jsonl", output_dir / "samples"
    has_curve = any(line["step"] <= manifest.step for line in read_metrics(metrics))
    return [*reversed(checkpoints), *(path for path in (metrics, samples) if has_curve and path.exists())]


def begin_history(output_dir: Path, source: Path, manifest: Manifest) -> None:
    """Set aside, under other names, what is of another history than a run's that goes on from `source`.

    What is left is one line, of which the newest checkpoint is the last. A kill in between leaves the other line
    shorter, and as whole.
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
            "The run goes on from %s, to which these in %s did not lead: %s. They are set aside under the new names "
            "until you remove them; --resume_from_checkpoint takes such a name too.",
            source, output_dir, ", ".join(f"{old} -> {new}" for old, new in names.items()),
        )  # fmt: skip


def remove_run(output_dir: Path, logging_dir: str) -> None:
    """Remove the files of an earlier run, but for its recipe, by which the folder is known until it has another.

    Nothing that a run did not write: of a folder for logs that lies elsewhere, other runs' may be in it.
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
    with suppress(OSError):  # there are others' files in it, or it is a link
        (output_dir / "samples").rmdir()
    logs = output_dir / logging_dir
    if logs.resolve().is_relative_to(output_dir.resolve()):
        for path in logs.rglob("*"):
            if path.name.startswith("events.out.tfevents") or path.name == "hparams.yml":
                remove(path)


def _check_not_foreign(output_dir: Path) -> None:
    if not output_dir.is_dir() or holds_run(output_dir):
        return
    foreign = sorted(path.name for path in output_dir.iterdir() if not HARMLESS.fullmatch(path.name))
    if foreign:
        raise RecipeError(
            f"--output_dir {output_dir} holds no run of this program, but {', '.join(map(repr, foreign[:3]))}"
            f"{' and more' if len(foreign) > 3 else ''}: choose a new or an empty folder"
        )


def _lock(output_dir: Path) -> FileLock | None:
    """The folder's lock, held; None, with a warning, where the file system has no locks."""
    lock = FileLock(output_dir / LOCK, timeout=0, fallback_to_soft=False)
    given_up = time.monotonic() + DYING_SECONDS
    while True:
        try:
            lock.acquire()
            break
        except Timeout:
            owner = _owner(output_dir)
            if not _is_dead(owner) or time.monotonic() > given_up:
                raise RecipeError(_in_use(output_dir, owner)) from None
            time.sleep(0.1)
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): make sure yourself that no other run writes to it.", output_dir, error
            )
            return None
    content = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):  # it is only what another run is told
        replace_file(output_dir / OWNER, json.dumps(content) + "\n")
    return lock


def _owner(output_dir: Path) -> dict[str, Any]:
    try:
        owner = json.loads(read_text(output_dir / OWNER, MAX_OWNER_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is no more: then the lock goes with its last child."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    if not 0 < owner["pid"] < 2**31:
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _in_use(output_dir: Path, owner: dict[str, Any]) -> str:
    if not owner:
        return f"--output_dir {output_dir} is in use by another run: wait for it, or choose another folder"
    pid, host, since = (" ".join(str(owner.get(name)).split())[:80] for name in ("pid", "host", "since"))
    return (
        f"--output_dir {output_dir} is in use by process {pid} on {host} since {since}: wait for it, stop it, or "
        "choose another folder"
    )
