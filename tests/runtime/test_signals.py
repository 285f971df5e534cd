"""SIGTERM, SIGINT and SIGUSR1, to the trainer or to its launcher: all is saved, and nobody is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT
from launching import ACCELERATE, finish, last_step, start, torchrun, trainers, until
from test_script import environment
from tiny_models import build_image_folder
from training_runs import assert_equal, average, losses, train, weights

from sd_recipes.checkpoints.format import list_checkpoints
from sd_recipes.commands.cache import fill_cache
from sd_recipes.data.batches import Batch
from sd_recipes.evaluation import pictures
from sd_recipes.model.latents import LatentEncoder
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.console import mistakes_in_one_line
from sd_recipes.runtime.signals import Stopped, stop_request

DIRECT = [sys.executable]


@pytest.fixture
def flags(tiny_pipeline: Path, image_folder: Path, tmp_path: Path) -> list[object]:
    """A run that never ends by itself."""
    return [
        "--pretrained_model_name_or_path", tiny_pipeline, "--train_data_dir", image_folder, "--resolution", 32,
        "--train_batch_size", 2, "--max_train_steps", 10**6, "--checkpointing_steps", 10**6, "--logging_steps", 1,
        "--report_to", "none", "--seed", 0, "--output_dir", tmp_path / "out",
    ]  # fmt: skip


def signalled(launcher: list[str], flags: list[object], number: int, to: str) -> tuple[subprocess.Popen, str]:
    """The launcher of a run that was signalled in mid-training, after all its processes are gone."""
    output_dir = Path(str(flags[-1]))
    process = start(launcher, *flags)
    mark = str(output_dir)
    try:
        until(lambda: last_step(output_dir) >= 3, "three steps")
        if to == "group":  # as a terminal does, and systemd
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid if to == "launcher" else trainers(mark)[-1], number)
        until(lambda: not trainers(mark), "the processes' end", timeout=10)
        output, _ = process.communicate(timeout=10)
    finally:
        for trainer in trainers(mark):
            os.kill(trainer, signal.SIGKILL)
        process.kill()
    return process, output


@pytest.mark.parametrize(
    ("launcher", "number", "to"),
    [
        (ACCELERATE, signal.SIGTERM, "launcher"),
        pytest.param(torchrun(2), signal.SIGTERM, "launcher", marks=pytest.mark.slow),
        pytest.param(torchrun(2), signal.SIGTERM, "trainer", marks=pytest.mark.slow),
        pytest.param(DIRECT, signal.SIGTERM, "trainer", marks=pytest.mark.slow),
        pytest.param(DIRECT, signal.SIGTERM, "group", marks=pytest.mark.slow),
        pytest.param(ACCELERATE, signal.SIGINT, "group", marks=pytest.mark.slow),
        pytest.param(DIRECT, signal.SIGINT, "trainer", marks=pytest.mark.slow),
        pytest.param(DIRECT, signal.SIGUSR1, "trainer", marks=pytest.mark.slow),
        pytest.param(ACCELERATE, signal.SIGINT, "launcher", marks=pytest.mark.slow),
        pytest.param(ACCELERATE, signal.SIGUSR1, "launcher", marks=pytest.mark.slow),
        pytest.param(ACCELERATE, signal.SIGKILL, "launcher", marks=pytest.mark.slow),
        pytest.param(torchrun(2), signal.SIGINT, "launcher", marks=pytest.mark.slow),
        pytest.param(torchrun(2), signal.SIGUSR1, "launcher", marks=pytest.mark.slow),
        pytest.param(torchrun(2), signal.SIGKILL, "launcher", marks=pytest.mark.slow),
        pytest.param(torchrun(2), signal.SIGUSR1, "trainer", marks=pytest.mark.slow),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else Path(value[-1]).name if isinstance(value, list) else value.name
    ),
)
def test_a_signal_saves_the_run_within_ten_seconds_and_leaves_nobody(
    flags: list[object], tmp_path: Path, launcher: list[str], number: signal.Signals, to: str
) -> None:
    if to == "group":
        flags = ["--dataloader_num_workers", 2, *flags]
    process, output = signalled(launcher, flags, number, to)
    step = last_step(tmp_path / "out")
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == [f"checkpoint-{step}"]
    assert process.returncode != 0
    told = [line for line in output.splitlines() if line.startswith("stopped by ")]
    assert len(told) == 1, output
    assert f": saved at step {step}; the same command resumes from there" in told[0]
    if launcher is DIRECT:
        assert process.returncode == 75
        assert number.name in told[0]
        assert "Traceback" not in output


LISTENS = """
import sys, time
from sd_recipes.runtime.signals import stop_request
stop_request.listen()
print("listening", flush=True)
until = time.monotonic() + 30
while not stop_request.reason and time.monotonic() < until:
    time.sleep(0.02)
print(stop_request.reason, flush=True)
time.sleep(30 if "stay" in sys.argv else 0)
"""


def listener(*arguments: str, ignored: bool = False) -> subprocess.Popen:
    """A process that says what asked it to stop."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", LISTENS, *arguments],
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout
    assert process.stdout.readline() == "listening\n"
    return process


def test_a_second_ctrl_c_leaves_at_once_as_of_sigint() -> None:
    process = listener("stay")
    assert process.stdout
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    process.send_signal(signal.SIGINT)  # passed on by a launcher, or by the terminal: the same one
    process.send_signal(signal.SIGTERM)
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Ctrl-C again to leave at once") == 1


def test_what_a_shell_ignores_for_its_background_stays_ignored() -> None:
    process = listener(ignored=True)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=5)
    assert output == "SIGUSR1\n"


