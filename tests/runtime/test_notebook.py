"""The script's `main` in one process again and again, as a notebook's cells call it, and in a thread."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from conftest import ROOT
from launching import flags_of
from test_script import environment
from training_runs import forget_accelerator

from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import accelerate_left_unused, start_accelerator

CELLS = """
import os, signal, sys, threading, time
import train_text_to_image as script

flags, out = sys.argv[2:], sys.argv[1]

def cell(name, *more, call=script.main):
    try:
        call([*flags, "--output_dir", out + "/" + name, *more])
        print(name, "done", flush=True)
    except SystemExit as end:
        print(name, "exit", end.code, flush=True)

cell("first")
cell("bf16", "--mixed_precision", "bf16")
cell("mistake", "--resolution", "33")
cell("no_is_back")

def interrupt():
    while signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # until the run listens
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
cell("interrupted", "--max_train_steps", "1000000")
cell("interrupted", "--max_train_steps", "1")
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("other cells can be interrupted", flush=True)

from accelerate import notebook_launcher
cell("launched", call=lambda argv: notebook_launcher(script.main, (argv,), num_processes=1, mixed_precision="bf16"))

thread = threading.Thread(target=cell, args=("thread",))
thread.start()
thread.join()
"""


def test_cells_of_a_notebook(settings: dict[str, Any], tmp_path: Path) -> None:
    del settings["output_dir"]
    flags = [*flags_of(settings | {"max_train_steps": 1, "train_batch_size": 1}), "--device", "cpu"]
    command = [sys.executable, "-c", CELLS, tmp_path, *flags]
    done = subprocess.run(
        [str(part) for part in command], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    told = [line for line in done.stdout.splitlines() if line.split(" ")[-1] in ("done", "2", "75", "interrupted")]
    assert told == [
        "first done", "bf16 done", "mistake exit 2", "no_is_back done", "interrupted exit 75", "interrupted done",
        "other cells can be interrupted", "launched done", "thread done",
    ]  # fmt: skip
    used = {name: yaml.safe_load((tmp_path / name / "recipe.yaml").read_text(encoding="utf-8"))["mixed_precision"]
            for name in ("first", "bf16", "no_is_back", "launched", "thread")}  # fmt: skip
    assert used == {"first": "no", "bf16": "bf16", "no_is_back": "no", "launched": "no", "thread": "no"}
    assert done.stderr.count("not in the program's main thread, and no signal can ask it to stop") == 1


@pytest.fixture
def own() -> Accelerator:
    forget_accelerator()
    return Accelerator(cpu=True)


def test_an_accelerator_of_the_notebooks_own_is_left_to_it(settings: dict[str, Any], own: Accelerator) -> None:
    with accelerate_left_unused():
        assert start_accelerator(Recipe(**settings)).device.type == "cpu"
    assert own.mixed_precision == "no"


def test_an_accelerator_of_the_notebooks_own_with_another_precision(settings: dict[str, Any], own: Accelerator) -> None:
    with pytest.raises(RecipeError) as error:
        start_accelerator(Recipe(**settings, mixed_precision="bf16"))
    assert "restart the notebook's kernel, or drop --mixed_precision" in str(error.value)
    assert "\n" not in str(error.value)
