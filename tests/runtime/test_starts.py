"""What a run was started on: one line a start, of one line of history."""

from __future__ import annotations

import json
import platform
import re
import socket
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from test_resume import run_it
from training_runs import train

from sd_recipes.checkpoints.run_folder import output_dir_lock
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.starts import STARTS, read_starts


def test_the_starts_that_led_up_to_a_run_are_recorded(settings: dict[str, Any], tmp_path: Path) -> None:
    """Begun, resumed, gone back to an older checkpoint, and begun again."""
    out = tmp_path / "run"
    run_it(settings, max_train_steps=2, checkpointing_steps=1)
    run_it(settings, max_train_steps=3)
    assert [start.step for start in read_starts(out)] == [0, 2]
    for start in read_starts(out):
        assert (start.device, start.processes, start.precision) == ("cpu", 1, "no")
        assert (start.versions["torch"], start.versions["python"]) == (version("torch"), platform.python_version())
        assert abs((datetime.now(UTC) - datetime.fromisoformat(start.time)).total_seconds()) < 600
    content = (out / STARTS).read_text()
    assert socket.gethostname() not in re.split(r'[":,\s]', content)
    assert "/" not in content
    run_it(settings, max_train_steps=2, resume_from_checkpoint="checkpoint-1")
    assert [start.step for start in read_starts(out)] == [0, 1]
    assert (out / "report.html").is_file()
    with output_dir_lock(Recipe(**settings, overwrite=True), is_main=True):
        assert read_starts(out) == []
        assert not (out / "report.html").exists()


def test_a_start_from_another_folders_checkpoint_sets_this_ones_aside(settings: dict[str, Any], tmp_path: Path) -> None:
    train(settings, max_train_steps=1)
    other = {**settings, "output_dir": str(tmp_path / "other")}
    train(other, max_train_steps=1)
    train(other, max_train_steps=2, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert [start.step for start in read_starts(tmp_path / "other")] == [1]
    assert (tmp_path / "other" / f"{STARTS}.abandoned").is_file()


def test_torn_and_strange_lines_are_left_out(settings: dict[str, Any], tmp_path: Path) -> None:
    train(settings, max_train_steps=1)
    path = tmp_path / "run" / STARTS
    (whole,) = path.read_text().splitlines()
    strange = {**json.loads(whole), "step": "1"}
    path.write_text("\n".join([whole[:40], "[]", "null", "{}", json.dumps(strange), whole, "[" * 10_000]))
    assert [start.step for start in read_starts(tmp_path / "run")] == [0]
    path.unlink()
    assert read_starts(tmp_path / "run") == []
    path.symlink_to(tmp_path / "elsewhere")
    assert read_starts(tmp_path / "run") == []