@pytest.mark.parametrize("variable", ["ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID", "UNRELATED"])
def test_only_the_end_of_a_launcher_is_a_request(variable: str) -> None:
    """A shell that ends leaves what it started with nohup alone."""
    launcher = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {LISTENS.replace('+ 30', '+ 2')!r}])\n"
        "child.wait()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", launcher],
        env=environment(**{variable: "1"}),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    with process.stdout as output:
        assert output.readline() == "listening\n"
        process.kill()
        process.wait()
        expected = "None" if variable == "UNRELATED" else "the end of its launcher"
        assert output.readline() == f"{expected}\n"


@pytest.fixture
def asked() -> Iterator[Any]:
    """Ask this process to stop, as a signal would."""

    def ask() -> None:
        stop_request.reason = "SIGTERM"

    yield ask
    stop_request.reason = None


def asked_after(monkeypatch: pytest.MonkeyPatch, ask: Any, target: Any, function: str, calls: int) -> None:
    """Ask at so many calls of a function of the package."""
    inner, made = getattr(target, function), []

    def counted(*arguments: Any, **more: Any) -> Any:
        made.append(None)
        if len(made) == calls:
            ask()
        return inner(*arguments, **more)

    monkeypatch.setattr(target, function, counted)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any
) -> None:
    """To the bit; stopped in the middle of an accumulation, and in the middle of a picture."""
    settings |= {
        "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 6, "use_ema": True,
        "validation_steps": 3, "validation_prompts": ["disc number 1"], "validation_inference_steps": 3,
        "checkpointing_steps": 100, "resume_from_checkpoint": "latest",
    }  # fmt: skip
    uninterrupted = train(settings, output_dir=str(tmp_path / "uninterrupted"))
    with monkeypatch.context() as patch:
        asked_after(patch, asked, LatentEncoder, "sample", 3)
        with pytest.raises(Stopped, match="stopped by SIGTERM: saved at step 2; the same command"):
            train(settings)
    stop_request.reason = None
    with monkeypatch.context() as patch:
        asked_after(patch, asked, pictures, "check_for_stop", 2)
        with pytest.raises(Stopped, match="saved at step 3"):
            train(settings)
    output_dir = Path(settings["output_dir"])
    assert not (output_dir / "samples").exists(), "the picture was broken off"
    stop_request.reason = None
    resumed = train(settings)
    assert_equal(weights(uninterrupted), weights(resumed))
    assert_equal(average(uninterrupted).named_tensors(), average(resumed).named_tensors())
    assert losses(uninterrupted) == losses(resumed), "the curve goes on"
    assert [path.name for path in sorted((output_dir / "samples").iterdir())] == ["step-000003.png", "step-000006.png"]


def test_the_held_out_loss_and_loading_are_broken_off(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, asked: Any
) -> None:
    settings |= {"validation_split": "train", "validation_steps": 1, "train_batch_size": 1}
    with monkeypatch.context() as patch:
        asked_after(patch, asked, LatentEncoder, "sample", 3)  # of the validation before the first step
        with pytest.raises(Stopped, match="at step 0, before another step"):
            train(settings)
    with pytest.raises(Stopped, match="while it was loading"):
        train(settings)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_says_why_and_all_leave_with_the_same_status(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end, mistakes_in_one_line():
        raise stop_request.stopped("saved at step 7")
    assert end.value.code == 75
    words = "stopped by a signal to another process: saved at step 7; the same command resumes from there\n"
    assert capsys.readouterr().err == (words if rank == "0" else "")


def test_filling_a_cache_keeps_what_is_done(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any
) -> None:
    recipe = Recipe(**{**settings, "train_batch_size": 2, "cache_latents": "disk", "center_crop": True})
    with monkeypatch.context() as patch:
        asked_after(patch, asked, Batch, "all_moments", 2)
        with pytest.raises(Stopped, match="4 of 8 rows are in the cache"):
            fill_cache(recipe)
    stop_request.reason = None
    encoded = []
    with monkeypatch.context() as patch:
        inner = Batch.all_moments
        patch.setattr(
            Batch, "all_moments", lambda batch, *rest: (encoded.append(len(batch.to_encode)), inner(batch, *rest))[1]
        )
        fill_cache(recipe)
    assert sum(encoded) == 4, "the other four are not encoded again"


@pytest.mark.slow
def test_the_cache_command_keeps_what_is_done_at_a_signal(tiny_pipeline: Path, tmp_path: Path) -> None:
    pictures = build_image_folder(tmp_path / "pictures", num_images=1000)
    command = [
        sys.executable, "-m", "sd_recipes.commands.cli", "cache", "--pretrained_model_name_or_path", tiny_pipeline,
        "--train_data_dir", pictures, "--resolution", 32, "--center_crop", "--train_batch_size", 1, "--cache_latents",
        "disk", "--device", "cpu", "--output_dir", tmp_path / "out",
    ]  # fmt: skip

    def fill() -> subprocess.Popen:
        return subprocess.Popen(
            [str(part) for part in command],
            env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    process = fill()
    assert process.stdout
    output = ""
    while "Latents:" not in output:
        output += process.stdout.read(1)
        assert process.poll() is None, output
    process.send_signal(signal.SIGTERM)
    output += process.communicate(timeout=10)[0]
    assert process.returncode == 75, output
    told = re.search(r"stopped by SIGTERM: (\d+) of 1000 rows are in the cache; the same command resumes", output)
    assert told, output
    assert 0 < int(told[1]) < 1000
    output = finish(fill())
    assert "latent cache" in output
    rows = sum(len(datasets.Dataset.from_file(str(path))) for path in tmp_path.glob("out/latents/*/*.arrow"))
    assert rows == 1000, "none twice"
