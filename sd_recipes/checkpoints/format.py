"""The state of a run in a folder: safetensors and JSON, nothing that runs code when it is read.

checkpoint-500/
  PART/                  a trained part; unet/ loads as a UNet2DConditionModel
  PART_ema/              its averaged weights, likewise, with --use_ema or a schedule-free optimizer
  optimizer.safetensors  the optimizer's tensors, named PART/PARAMETER/KEY
  state.json             position, schedule, loss scaler and the optimizer's other values
  manifest.json          which run this belongs to, and size and SHA-256 of every other file; written last

A checkpoint is written under another name, synced, and renamed. One that has its final name was whole then, and
`verify_checkpoint` shows whether it still is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file

from sd_recipes.errors import RecipeError, one_line
from sd_recipes.reading import StrangeFile, open_regular, read_text
from sd_recipes.recipe import Recipe

logger = logging.getLogger(__name__)

FORMAT = 3
MANIFEST, STATE = "manifest.json", "state.json"
# What a checkpoint may consist of: data only, at most one folder deep.
FILE = re.compile(r"(\w+/)?\w+\.(json|safetensors)")
MAX_JSON_BYTES = 64 * 2**20  # of a manifest, state or configuration; real ones are far below 1 MiB
# Folders that a kill may leave and the next start removes: half written, and about to be removed.
PARTIAL, REMOVED = ".partial", ".removed"


class DamagedCheckpoint(ValueError):
    """Not a whole checkpoint; the message says what is wrong with it."""


class FileEntry(BaseModel):
    """Size and hash of one file of a checkpoint."""

    model_config = ConfigDict(extra="forbid", strict=True)
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """Which run a checkpoint belongs to, and what it consists of."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: int
    step: int = Field(ge=0, lt=2**63)
    samples_seen: int = Field(ge=0, lt=2**63)
    world_size: int = Field(ge=1)
    versions: dict[str, str]
    settings: dict[str, Any]  # the resolved recipe
    identity: dict[str, Any]  # of data, model and batch, as far as the settings do not show it
    files: dict[str, FileEntry] = {}

    def text(self) -> str:
        """The file's content, which ends with a digest of the rest."""
        content = self.model_dump()
        return json.dumps({**content, "digest": _digest(content)}, indent=1) + "\n"


@dataclass
class Contents:
    """What a checkpoint is written from: tensors and texts by file, and the manifest without their hashes."""

    manifest: Manifest
    texts: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes on disk, with some room for the headers."""
        tensors = sum(tensor.nbytes for part in self.tensors.values() for tensor in part.values())
        return tensors + sum(map(len, self.texts.values())) + 2**20


# ---------------------------------------------------------------------------------------------- write


def write_checkpoint(contents: Contents, output_dir: Path, limit: int | None) -> Path:
    """Write checkpoint-N, then keep the newest `limit`. A kill at any instant leaves the old ones or it, whole.

    Raises OSError, or SafetensorError from the tensors' files, if it cannot be written; whatever was written is then
    removed.
    """
    final = output_dir / f"checkpoint-{contents.manifest.step}"
    write_folder(contents, final)
    _prune(final, limit)
    remove_leftovers(output_dir)
    return final


def write_folder(contents: Contents, final: Path) -> None:
    """Write a folder whole or not at all, in the place of one of that name. Raises as `write_checkpoint`."""
    parent = final.parent
    temporary = parent / f".{final.name}{PARTIAL}"
    remove_leftovers(parent)
    free = shutil.disk_usage(parent).free
    if free < contents.nbytes:
        raise OSError(f"it needs {_gigabytes(contents.nbytes)} and {parent} has {_gigabytes(free)} free")
    try:
        _write_files(contents, temporary)
        if final.exists():  # put there after the run began, which set aside any later than its own
            os.replace(final, parent / f".{final.name}{REMOVED}")
        os.replace(temporary, final)
        sync_folder(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        verify_checkpoint(final)
    except (DamagedCheckpoint, OSError) as error:
        remove(final)
        raise OSError(f"what was written is not what is read back: {error}") from error


def _write_files(contents: Contents, folder: Path) -> None:
    folder.mkdir()
    for name, text in contents.texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for name, tensors in contents.tensors.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})
    names = [*contents.texts, *contents.tensors]
    for name in names:
        sync(folder / name)
    contents.manifest.files = {name: _entry(folder / name) for name in names}
    (folder / MANIFEST).write_text(contents.manifest.text(), encoding="utf-8")
    sync(folder / MANIFEST)
    for part in {(folder / name).parent for name in names}:
        sync_folder(part)


def _prune(newest: Path, limit: int | None) -> None:
    """Remove the oldest beyond `limit`; they are renamed first, so that none looks like a checkpoint half removed."""
    if limit is None:
        return
    others = [path for path in list_checkpoints(newest.parent) if path != newest]
    for path in others[: max(0, len(others) + 1 - limit)]:
        logger.info("Removing %s (--checkpoints_total_limit %d)", path, limit)
        os.replace(path, path.parent / f".{path.name}{REMOVED}")


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill left half written or half removed, of checkpoints, snapshots or the best weights."""
    for path in [path for name in ("checkpoint", "snapshot", "step") for path in folder.glob(f".{name}-*")]:
        if path.suffix in (PARTIAL, REMOVED):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or folder; if it is a link, only the link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(path: Path) -> FileEntry:
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(size=file.tell(), sha256=digest)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB"


