"""Runs that are killed at any instant are the same run, to the bit; the long ones by `make test-faults`."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from killing import KillAt, wait
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_format_and_saver import contents
from test_resume import assert_same_checkpoint, figures
from test_script import environment
from tiny_models import build_image_folder
from training_runs import assert_equal

from sd_recipes.checkpoints.format import find_checkpoint, list_checkpoints, write_checkpoint
from sd_recipes.training.build_parts import UNET_WEIGHTS


def do(tmp_path: Path, *plans: dict[str, Any]) -> list[dict[str, Any]]:
    """What tests/killing.py gives for these plans."""
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "killing.py", tmp_path / "plans.json"],
        env=environment(PYTHONPATH=str(ROOT), HF_DATASETS_CACHE=str(tmp_path / "datasets")),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def command(tiny_pipeline: Path, tmp_path: Path) -> list[str]:
    """48 rows in fours: an epoch is 12 steps. Everything that has a state is on."""
    data = build_image_folder(tmp_path / "data", 48, (32, 32))
    flags = [
        "--pretrained_model_name_or_path", tiny_pipeline, "--train_data_dir", data, "--resolution", 32,
        "--center_crop", "--random_flip", "--train_batch_size", 2, "--gradient_accumulation_steps", 2,
        "--learning_rate", 1e-3, "--lr_warmup_steps", 5, "--seed", 3, "--device", "cpu", "--use_ema",
        "--cache_latents", "disk", "--checkpointing_steps", 3, "--checkpoints_total_limit", 2, "--logging_steps", 4,
        "--validation_prompts", "a disc", "--validation_inference_steps", 1, "--validation_steps", 10,
        "--caption_dropout", 0.2,
    ]  # fmt: skip
    return [str(flag) for flag in flags]


def often(
    tmp_path: Path, name: str, command: list[str], *, kills: int, num_steps: int, seconds: float = 2.5
) -> dict[str, Any]:
    argv = [*command, "--output_dir", str(tmp_path / name)]
    return {
        "action": "often", "argv": argv, "kills": kills, "seconds": seconds, "seed": 11, "num_steps": num_steps,
        "batches_per_step": 2,
        "log": str(tmp_path / f"{name}.log"), "trace": str(tmp_path / f"{name}.trace"),
    }  # fmt: skip


def traced(path: Path) -> dict[tuple[int, int], list[str]]:
    """The different records of each micro-batch, by the samples seen after its step and its first position."""
    found: dict[tuple[int, int], set[str]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        found.setdefault((record["samples_seen"], record["positions"][0]), set()).add(line)
    return {place: sorted(records) for place, records in found.items()}


def assert_same_run(tmp_path: Path, num_steps: int) -> None:
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    last = f"checkpoint-{num_steps}"
    assert_same_checkpoint(uninterrupted / last, killed / last)  # weights, average, optimizer, schedule, position
    assert_equal(load_file(uninterrupted / "unet" / UNET_WEIGHTS), load_file(killed / "unet" / UNET_WEIGHTS))
    expected = traced(tmp_path / "uninterrupted.trace")
    assert len(expected) == 2 * num_steps
    assert all(len(records) == 1 for records in expected.values())
    # Also what was trained on before a kill and again after it was the same both times.
    assert traced(tmp_path / "killed.trace") == expected
    assert figures(killed) == figures(uninterrupted)
    pictures = [sorted((out / "samples").iterdir()) for out in (uninterrupted, killed)]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]
    events = EventAccumulator(str(killed / "logs" / "text2image-fine-tune"), size_guidance={"scalars": 0})
    events.Reload()
    lines = [line for line in figures(uninterrupted) if "train_loss" in line]
    assert [event.step for event in events.Scalars("train_loss")] == [line["step"] for line in lines]
    assert not list(killed.glob(".checkpoint*"))
    assert len(list_checkpoints(killed)) == 2


@pytest.mark.parametrize(("kills", "num_steps"), [(4, 24), pytest.param(100, 600, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_instants_is_the_quiet_run(
    command: list[str], tmp_path: Path, kills: int, num_steps: int
) -> None:
    command = [*command, "--max_train_steps", str(num_steps)]
    uninterrupted, killed = do(
        tmp_path,
        often(tmp_path, "uninterrupted", command, kills=0, num_steps=num_steps),
        often(tmp_path, "killed", command, kills=kills, num_steps=num_steps),
    )
    assert uninterrupted["status"] == 0, (tmp_path / "uninterrupted.log").read_text()[-3000:]
    assert killed.get("status") == 0, (tmp_path / "killed.log").read_text()[-3000:]
    print(f"{num_steps} steps: {killed}")
    assert sum(killed["struck"].values()) == kills
    if kills >= 100:
        assert set(killed["struck"]) >= {"training", "saving", "pruning", "validating", "caching"}
    assert_same_run(tmp_path, num_steps)


@pytest.mark.slow
def test_the_script_itself_killed_with_loader_workers(command: list[str], tmp_path: Path) -> None:
    """In processes of their own, with a worker that outlives its killed parent for a while."""
    command = [*command, "--max_train_steps", "60", "--dataloader_num_workers", "1", "--report_to", "none"]

    def start(name: str) -> subprocess.Popen[bytes]:
        with (tmp_path / f"{name}.log").open("ab") as log:
            argv = [sys.executable, ROOT / "train_text_to_image.py", *command, "--output_dir", tmp_path / name]
            return subprocess.Popen([str(part) for part in argv], env=environment(), cwd=ROOT, stdout=log, stderr=log)

    assert start("uninterrupted").wait() == 0
    chance = random.Random(5)
    for number in range(5):
        process = start("killed")
        wanted = time.monotonic() + 120
        while time.monotonic() < wanted and len(list_checkpoints(tmp_path / "killed")) <= min(number, 1):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 8))
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)
    assert start("killed").wait() == 0, (tmp_path / "killed.log").read_text()[-3000:]
    assert_same_checkpoint(tmp_path / "uninterrupted" / "checkpoint-60", tmp_path / "killed" / "checkpoint-60")
    assert figures(tmp_path / "uninterrupted") == figures(tmp_path / "killed")


def test_a_whole_checkpoint_remains_at_every_file_operation_of_a_save(tmp_path: Path) -> None:
    """Killed before each operation, and in the middle of those that write; with the old one to be pruned."""
    out, begun = tmp_path / "out", tmp_path / "begun"
    begun.mkdir()
    write_checkpoint(contents(2), begun, limit=1)
    left: Counter[str] = Counter()
    number = 1
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(begun, out)
        child = os.fork()
        if child == 0:
            KillAt(number).install()
            write_checkpoint(contents(4), out, limit=1)
            os._exit(0)
        status = wait(child)
        found = find_checkpoint(out, "latest")
        assert found is not None
        left[found[0].name] += 1
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert write_checkpoint(contents(6), out, limit=1).name == "checkpoint-6", "and the next save works"
        assert [path.name for path in out.iterdir()] == ["checkpoint-6"]
        number += 1
    assert left["checkpoint-2"] > 20
    assert left["checkpoint-4"] > 5
    assert found[0].name == "checkpoint-4"


@pytest.mark.slow
def test_a_run_killed_at_every_file_operation_of_its_start_goes_on(command: list[str], tmp_path: Path) -> None:
    """Before there is anything to resume; the folder is not taken for somebody else's."""
    argv = [*command, "--max_train_steps", "1", "--validate_before_training", "--output_dir", str(tmp_path / "out")]
    (found,) = do(tmp_path, {"action": "starting", "argv": argv, "log": str(tmp_path / "log")})
    results = found["results"]
    print(results)
    assert len(results) > 5
    assert {result["killed"] for result in results} == {-signal.SIGKILL}
    assert {result["resumed"] for result in results} == {0}, (tmp_path / "log").read_text()[-3000:]
    assert any("logs" in result["left"] for result in results), "TensorBoard had begun"


