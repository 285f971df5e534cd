"""The script under its launchers, as processes that can be signalled."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT
from test_script import environment

ACCELERATE = [str(Path(sys.executable).parent / "accelerate"), "launch", "--quiet"]
TRAINERS = ("train_text_to_image.py", "record_samples.py")


def torchrun(processes: int, *options: str) -> list[str]:
    """On CPUs `accelerate launch` starts several processes through MPI only; torchrun does without."""
    # Its own address: a machine's name may not resolve. A fixed --master_port could be taken.
    place = ["--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", str(processes)]
    return [sys.executable, "-m", "torch.distributed.run", *place, *options]


def launcher_environment(config: Path, *options: str) -> tuple[dict[str, str], Any]:
    """What `accelerate launch` gives its processes, and torchrun's arguments, by its own code."""
    arguments = launcher_arguments(config, *options)
    return prepare_multi_gpu_env(arguments), arguments


def launcher_arguments(config: Path, *options: str) -> Any:
    """The launcher's own arguments, filled in from `config` by a private function of accelerate (1.15)."""
    arguments = launch_command_parser().parse_args(["--config_file", str(config), *options, "script.py"])
    return _validate_launch_command(arguments)[0]


def flags_of(settings: dict[str, Any]) -> list[object]:
    flags: list[object] = []
    for name, value in settings.items():
        if name != "device":
            flags += [f"--{name}"] if value is True else [f"--{name}", value]
    return flags


def start(
    launcher: list[str], *flags: object, script: str = "train_text_to_image.py", **extra: str
) -> subprocess.Popen:
    """The launcher's process, in a session of its own, with its output in a pipe."""
    command = [*launcher, ROOT / script, "--device", "cpu", *flags]
    return subprocess.Popen(
        [str(part) for part in command],
        env=environment(**extra),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 120) -> str:
    """What it and its processes wrote; an error if they did not succeed. After `timeout` seconds it is killed."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()  # its trainers notice
    assert process.returncode == 0, output
    return output


def trainers(mark: str) -> list[int]:
    """The living processes that train, of those with `mark` among their arguments; by rank where they have one."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            arguments = (folder / "cmdline").read_bytes().decode().split("\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            variables = (folder / "environ").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        # An interpreter with the script as its first argument: not a launcher, nor a zombie.
        is_trainer = any(Path(argument).name in TRAINERS for argument in arguments[1:3])
        if is_trainer and mark in arguments and state != "Z":
            ranks = [int(each.removeprefix("RANK=")) for each in variables if each.startswith("RANK=")]
            found.append((ranks[0] if ranks else 0, int(folder.name)))
    return [pid for _, pid in sorted(found)]


def until(condition: Callable[[], object], what: str, timeout: float = 90) -> None:
    give_up = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < give_up, f"{what}: not within {timeout} s"
        time.sleep(0.05)


def last_step(output_dir: Path) -> int:
    """The last step that was logged."""
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
