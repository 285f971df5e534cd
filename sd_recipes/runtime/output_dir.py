"""The output folder: whether it can be written to, and the lock by which one run at a time owns it."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sd_recipes.errors import RecipeError, one_line
from sd_recipes.reading import read_text
from sd_recipes.writing import replace_file

logger = logging.getLogger(__name__)

LOCK, OWNER = ".lock", ".owner.json"
MAX_OWNER_BYTES = 2**16
# Errors of a disk that is full, over quota, read-only or forbidden.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM}
DYING_SECONDS = 10.0  # how long the children of a killed run may outlive it


def check_output_dir(output_dir: Path, *, writes: bool = True) -> None:
    """Make the folder and write to it once; without `writes`, only check that this is allowed. Raises RecipeError."""
    try:
        if writes:
            output_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output_dir, prefix=".") as file:  # hidden, if a kill should leave it
                file.write(b"0")
        else:
            path = output_dir.absolute()
            there = next(place for place in (path, *path.parents) if os.path.lexists(place))
            if not there.is_dir():
                raise OSError(errno.ENOTDIR, f"{there} is not a folder")
            if not os.access(there, os.W_OK | os.X_OK):
                raise OSError(errno.EACCES, f"no permission to write to {there}, or a read-only file system")
    except OSError as error:
        raise RecipeError(f"--output_dir {output_dir} cannot be written: {error.strerror}; choose another") from None


def check_is_folder(output_dir: Path) -> None:
    """Raises RecipeError if something else is in its place."""
    if output_dir.exists() and not output_dir.is_dir():
        raise RecipeError(f"--output_dir {output_dir} is not a folder: choose another")


def check_is_folder_of(results: str, output_dir: Path) -> None:
    """Raises RecipeError if the folder holds anything but what a command wrote that leaves a file of that name."""
    check_is_folder(output_dir)
    if output_dir.is_dir() and any(output_dir.iterdir()) and not (output_dir / results).is_file():
        raise RecipeError(f"--output_dir {output_dir} holds something else: choose a new or an empty folder")


def lock_output_dir(output_dir: Path) -> FileLock | None:
    """Take the folder's lock; None, with a warning, if the file system has no locks. Raises RecipeError."""
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
    with suppress(OSError):  # it only informs other runs
        replace_file(output_dir / OWNER, json.dumps(content) + "\n")
    return lock


def release(lock: FileLock, output_dir: Path) -> None:
    with suppress(OSError):  # the folder has become read-only: the lock ends with the process
        (output_dir / OWNER).unlink(missing_ok=True)
    lock.release()


def _owner(output_dir: Path) -> dict[str, Any]:
    try:
        owner = json.loads(read_text(output_dir / OWNER, MAX_OWNER_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that has ended: then the lock ends with its last child."""
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
    pid, host, since = (one_line(owner.get(name), 80) for name in ("pid", "host", "since"))
    return (
        f"--output_dir {output_dir} is in use by process {pid} on {host} since {since}: wait for it, stop it, or "
        "choose another folder"
    )