@pytest.mark.slow
def test_a_run_killed_at_every_file_operation_of_a_save_is_the_quiet_run(command: list[str], tmp_path: Path) -> None:
    command = [*command, "--checkpoints_total_limit", "1", "--report_to", "none"]
    four = [*command, "--max_train_steps", "6"]
    begin, uninterrupted, killed = do(
        tmp_path,
        often(tmp_path, "begun", [*command, "--max_train_steps", "3"], kills=0, num_steps=3),
        often(tmp_path, "uninterrupted", four, kills=0, num_steps=6),
        {
            "action": "every operation", "argv": [*four, "--output_dir", str(tmp_path / "killed")], "resume_every": 1,
            "begun": str(tmp_path / "begun"), "out": str(tmp_path / "killed"), "ends": str(tmp_path / "ends"),
            "last": "checkpoint-6", "log": str(tmp_path / "killed.log"),
        },
    )  # fmt: skip
    assert (begin["status"], uninterrupted["status"]) == (0, 0)
    results = killed["results"]
    print(len(results), "operations:", Counter(result["left"] for result in results))
    assert len(results) > 30
    assert {result["killed"] for result in results} == {-signal.SIGKILL}
    assert {result["left"] for result in results} == {"checkpoint-3", "checkpoint-6"}
    assert {result["resumed"] for result in results} == {0}
    for number in range(1, len(results) + 1):
        assert_same_checkpoint(tmp_path / "uninterrupted" / "checkpoint-6", tmp_path / "ends" / str(number))
