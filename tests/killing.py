"""Runs that are killed: each in a child forked from a process that has imported everything, so that it starts fast.

python tests/killing.py PLANS.json does what `kill_often`, `kill_at_every_operation` and `kill_while_starting` describe,
and prints JSON.
The child runs the script's own `main`; what is added to it are a record of what is trained on, and flags that
tell the parent what the child is doing, or a layer that counts the file operations of a save.
"""

from __future__ import annotations

import builtins
import io
import json
import mmap
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHASES = ("training", "saving", "pruning", "validating", "caching")


class Phases:
    """What a child is doing, and how many micro-batches it has begun, in memory that it shares with its parent."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, len(PHASES) + 1)

    def clear(self) -> None:
        self.memory[:] = bytes(len(PHASES) + 1)

    @property
    def batches(self) -> int:
        return self.memory[len(PHASES)]

    def begin_batch(self) -> None:
        self.memory[PHASES.index("training")] = 1
        self.memory[len(PHASES)] = min(255, self.batches + 1)

    def during(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        place = PHASES.index(phase)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.memory[place] = 1
            try:
                return function(*arguments, **options)
            finally:
                self.memory[place] = 0

        return wrapped

    def __contains__(self, phase: str) -> bool:
        return bool(self.memory[PHASES.index(phase)])

    def now(self) -> str:
        """The rarest of what it is doing; `starting` before the first step, and after the last."""
        return next((phase for phase in reversed(PHASES) if phase in self), "starting or ending")


def fork(argv: list[str], log: Path, prepare: Callable[[], None]) -> int:
    """Run the script in a child; its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        prepare()
        from sd_recipes.commands.cli import train as main

        main(argv)
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """The exit status of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---------------------------------------------------------------------------------------- random kills


def watch(phases: Phases, trace: Path) -> None:
    """In the child: mark its phases, and write down what each micro-batch is made of."""
    import sd_recipes.checkpoints.format as checkpoint
    import sd_recipes.checkpoints.saver as saving
    from sd_recipes.data.batches import Batch
    from sd_recipes.data.latent_store import _Writer
    from sd_recipes.evaluation.validation import Validator

    saving.write_checkpoint = phases.during("saving", saving.write_checkpoint)  # type: ignore[assignment]
    checkpoint._prune = phases.during("pruning", checkpoint._prune)  # type: ignore[assignment]
    Validator.__call__ = phases.during("validating", Validator.__call__)  # type: ignore[method-assign]
    _Writer._write = phases.during("caching", _Writer._write)  # type: ignore[method-assign]
    file = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    all_moments = Batch.all_moments

    def recorded(batch: Batch, *arguments: Any) -> Any:
        phases.begin_batch()
        line = {
            "samples_seen": batch.plan.samples_seen,
            "positions": batch.plan.positions.tolist(),
            "rows": batch.plan.rows.tolist(),
            "timesteps": batch.timesteps.tolist(),
            "flips": batch.flip.tolist(),
            "noise": batch.noise.double().sum().item(),
            "input_ids": batch.input_ids.sum().item(),
        }
        os.write(file, (json.dumps(line) + "\n").encode())
        return all_moments(batch, *arguments)

    Batch.all_moments = recorded  # type: ignore[method-assign]


def kill_often(plan: dict[str, Any]) -> dict[str, Any]:
    """Kill a run `kills` times with SIGKILL, typing the same command each time, and then let it end."""
    from sd_recipes.checkpoints.format import list_checkpoints

    phases, chance, out = Phases(), random.Random(plan["seed"]), Path(plan["argv"][-1])
    log, trace = Path(plan["log"]), Path(plan["trace"])
    struck: Counter[str] = Counter()
    started = time.monotonic()
    attempts = 0
    while True:
        phases.clear()
        attempts += 1
        child = fork(plan["argv"], log, lambda: watch(phases, trace))
        if sum(struck.values()) == plan["kills"]:
            break
        # While the rows are first met, files of the cache are written; later only the other phases come up.
        aims = ("caching", "saving") if attempts <= plan["kills"] // 12 else ("saving", "pruning", "validating", None)
        aim = chance.choice(aims)
        deadline = time.monotonic() + chance.uniform(0, plan["seconds"])
        if aim is not None:
            deadline += plan["seconds"]
        # So many steps at most that the kills are spread over the run, and it does not end before the last of them.
        done = max((int(path.name.split("-")[1]) for path in list_checkpoints(out)), default=0)
        steps = chance.uniform(0, 1.5 * (plan["num_steps"] - done) / (plan["kills"] - sum(struck.values())))
        while (
            time.monotonic() < deadline
            and (aim is None or aim not in phases)
            and phases.batches <= steps * plan["batches_per_step"]
        ):
            time.sleep(0.0002)
        if aim is not None:
            time.sleep(chance.uniform(0, 0.004))
        now = phases.now()
        os.kill(child, signal.SIGKILL)
        status = wait(child)
        if status == -signal.SIGKILL:
            struck[now] += 1
        elif status != 0:
            return {"failed": status, "struck": struck}
    status = wait(child)
    return {"status": status, "struck": struck, "attempts": attempts, "seconds": time.monotonic() - started}


# ------------------------------------------------------------------------- a kill at every file operation


class KillAt:
    """Counts what a thread does to files in a folder and kills the process at operation `number`; None only counts.

    Before it is done, and of what writes, in the middle: half of the content is there then.
    """

    def __init__(self, number: int | None, counted_in: str = "", folder: str = "") -> None:
        self.number, self.counted_in, self.folder = number, counted_in, folder
        self.done: list[str] = []

    def install(self) -> None:
        import sd_recipes.checkpoints.format as checkpoint

        for owner, name in (
            (os, "fsync"), (os, "replace"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (os, "open"),
            (builtins, "open"), (io, "open"), (Path, "write_text"), (checkpoint, "save_file"),
        ):  # fmt: skip
            setattr(owner, name, self._wrapped(name, getattr(owner, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            is_inside = str(arguments[0]).startswith(self.folder)
            if is_inside and threading.current_thread().name.startswith(self.counted_in):
                self.done.append(f"{name} {arguments[0] if name != 'save_file' else arguments[1]}")
                if len(self.done) == self.number:
                    if name == "save_file":
                        real(*arguments, **options)
                        os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
                    if name == "write_text":
                        arguments[0].write_bytes(arguments[1].encode()[: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return operation


def kill_at_every_operation(plan: dict[str, Any]) -> dict[str, Any]:
    """Kill a run at operation n of its save, for every n; verify what is left, and let the same command end it."""
    from sd_recipes.checkpoints.format import find_checkpoint

    begun, out, log, ends = Path(plan["begun"]), Path(plan["out"]), Path(plan["log"]), Path(plan["ends"])
    ends.mkdir()
    results: list[dict[str, Any]] = []
    number = 1
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(begun, out)
        layer = KillAt(number, counted_in="checkpoint")
        status = wait(fork(plan["argv"], log, layer.install))
        if status == 0:  # the save has fewer operations
            return {"results": results}
        found = find_checkpoint(out, "latest")
        results.append({"killed": status, "left": found[0].name if found else None})
        if number % plan["resume_every"] == 0:
            results[-1]["resumed"] = wait(fork(plan["argv"], log, lambda: None))
            shutil.copytree(out / plan["last"], ends / str(number))
        number += 1


def kill_while_starting(plan: dict[str, Any]) -> dict[str, Any]:
    """Kill a run at operation n in its new folder, for every n until its figures begin; the same command ends it."""
    out, log = Path(plan["argv"][-1]), Path(plan["log"])
    results: list[dict[str, Any]] = []
    while not results or "metrics.jsonl" not in results[-1]["left"]:
        shutil.rmtree(out, ignore_errors=True)
        layer = KillAt(len(results) + 1, folder=str(out))
        killed = wait(fork(plan["argv"], log, layer.install))
        left = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
        results.append({"killed": killed, "left": left, "resumed": wait(fork(plan["argv"], log, lambda: None))})
    return {"results": results}


def main() -> None:
    plans = json.loads(Path(sys.argv[1]).read_text())
    import torch

    torch.set_num_threads(1)
    import sd_recipes.commands.train  # noqa: F401 - imported once, for all children

    actions = {"often": kill_often, "every operation": kill_at_every_operation, "starting": kill_while_starting}
    print(json.dumps([actions[plan["action"]](plan) for plan in plans]))


if __name__ == "__main__":
    main()
