"""Trackers get what was logged, however a run ends, and one that fails stops nothing else."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import forget_accelerator

from sd_recipes.checkpoints.best import BestWeights
from sd_recipes.checkpoints.saver import BackgroundSaver
from sd_recipes.commands.train import run
from sd_recipes.data.bad_rows import TooManyBadRows
from sd_recipes.errors import RecipeError
from sd_recipes.export.hub import PushError
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.signals import Stopped
from sd_recipes.runtime.trackers import Tracker, read_metrics
from sd_recipes.training.finite import TrainingDiverged
from sd_recipes.training.run import Run

# ------------------------------------------------------------------------------------- however a run ends


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trackers that were told to end."""
    found: list[Any] = []
    finish = TensorBoardTracker.finish
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: (found.append(self), finish(self)))
    return found


def logged_steps(output_dir: Path) -> list[int]:
    """Steps of which TensorBoard reads a loss."""
    events = EventAccumulator(str(output_dir / "logs" / "text2image-fine-tune"), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars("train_loss")] if "train_loss" in events.Tags()["scalars"] else []


@pytest.fixture
def recipe(settings: dict[str, Any]) -> Recipe:
    forget_accelerator()
    return Recipe(**settings | {"report_to": "tensorboard"})


@pytest.mark.parametrize(
    "error",
    [
        TrainingDiverged("the loss is nan"), RecipeError("a mistake in mid-run"), TooManyBadRows("7 rows"),
        Stopped("by SIGTERM"), ValueError("a bug"), KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_defect_7_the_trackers_have_all_events_however_a_run_ends(
    recipe: Recipe, error: BaseException, finished: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    end_training = Accelerator.end_training
    monkeypatch.setattr(Accelerator, "end_training", lambda self: (ended.append("group"), end_training(self)))

    def fit(built: Run, saver: BackgroundSaver, best: BestWeights) -> None:
        built.tracker.log({"train_loss": 1.0}, 1)
        raise error

    monkeypatch.setattr("sd_recipes.commands.train.fit", fit)
    with pytest.raises(type(error)) as raised:
        run(recipe)
    assert raised.value is error
    assert len(finished) == 1
    assert logged_steps(Path(recipe.output_dir)) == [1]
    # What one process meets alone must not wait for the others, as the end of their group may.
    assert ended == (["group"] if isinstance(error, Stopped) else [])


def test_defect_7_a_run_that_diverges_keeps_its_last_events(recipe: Recipe, finished: list[Any]) -> None:
    recipe = recipe.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(TrainingDiverged):
        run(recipe)
    lines = read_metrics(Path(recipe.output_dir) / "metrics.jsonl")
    assert logged_steps(Path(recipe.output_dir)) == [line["step"] for line in lines if "train_loss" in line]
    assert len(lines) >= 1
    assert len(finished) == 1


def test_defect_7_a_failed_push_keeps_the_last_events(
    recipe: Recipe, finished: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(*_: object) -> str:
        raise PushError("not pushed")

    monkeypatch.setattr("sd_recipes.commands.train.create_repository", lambda _: "tester/discs")
    monkeypatch.setattr("sd_recipes.commands.train.publish", publish)
    recipe = recipe.model_copy(update={"push_to_hub": True, "max_train_steps": 1})
    with pytest.raises(PushError):
        run(recipe)
    assert len(finished) == 1
    assert logged_steps(Path(recipe.output_dir)) == [1]


def test_defect_7_a_tracker_that_cannot_end_hides_no_error(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(self: object) -> None:
        raise OSError("no space left")

    def fit(built: Run, saver: BackgroundSaver, best: BestWeights) -> None:
        raise TrainingDiverged("the loss is nan")

    monkeypatch.setattr("sd_recipes.commands.train.fit", fit)
    monkeypatch.setattr(TensorBoardTracker, "finish", finish)
    with pytest.raises(TrainingDiverged):
        run(recipe)


# --------------------------------------------------------------------------------------- one that fails


class CommunicationError(Exception):
    """As wandb's and comet's own, which are no OSError."""


class FakeTracker:
    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name, self.error, self.calls = name, error, 0
        self.writer = SimpleNamespace(flush=self.call)

    def call(self, *_: object, **__: object) -> None:
        self.calls += 1
        if self.error:
            raise self.error

    log = log_images = finish = call


def tracker_of(tmp_path: Path, *trackers: FakeTracker) -> Tracker:
    recipe = Recipe(pretrained_model_name_or_path="a", train_data_dir="b", output_dir=str(tmp_path))
    accelerator: Any = SimpleNamespace(trackers=list(trackers), is_main_process=True, log=None)

    def log(values: dict[str, float], step: int) -> None:  # as accelerate's
        for tracker in accelerator.trackers:
            tracker.log(values, step=step)

    accelerator.log = log
    return Tracker(accelerator, recipe)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), CommunicationError("server is away")])
def test_defect_9_a_failing_tracker_is_told_once_and_not_tried_again(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    fails, works = FakeTracker("wandb", error), FakeTracker("tensorboard")
    tracker = tracker_of(tmp_path, fails, works)
    for step in (1, 2, 3):
        tracker.log({"train_loss": 1.0}, step)
    tracker.log_pictures([Image.new("RGB", (8, 8))], 3)
    tracker.flush()
    tracker.close()
    assert fails.calls == 1
    assert works.calls == 6, "three logs, pictures, a flush and the end"
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == ["wandb fails"]


@pytest.mark.parametrize("call", ["log_pictures", "flush", "close"])
def test_defect_9_no_call_of_a_failing_tracker_ends_the_run(tmp_path: Path, call: str) -> None:
    fails = FakeTracker("tensorboard", CommunicationError("server is away"))
    tracker = tracker_of(tmp_path, fails)
    arguments: dict[str, list[Any]] = {"log_pictures": [[Image.new("RGB", (8, 8))], 1]}
    for _ in range(2):
        getattr(tracker, call)(*arguments.get(call, []))
    assert fails.calls == 1


def test_defect_9_a_full_disk_ends_the_curve_and_no_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    works = FakeTracker("wandb")
    tracker = tracker_of(tmp_path, works)
    tracker.log({"train_loss": 1.0}, 1)
    opened = []

    def full(self: Path, *_: object, **__: object) -> None:
        opened.append(self)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        for step in (2, 3):
            tracker.log({"train_loss": 1.0}, step)
    assert works.calls == 3
    assert opened == [tmp_path / "metrics.jsonl"] * 2, "it is tried again, for there may be room by then"
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]
    assert len(caplog.records) == 1


def test_a_tracker_that_cannot_be_started_is_a_mistake(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def init_trackers(self: Accelerator, *_: object, **__: object) -> None:
        (Path(recipe.output_dir) / "logs").mkdir()
        raise CommunicationError("no API key configured")

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "init_trackers", init_trackers)
        with pytest.raises(RecipeError, match=r"--report_to tensorboard cannot be started \(no API key configured\)"):
            run(recipe)
    assert sorted(path.name for path in Path(recipe.output_dir).iterdir()) == [".lock", "logs", "recipe.yaml"]
    run(recipe)
    assert (Path(recipe.output_dir) / "unet").is_dir(), "logged in, the same command goes on"
