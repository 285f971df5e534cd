"""`sd-recipes env`: what a run would meet on this machine, to be pasted into a question. No network, no secrets.

Needs nothing but Python, so `python -m sd_recipes.commands.env` works where packages are missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sd_recipes import __version__
from sd_recipes.redaction import LEFT_OUT, redacted
from sd_recipes.runtime.cores import num_cores
from sd_recipes.runtime.launcher import default_configuration, hf_home

SHOWN = (
    "torch", "diffusers", "transformers", "accelerate", "datasets", "huggingface_hub", "safetensors", "tokenizers",
    "numpy", "peft", "Pillow",
)  # fmt: skip
OPTIONAL = {
    "bitsandbytes": "--use_8bit_adam", "xformers": "--enable_xformers_memory_efficient_attention",
    "prodigyopt": "--optimizer prodigy", "schedulefree": "--optimizer schedule_free_adamw",
    "wandb": "--report_to wandb", "comet_ml": "--report_to comet_ml", "aiohttp": "streams of https:// addresses",
}  # fmt: skip
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")
VARIABLES = re.compile(
    r"(?:HF|HUGGINGFACE|TRANSFORMERS|DIFFUSERS|ACCELERATE|CUDA|NCCL|TORCH|PYTORCH|OMP|MKL|ONEDNN|FSDP|XDG_CACHE)_.*"
    r"|(?:HTTPS?|ALL|NO)_PROXY|LANG|LC_ALL|LC_CTYPE|PYTHONUTF8|PYTHONIOENCODING|WORLD_SIZE|SLURM_JOB_ID",
    re.IGNORECASE,
)
SECRET = re.compile(r"token|key|secret|passw|credential", re.IGNORECASE)


def main(argv: list[str] | None = None) -> None:
    """Print the machine, the packages and the settings around them."""
    prog = "sd-recipes env"
    argparse.ArgumentParser(prog=prog, description="Show what a run would meet here, to be pasted.").parse_args(argv)
    for name, value in lines():
        sys.stdout.write(f"{name:<17}{redacted(str(value)).replace(str(Path.home()), '~')}\n")


def lines() -> Iterator[tuple[str, object]]:
    """(what, its value) in the order of printing."""
    yield "sd-recipes", f"{__version__} in {Path(__file__).parents[2]}"
    yield "Python", f"{platform.python_version()} on {platform.platform()}, {sys.getfilesystemencoding()} file names"
    yield "packages", ", ".join(f"{name} {found}" for name in SHOWN if (found := version(name)))
    yield "missing", "; ".join(missing()) or "nothing that is needed"
    yield "optional", ", ".join(f"{name} {version(name) or f'not there ({use})'}" for name, use in OPTIONAL.items())
    yield "CPU", cpu()
    yield "memory", memory()
    yield "GPU", gpus()
    for name, folder in {"here": Path.cwd(), "caches": hf_home(), "temporary": Path(tempfile.gettempdir())}.items():
        yield f"disk, {name}", disk(folder)
    yield "Hub", hub()
    yield "accelerate", accelerate()
    yield "environment", ", ".join(environment()) or "nothing of interest"


def version(package: str) -> str | None:
    """Its version; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing() -> list[str]:
    """What this program needs and does not find, or finds too old."""
    try:
        needed = importlib.metadata.requires("sd-recipes") or []
    except importlib.metadata.PackageNotFoundError:
        return ["sd-recipes is not installed itself: pip install ."]
    found = []
    for requirement in needed:
        if "extra ==" in requirement:
            continue
        name, operator, least = re.split(r"\s*(>=|$)", requirement.split(";")[0].strip(), maxsplit=1)
        there = version(name)
        if there is None:
            found.append(f"{name} is not installed")
        elif operator and numbers(there) < numbers(least):
            found.append(f"{name} {there} is older than {least}")
    return found


def numbers(text: str) -> list[int]:
    """The numbers that a version begins with."""
    return [int(part) for part in re.match(r"[\d.]*", text)[0].strip(".").split(".") if part]  # type: ignore[index]


def cpu() -> str:
    content = text_of("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.*)", content, re.MULTILINE)
    known = [name for name in INSTRUCTIONS if re.search(rf"\b{name}\b", content)]
    name = model[1] if model else platform.machine()
    return ", ".join([name, f"{num_cores()} of {os.cpu_count()} cores", *known])


def memory() -> str:
    kilobytes = dict(re.findall(r"^(MemTotal|MemAvailable):\s*(\d+) kB", text_of("/proc/meminfo"), re.MULTILINE))
    if len(kilobytes) < 2:
        return "unknown"
    words = f"{gigabytes(1024 * int(kilobytes['MemAvailable']))} free of {gigabytes(1024 * int(kilobytes['MemTotal']))}"
    limit = text_of("/sys/fs/cgroup/memory.max").strip()
    return f"{words}, limited to {gigabytes(int(limit))} for this process's group" if limit.isdigit() else words


def gpus() -> str:
    """What torch sees, or why it sees nothing."""
    if importlib.util.find_spec("torch") is None:
        return "unknown without torch"
    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways, and is what is to be shown
        return f"unknown: torch cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if torch.cuda.is_available():
        found = []
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            found.append(f"{name} ({gigabytes(free)} free of {gigabytes(total)})")
        return f"{', '.join(found)}; torch is built for CUDA {torch.version.cuda}"
    if torch.backends.mps.is_available():
        return "Apple's, by MPS"
    if torch.version.cuda is None and (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
        return "none that torch sees: there is a driver, and torch is a build for CPUs. Install a CUDA build of torch"
    return f"none that torch sees; it is built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs'}"


def disk(folder: Path) -> str:
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    usage = shutil.disk_usage(there)
    writable = "" if os.access(there, os.W_OK) else ", not writable"
    return f"{gigabytes(usage.free)} free of {gigabytes(usage.total)} at {folder}{writable}"


def hub() -> str:
    """Where the Hub is, and whether there is a login; never the token."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return "unknown without huggingface_hub"
    from huggingface_hub import constants, get_token

    source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "hf auth login"
    login = f"logged in by {source}" if get_token() else "not logged in (hf auth login)"
    return f"{constants.ENDPOINT}, {'offline' if constants.HF_HUB_OFFLINE else 'not offline'}, {login}, asked no server"


def accelerate() -> str:
    """accelerate's default configuration in one line."""
    file = default_configuration()
    if file is None:
        return "no configuration of its own (accelerate config)"
    content = [line.strip() for line in text_of(file).splitlines() if line.strip() not in ("", "{", "}")]
    return f"{file}: {' '.join(line if line.endswith((',', ':')) else f'{line},' for line in content)}".rstrip(",")


def environment() -> list[str]:
    """The variables that libraries and launchers read; whether there is a secret, not which."""
    return [
        f"{name}={LEFT_OUT if SECRET.search(name) else value}"
        for name, value in sorted(os.environ.items())
        if VARIABLES.fullmatch(name)
    ]


def text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def gigabytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB"


if __name__ == "__main__":
    main()
