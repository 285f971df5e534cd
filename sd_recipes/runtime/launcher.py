"""Who decided what no flag says: accelerate's configuration, its launcher, or the environment. Messages name it."""

from __future__ import annotations

import os
from pathlib import Path

MIXED_PRECISION, DYNAMO = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"
LAUNCHERS = ("accelerate", "accelerate-launch")


def configuration() -> str:
    """accelerate's configuration in words, with its file where that is known."""
    arguments = launcher_arguments()
    file = None if arguments is None else _value(arguments, "--config_file") or default_configuration()
    return f"accelerate's configuration ({file})" if file else "accelerate's configuration"


def precision_in_words(given: str | None, used: str) -> str:
    """Where the mixed precision that a run uses comes from; `given` is the flag's, if there was one."""
    if given is not None:
        return f"--mixed_precision {used}"
    arguments = launcher_arguments()
    if arguments is None:  # by hand, or by accelerate's notebook_launcher
        return f"{MIXED_PRECISION}={used} in the environment"
    if _value(arguments, "--mixed_precision"):
        return f"`accelerate launch --mixed_precision {used}`"
    return f"mixed_precision: {used} of {configuration()}"


def launcher_arguments() -> list[str] | None:
    """The arguments of the `accelerate launch` that started this process.

    None if something else did, and where the system does not show it.
    """
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    # An interpreter may come first.
    is_launcher = any(Path(word).name in LAUNCHERS or word == "accelerate.commands.launch" for word in words[:3])
    return words if is_launcher else None


def default_configuration() -> str | None:
    """The file that `accelerate config` writes and `accelerate launch` reads, if there is one."""
    files = [hf_home() / "accelerate" / f"default_config.{suffix}" for suffix in ("yaml", "json")]
    return next((str(file) for file in files if file.is_file()), None)


def hf_home() -> Path:
    """The folder of the Hugging Face libraries: caches, login, accelerate's configuration."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(caches) / "huggingface").expanduser()


def _value(arguments: list[str], flag: str) -> str | None:
    """The value of a flag among a command's arguments, as `--flag value` or `--flag=value`."""
    for number, word in enumerate(arguments):
        if word == flag and number + 1 < len(arguments):
            return arguments[number + 1]
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None