# ----------------------------------------------------------------------------------------------- read


def read_json(path: Path) -> Any:
    """The content of a JSON file of a checkpoint. Raises DamagedCheckpoint, and OSError if it cannot be read."""
    try:
        return json.loads(read_text(path, MAX_JSON_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpoint(f"it has no {path.name}") from None
    except StrangeFile as error:
        raise DamagedCheckpoint(f"{path.name} {error}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path.name} cannot be read: {one_line(error, 200)}") from None


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`, checked against its digest. Raises DamagedCheckpoint and OSError."""
    content = read_json(path / MANIFEST)
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{MANIFEST} holds no manifest")
    if content.get("format") != FORMAT:
        raise DamagedCheckpoint(
            f"it has format {str(content.get('format'))[:20]} and this version reads {FORMAT}: only the version that "
            "wrote it can resume from it"
        )
    digest = content.pop("digest", None)
    if digest != _digest(content):
        raise DamagedCheckpoint(f"{MANIFEST} is not as it was written")
    try:
        return Manifest(**content)
    except ValidationError as error:
        raise DamagedCheckpoint(f"{MANIFEST}: {one_line(error, 200)}") from None


def verify_checkpoint(path: Path) -> Manifest:
    """Compare all files of a checkpoint with its manifest, which is returned. Raises DamagedCheckpoint and OSError.

    It has to hold the files of a checkpoint and no others, as regular files inside it: no link or path in the
    manifest may lead outside.
    """
    manifest = read_manifest(path)
    for name in sorted(manifest.files):
        if not FILE.fullmatch(name):
            raise DamagedCheckpoint(f"{MANIFEST} names {name!r}, which is not a file of a checkpoint")
    if STATE not in manifest.files:
        raise DamagedCheckpoint(f"{MANIFEST} does not name {STATE}")
    for folder, folders, files in os.walk(path):
        for name in [*folders, *files]:
            found = Path(folder, name)
            inside = PurePosixPath(found.relative_to(path)).as_posix()
            if found.is_symlink():
                raise DamagedCheckpoint(f"{inside} is a link")
            # Hidden ones belong to file systems and desktops.
            if name in files and inside != MANIFEST and inside not in manifest.files and name[0] != ".":
                raise DamagedCheckpoint(f"it holds {inside!r}, which {MANIFEST} does not name")
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="verify") as pool:
        for problem in pool.map(lambda item: _compare(path / item[0], item[1]), manifest.files.items()):
            if problem:
                raise DamagedCheckpoint(problem)
    return manifest


def _compare(path: Path, entry: FileEntry) -> str | None:
    """What is wrong with a file, or None."""
    try:
        size = path.lstat().st_size
        if path.is_file() and size != entry.size:
            return f"{path.parent.name}/{path.name} has {size} bytes and had {entry.size}"
        if _entry(path).sha256 != entry.sha256:
            return f"{path.parent.name}/{path.name} is not as it was written"
    except (FileNotFoundError, NotADirectoryError):
        return f"it has no {path.parent.name}/{path.name}"
    except StrangeFile as error:
        return f"{path.parent.name}/{path.name} {error}"
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders named like checkpoints, by step, oldest first; file times do not matter."""
    return folders_by_step(output_dir, "checkpoint")


def folders_by_step(parent: Path, name: str) -> list[Path]:
    """The folders NAME-STEP in another, by step."""
    found = {
        int(match[1]): path
        for path in parent.glob(f"{name}-*")
        if (match := re.fullmatch(rf"{name}-(\d{{1,18}})", path.name)) and path.is_dir()
    }
    return [found[step] for step in sorted(found)]


def step_of(path: Path) -> int:
    """The step of a checkpoint or snapshot, by its name."""
    return int(path.name.partition("-")[2])


def resume_command(recipe: Recipe) -> str:
    """The command that resumes a run from what it has saved; the one that started it may do something else."""
    if recipe.overwrite:
        return "the same command without --overwrite"
    if recipe.resume_from_checkpoint not in (None, "latest") and list_checkpoints(Path(recipe.output_dir)):
        return "the same command with --resume_from_checkpoint latest"
    return "the same command"


def resume_hint(recipe: Recipe) -> str:
    """What that command does, given the checkpoints that are there once a run has begun."""
    if checkpoints := list_checkpoints(Path(recipe.output_dir)):
        return f"resumes from {checkpoints[-1].name}"
    if recipe.resume_from_checkpoint not in (None, "latest"):  # another folder's
        return f"resumes from {recipe.resume_from_checkpoint}"
    return "starts over, for there is no checkpoint"


def find_checkpoint(output_dir: Path, wanted: str) -> tuple[Path, Manifest] | None:
    """For `latest`, the newest checkpoint that verifies, or None; otherwise the one of that name there or at that path.

    Says which were skipped and why. Raises RecipeError if there are some and none verifies, and if the one that was
    named does not, listing those that do.
    """
    checkpoints = list_checkpoints(output_dir)
    if wanted == "latest":
        problems: list[str] = []
        for path in reversed(checkpoints):
            try:
                return path, verify_checkpoint(path)
            except DamagedCheckpoint as error:
                logger.warning("Skipped %s: %s.", path, error)
                problems.append(f"{path.name}: {error}")
            except OSError as error:  # it may well be whole: an older one must not silently take its place
                raise RecipeError(_unreadable(path, error)) from error
        if checkpoints:
            raise RecipeError(
                f"--resume_from_checkpoint latest: none of {[path.name for path in checkpoints]} in {output_dir} is "
                f"whole and of format {FORMAT} ({problems[0]}): start over with --overwrite, or choose another "
                "--output_dir"
            )
        return None
    problem = "no checkpoint there"
    places = [output_dir / wanted, Path(wanted)]
    for path in places if Path(wanted).name == wanted else reversed(places):  # a mere name means one of this folder
        if path.is_dir():
            try:
                return path, verify_checkpoint(path)
            except DamagedCheckpoint as error:
                problem = str(error)
                break
            except OSError as error:
                raise RecipeError(_unreadable(path, error)) from error
    raise RecipeError(
        f"--resume_from_checkpoint {wanted}: {problem}; {output_dir} has "
        f"{[path.name for path in checkpoints if _is_whole(path)] or 'none'}"
    )


def _unreadable(path: Path, error: OSError) -> str:
    return (
        f"{path} cannot be read ({one_line(error, 200)}), and may still be whole: check the disk and the permissions "
        "there, and repeat the command; or name another one with --resume_from_checkpoint"
    )


def _is_whole(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except (DamagedCheckpoint, OSError):
        return False
    return True
