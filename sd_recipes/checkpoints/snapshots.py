"""The averages that a run keeps for `sd-recipes average`, of checkpoints that may be gone by then.

averages/snapshot-500/
  PART_ema05/, PART_ema10/  two averages of a trained part, as in checkpoint-500
  state.json                as in checkpoint-500; it says how many updates are behind the averages
  manifest.json             that of checkpoint-500, without its other files

The files are hard links to those of the checkpoint, so they take neither time nor room while that is there; copies,
where the file system has no links. A snapshot comes after its checkpoint: a run that is killed in between resumes from
the checkpoint, and makes up for it. It is verified like a checkpoint.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path, PurePosixPath

from sd_recipes.checkpoints.format import (
    MANIFEST,
    PARTIAL,
    REMOVED,
    STATE,
    Manifest,
    folders_by_step,
    remove,
    remove_leftovers,
    step_of,
    sync,
    sync_folder,
)
from sd_recipes.training.state import SNAPSHOTS

logger = logging.getLogger(__name__)

AVERAGES = "averages"


def list_snapshots(output_dir: Path) -> list[Path]:
    """The snapshots in a run's folder, by step, oldest first."""
    return folders_by_step(output_dir / AVERAGES, "snapshot")


def keep_snapshot(checkpoint: Path, manifest: Manifest, output_dir: Path, limit: int | None) -> None:
    """Keep the averages of a whole checkpoint, if it has any for this, then `limit` snapshots at most.

    A kill at any instant leaves the others, and it whole or not at all. Raises OSError if it cannot be written; what
    was written is then removed.
    """
    names = [name for name in manifest.files if PurePosixPath(name).parent.name.endswith(tuple(SNAPSHOTS))]
    if not names:
        return
    manifest = manifest.model_copy(update={"files": {name: manifest.files[name] for name in [STATE, *names]}})
    folder = output_dir / AVERAGES
    remove_leftovers(folder)
    final = folder / f"snapshot-{manifest.step}"
    temporary = folder / f".{final.name}{PARTIAL}"
    folder.mkdir(exist_ok=True)
    try:
        for name in manifest.files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            _link(checkpoint / name, temporary / name)
        (temporary / MANIFEST).write_text(manifest.text(), encoding="utf-8")
        sync(temporary / MANIFEST)
        for place in {(temporary / name).parent for name in manifest.files}:
            sync_folder(place)
        if final.exists():  # of the same step, when the run resumes from it
            os.replace(final, folder / f".{final.name}{REMOVED}")
        os.replace(temporary, final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _prune(output_dir, limit)
    remove_leftovers(folder)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # no links on this file system, or another one than the checkpoint's
        shutil.copyfile(source, target)
        sync(target)


def _prune(output_dir: Path, limit: int | None) -> None:
    """Remove those that tell the least: whose neighbours are nearest to each other. The newest always stays.

    So the rest is evenly spaced, which suits averages of the newest step best.
    """
    snapshots = list_snapshots(output_dir)
    while limit is not None and len(snapshots) > limit:
        steps = [0, *map(step_of, snapshots)]
        gaps = [later - earlier for earlier, later in zip(steps, steps[2:], strict=False)]
        least = snapshots.pop(gaps.index(min(gaps)))
        logger.info("Removing %s (--ema_snapshots_limit %d)", least, limit)
        os.replace(least, least.with_name(f".{least.name}{REMOVED}"))


def remove_snapshots(output_dir: Path) -> None:
    """Remove those of an earlier run, when one begins anew."""
    for path in list_snapshots(output_dir):
        logger.info("Removing %s, of an earlier run without checkpoints.", path)
        remove(path)
