"""The same command goes on: position, settings compared, the curve, the folder's owner."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import UNET_CONFIG, build_image_folder, build_tiny_pipeline
from training_runs import assert_equal, forget_accelerator, train, weights

from sd_recipes.checkpoints.format import STATE, list_checkpoints, read_manifest
from sd_recipes.checkpoints.run_folder import output_dir_lock
from sd_recipes.checkpoints.saver import NotSaved
from sd_recipes.commands.train import run
from sd_recipes.data.batches import BatchBuilder
from sd_recipes.errors import RecipeError
from sd_recipes.flags import NOT_OF_THE_RUN, recipe_text
from sd_recipes.recipe import OnResume, Recipe, on_resume
from sd_recipes.runtime.signals import Stopped, stop_request
from sd_recipes.runtime.trackers import Tracker
from sd_recipes.training.build_parts import UNET_WEIGHTS
from sd_recipes.training.description import describe
from sd_recipes.training.state import OPTIMIZER


def run_it(settings: dict[str, Any], **changes: Any) -> None:
    """What the command does, in this process."""
    forget_accelerator()
    run(Recipe(**{**settings, **changes}))


def seed_in(out: Path) -> int:
    """That of the resolved recipe, which a run writes when it begins."""
    return yaml.safe_load((out / "recipe.yaml").read_text())["seed"]


def saved_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.relative_to(path)}:{name}": value
        for file in sorted(path.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def assert_same_checkpoint(one: Path, other: Path) -> None:
    assert_equal(saved_tensors(one), saved_tensors(other))
    assert json.loads((one / STATE).read_text()) == json.loads((other / STATE).read_text())


def figures(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock and on the process."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    left_out = ("images_per_second", "data_wait", "memory_gb")
    return [{key: value for key, value in line.items() if key not in left_out} for line in lines]


# ---------------------------------------------------------------------------------- the same command


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd", "adafactor"])
def test_state_weights_and_curve_are_the_quiet_runs(settings: dict[str, Any], tmp_path: Path, optimizer: str) -> None:
    """Stopped at step 5, of a log of every 3 steps and in the middle of an epoch; all that is saved is the same."""
    settings |= {
        "optimizer": optimizer, "use_ema": True, "lr_scheduler": "cosine", "max_train_steps": 8, "train_batch_size": 3,
        "checkpointing_steps": 5, "random_flip": True, "caption_dropout": 0.3, "logging_steps": 3,
    }  # fmt: skip
    uninterrupted, cut = tmp_path / "uninterrupted", tmp_path / "cut"
    train(settings, output_dir=str(uninterrupted))
    shutil.copytree(uninterrupted, cut)
    shutil.rmtree(cut / "checkpoint-8")  # as if it had been killed after step 7, and its log
    train(settings, output_dir=str(cut), resume_from_checkpoint="latest")
    assert_same_checkpoint(uninterrupted / "checkpoint-8", cut / "checkpoint-8")
    assert figures(cut) == figures(uninterrupted)


def test_typing_it_again_continues_and_a_finished_run_trains_nothing(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    out = tmp_path / "run"
    del settings["seed"]
    run_it(settings, max_train_steps=3)
    seed = seed_in(out)
    assert seed is not None
    before = {path: path.stat().st_mtime_ns for path in (out / "checkpoint-3").rglob("*")}
    run_it(settings, max_train_steps=3)
    assert "Nothing left to train: 3 of 3 steps are done" in caplog.text
    assert "--overwrite" in caplog.text
    assert seed_in(out) == seed, "the seed that was drawn is the run's"
    assert before == {path: path.stat().st_mtime_ns for path in (out / "checkpoint-3").rglob("*")}
    run_it(settings, max_train_steps=5)
    assert [line["step"] for line in figures(out)] == [1, 2, 3, 4, 5]
    run_it(settings, max_train_steps=5, seed=seed, output_dir=str(tmp_path / "uninterrupted"))
    assert_same_checkpoint(tmp_path / "uninterrupted" / "checkpoint-5", out / "checkpoint-5")
    assert_equal(load_file(tmp_path / "uninterrupted" / "unet" / UNET_WEIGHTS), load_file(out / "unet" / UNET_WEIGHTS))


def test_overwrite_starts_anew_and_removes_the_old_runs_files_only(settings: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    cached = {"cache_latents": "disk", "center_crop": True, "report_to": "tensorboard"}
    run_it(settings, **cached, max_train_steps=3, checkpointing_steps=1)
    (out / "notes.txt").write_text("mine")
    (out / "bad_rows.jsonl").write_text("")
    cache = sorted((out / "latents").rglob("*.arrow"))
    run_it(settings, **cached, overwrite=True, max_train_steps=2, learning_rate=1e-5)
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-2"]
    assert [line["step"] for line in figures(out)] == [1, 2]
    assert not (out / "bad_rows.jsonl").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert cache
    assert set(cache) <= set((out / "latents").rglob("*.arrow"))
    assert len(list((out / "logs").rglob("events*"))) == 2, "of this run: its events, and its settings"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "the same command resumes"),
        ({"overwrite": True}, "the same command without --overwrite resumes"),
        ({"resume_from_checkpoint": "checkpoint-1"}, "the same command with --resume_from_checkpoint latest resumes"),
    ],
)
def test_a_stopped_run_says_how_it_goes_on(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    run_it(settings, max_train_steps=1)
    monkeypatch.setattr(Tracker, "log", lambda *_: setattr(stop_request, "reason", "SIGTERM"))
    try:
        with pytest.raises(Stopped, match=rf"stopped by SIGTERM: saved at step \d; {words} from there"):
            run_it(settings, **changes)
    finally:
        stop_request.reason = None


def test_overwrite_leaves_logs_alone_that_lie_elsewhere(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"logging_dir": "../tb", "report_to": "tensorboard", "max_train_steps": 1}
    run_it(settings, tracker_project_name="other", output_dir=str(tmp_path / "other"))
    before = set((tmp_path / "tb").rglob("events*"))
    assert len(before) == 2
    run_it(settings)
    run_it(settings, overwrite=True)
    assert before < set((tmp_path / "tb").rglob("events*"))


def test_a_run_without_a_checkpoint_yet_starts_anew_and_says_so(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    out = tmp_path / "run"
    (out / ".checkpoint-2.partial" / "unet").mkdir(parents=True)
    (out / "recipe.yaml").write_text(recipe_text(Recipe(**settings)))
    (out / "metrics.jsonl").write_text('{"step": 1, "train_loss": 7.0}\n{"step": 2, "tr')
    run_it(settings, max_train_steps=2)
    assert f"{out} has no checkpoint yet: the run starts from step 0" in caplog.text
    assert [line["step"] for line in figures(out)] == [1, 2]
    assert figures(out)[0]["train_loss"] != 7.0
    assert not list(out.glob(".checkpoint*"))


@pytest.mark.parametrize(
    "content",
    [
        ["weights.bin"], ["model_index.json", "unet/config.json"], ["checkpoint-5/optimizer.bin"],
        ["recipe.yaml", "samples/a.txt", "samples.png"], [".lock", "unet/config.json"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_refused_and_left_alone(
    settings: dict[str, Any], tmp_path: Path, content: list[str], overwrite: bool
) -> None:
    out = tmp_path / "run"
    for name in content:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    before = sorted(out.rglob("*"))
    with pytest.raises(RecipeError, match=r"holds no run of this program, but .*: choose a new or an empty folder"):
        run_it(settings, overwrite=overwrite)
    assert sorted(out.rglob("*")) == before


def test_an_empty_folder_and_a_shells_output_are_fine(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.log").write_text("Steps:")
    (tmp_path / "run" / ".DS_Store").write_text("x")
    run_it(settings, max_train_steps=1)
    assert (tmp_path / "run" / "train.log").read_text() == "Steps:"


def test_overwrite_and_resume_contradict_each_other(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="--overwrite starts over"):
        Recipe(**settings, overwrite=True, resume_from_checkpoint="latest")


# ---------------------------------------------------------------------------------- changed settings


def test_every_setting_is_classified() -> None:
    effects = {name: on_resume(name) for name in Recipe.model_fields}
    assert set(effects.values()) == set(get_args(OnResume))
    never_saved = {name for name in NOT_OF_THE_RUN if effects[name] != "free"}
    assert never_saved == set()


CHANGES: list[tuple[str, Any, str]] = [
    ("optimizer", "sgd", "--optimizer is sgd and was adamw"),
    ("use_ema", True, "--use_ema is True and was False"),
    ("streaming", True, "--streaming is True and was False"),
    ("prediction_type", "v_prediction", "--prediction_type is v_prediction and was epsilon"),
]


@pytest.mark.parametrize(("name", "value", "words"), CHANGES)
def test_what_would_break_is_refused(
    settings: dict[str, Any], tmp_path: Path, name: str, value: Any, words: str
) -> None:
    train(settings, max_train_steps=1)
    with pytest.raises(RecipeError, match=re.escape(words)) as error:
        train(settings, **{name: value}, max_train_steps=2, resume_from_checkpoint="latest")
    assert "--overwrite" in str(error.value)
    assert "\n" not in str(error.value)


def test_8_bit_and_plain_adamw_do_not_mix(settings: dict[str, Any]) -> None:
    train(settings, max_train_steps=1)
    with pytest.raises(RecipeError, match="--optimizer is adamw8bit and was adamw"):
        train(settings, use_8bit_adam=True, resume_from_checkpoint="latest")
    train(settings, use_8bit_adam=True, max_train_steps=1)
    with pytest.raises(RecipeError, match="--optimizer is adamw and was adamw8bit"):
        train(settings, resume_from_checkpoint="latest")


def test_another_unet_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    train(settings, max_train_steps=1)
    other = build_tiny_pipeline(tmp_path / "other", unet_config={**UNET_CONFIG, "block_out_channels": [16, 32]})
    with pytest.raises(RecipeError, match=r"the unet of .*other .* differs from that of .*checkpoint-1"):
        train(settings, pretrained_model_name_or_path=str(other), resume_from_checkpoint="latest")


def test_what_changes_the_result_is_told_with_both_values(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(settings, max_train_steps=1, use_ema=True)
    model = shutil.copytree(settings["pretrained_model_name_or_path"], tmp_path / "moved-model")
    changes = {
        "learning_rate": 5e-4, "train_batch_size": 2, "resolution": 64, "random_flip": True, "use_ema": False,
        "max_train_steps": 2, "pretrained_model_name_or_path": str(model), "lr_scheduler": "cosine",
        "train_data_dir": str(build_image_folder(tmp_path / "others", num_images=6)),
    }  # fmt: skip
    caplog.clear()
    train(settings, **changes, resume_from_checkpoint="latest")
    told = [record.getMessage() for record in caplog.records if record.name == "sd_recipes.checkpoints.resume"]
    for words in (
        "--learning_rate is 0.0005 and was 0.001 in", "--resolution is 64 and was 32",
        "The learning rate's schedule is cosine over 2 steps and was constant in",
        "--use_ema is False and was True", "--random_flip is True and was False",
        "The global batch (--train_batch_size x --gradient_accumulation_steps x processes) is 2 and was 4",
        "others (6 rows", f"{settings['train_data_dir']} (8 rows",
        f"--pretrained_model_name_or_path is {model} and was {settings['pretrained_model_name_or_path']}",
    ):  # fmt: skip
        assert any(words in line for line in told), words
    assert len([line for line in told if " was " in line or " were " in line]) == 8, "nothing else"


def test_what_the_weights_do_not_depend_on_is_free(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uninterrupted = train(settings, output_dir=str(tmp_path / "uninterrupted"), max_train_steps=4)
    train(settings, max_train_steps=2)
    data = shutil.copytree(settings["train_data_dir"], tmp_path / "moved-data")
    caplog.clear()
    changes = {
        "train_data_dir": str(data), "max_train_steps": 4, "validation_prompts": ["a disc"],
        "validation_inference_steps": 1, "logging_steps": 2, "checkpointing_steps": 1, "dataloader_num_workers": 1,
        "gradient_accumulation_steps": 1, "check_data": "off",
    }  # fmt: skip
    resumed = train(settings, **changes, resume_from_checkpoint="latest")
    assert [
        r.getMessage() for r in caplog.records if r.name == "sd_recipes.checkpoints.resume" and r.levelname == "WARNING"
    ] == []
    assert_equal(weights(uninterrupted), weights(resumed))


@pytest.mark.parametrize(("before", "after", "steps"), [(2, 4, 12), (4, 2, 12)])
def test_defect_20_a_changed_batch_trains_as_many_epochs(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, before: int, after: int, steps: int
) -> None:
    """4 epochs of 8 rows in all, of which 2 are done: 8 steps of 2 and 4 of 4, or 4 of 4 and 8 of 2."""
    caplog.set_level("INFO")
    settings |= {"max_train_steps": None, "num_train_epochs": 4, "lr_scheduler": "cosine"}
    done = 8 if before == 2 else 4
    train(settings, train_batch_size=before, max_train_steps=done)
    training = train(settings, train_batch_size=after, resume_from_checkpoint="latest")
    assert training.num_steps == steps
    assert f"({8 // after} per epoch, 4 epochs)" in describe(training)
    lines = figures(tmp_path / "run")
    assert (lines[-1]["step"], lines[-1]["epoch"]) == (steps, 4)
    assert lines[done]["lr"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * (done + 1) / steps)) / 2)
    assert f"schedule is cosine over {steps} steps and was cosine over {done} steps in" in caplog.text
    caplog.clear()
    train(settings, train_batch_size=after, resume_from_checkpoint="latest")
    assert f"Nothing left to train: {steps} of {steps} steps are done. A larger --num_train_epochs" in caplog.text
    assert "schedule" not in caplog.text


def test_defect_21_buckets_are_dealt_out_once_an_epoch_though_the_batch_changes(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch of 2 becomes one of 3 after the first step, and goes on with 3 from a checkpoint of the same epoch."""
    for name, size, number in (("wide", (96, 32), 5), ("tall", (40, 80), 4)):
        build_image_folder(tmp_path / "shapes" / name, number, size)
        metadata = tmp_path / "shapes" / name / "metadata.jsonl"
        with (tmp_path / "shapes" / "metadata.jsonl").open("a") as file:
            file.write(metadata.read_text().replace('"file_name": "', f'"file_name": "{name}/'))
        metadata.unlink()
    met: list[int] = []
    build_batch = BatchBuilder.__getitem__
    monkeypatch.setattr(
        BatchBuilder, "__getitem__", lambda self, plan: met.extend(plan.rows.tolist()) or build_batch(self, plan)
    )
    settings |= {"train_data_dir": str(tmp_path / "shapes"), "aspect_ratio_buckets": True, "bucket_step": 8}
    settings |= {"max_train_steps": None, "num_train_epochs": 2}
    train(settings, train_batch_size=2, max_train_steps=1)
    caplog.clear()
    train(settings, train_batch_size=3, max_train_steps=3, resume_from_checkpoint="latest")
    assert "is 3 and was 2" in caplog.text
    assert "continues with the new one after this epoch, whose buckets are dealt out in batches of 2." in caplog.text
    assert 3 <= len(met) < 9
    caplog.clear()
    training = train(settings, train_batch_size=3, resume_from_checkpoint="latest")
    assert "global batch" not in caplog.text
    assert sorted(met[:9]) == sorted(met[9:]) == list(range(9))
    assert training.num_steps == 5 + 4, "5 batches of at most 2, and 4 of at most 3"


def test_defect_9_a_schedule_that_is_drawn_anew_is_told(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """However its length came to be another, and only where the rates depend on it."""
    settings |= {"max_train_steps": None, "num_train_epochs": 2}
    causes = [{"num_train_epochs": 3}, {"max_train_steps": 6}, {"train_batch_size": 2}, {"max_train_steps": 4}, {}]
    for scheduler in ("linear", "constant_with_warmup"):
        train(settings, lr_scheduler=scheduler, checkpointing_steps=2)
        for changes in causes:
            caplog.clear()
            run_it(settings, lr_scheduler=scheduler, resume_from_checkpoint="checkpoint-2", dry_run=True, **changes)
            told = [record.getMessage() for record in caplog.records if "schedule is" in record.getMessage()]
            assert len(told) == (scheduler == "linear" and changes in causes[:3])
            assert all("is linear over 6 steps and was linear over 4 steps in" in line for line in told)
            assert all(f"--{name}" in line for line in told for name in changes if name != "train_batch_size")
        shutil.rmtree(settings["output_dir"])


def test_defect_9_another_revision_of_the_frozen_parts_is_told(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The UNet is the checkpoint's, but the VAE and the text encoder are the new revision's."""
    train(settings, max_train_steps=1)
    run_it(settings, revision="other", dry_run=True)
    assert "--revision is other and was None in" in caplog.text


def test_a_changed_caption_is_other_data(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = shutil.copytree(settings["train_data_dir"], tmp_path / "data")
    train(settings, train_data_dir=str(data), max_train_steps=1)
    metadata = data / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("number 3", "number X"))
    train(settings, train_data_dir=str(data), max_train_steps=2, resume_from_checkpoint="latest")
    assert "The data are --train_data_dir" in caplog.text


def test_the_clock_may_jump_back(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a day between the parts of a run, with everything on that looks at a clock."""
    settings |= {
        "cache_latents": "disk", "center_crop": True, "checkpointing_minutes": 1000, "report_to": "tensorboard",
        "checkpoints_total_limit": 2,
    }  # fmt: skip
    run_it(settings, output_dir=str(tmp_path / "uninterrupted"), max_train_steps=4)
    now, now_ns = time.time, time.time_ns
    for step in (2, 3, 4):
        run_it(settings, max_train_steps=step)
        monkeypatch.setattr(time, "time", lambda days=step: now() - 86400 * days)
        monkeypatch.setattr(time, "time_ns", lambda days=step: now_ns() - 86400 * 10**9 * days)
        for path in (tmp_path / "run").rglob("*"):
            os.utime(path, (time.time(), time.time()))
    assert_same_checkpoint(tmp_path / "uninterrupted" / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-4"]
    assert [line["step"] for line in figures(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_mere_name_is_a_checkpoint_of_the_output_folder(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = train(settings, checkpointing_steps=2)
    train(settings, max_train_steps=2, seed=9, output_dir=str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = train(settings, checkpointing_steps=2, resume_from_checkpoint="checkpoint-2")
    assert_equal(weights(uninterrupted), weights(again))


# ------------------------------------------------------------------------------- one line of history


def names_in(out: Path, pattern: str = "*checkpoint*") -> list[str]:
    return sorted(path.name for path in out.glob(pattern))


def stop_at_once(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], **changes: Any) -> str:
    """The last words of a run that is asked to stop in its first step."""
    log = Tracker.log

    def log_and_stop(tracker: Tracker, figures: dict[str, float], step: int) -> None:
        log(tracker, figures, step)
        stop_request.reason = "SIGTERM"

    with monkeypatch.context() as patch:
        patch.setattr(stop_request, "reason", None)
        patch.setattr(Tracker, "log", log_and_stop)
        with pytest.raises(Stopped) as stopped:
            run_it(settings, **changes)
    return str(stopped.value)


def test_defect_2_a_run_that_goes_back_has_one_line_of_history(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Back from 5 to 2 with another learning rate, stopped at 3, and on by the printed command: to the same bits."""
    settings |= {"max_train_steps": 5, "checkpointing_steps": 1}
    out, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    run_it(settings)
    shutil.copytree(out, uninterrupted)
    run_it(settings, output_dir=str(uninterrupted), learning_rate=5e-4, resume_from_checkpoint="checkpoint-2")
    abandoned = saved_tensors(out / "checkpoint-5")
    caplog.clear()
    caplog.set_level("INFO")
    again = {**settings, "learning_rate": 5e-4, "checkpoints_total_limit": 2}
    words = stop_at_once(monkeypatch, again, resume_from_checkpoint="checkpoint-2")
    assert "saved at step 3; the same command with --resume_from_checkpoint latest resumes from there" in words
    set_aside = [f"checkpoint-{step}.abandoned" for step in (3, 4, 5)]
    assert names_in(out) == sorted(["checkpoint-2", "checkpoint-3", *set_aside]), "the limit is the new line's"
    told = [record.getMessage() for record in caplog.records if ".abandoned" in record.getMessage()]
    assert len(told) == 1
    assert f"from {out / 'checkpoint-2'}, and these in {out} did not lead up to it: checkpoint-5 -> " in told[0]
    caplog.clear()
    run_it(again, resume_from_checkpoint="latest")
    assert f"Resuming from {out / 'checkpoint-3'}" in caplog.text
    assert "abandoned" not in caplog.text
    assert names_in(out) == sorted(["checkpoint-4", "checkpoint-5", *set_aside])
    assert_same_checkpoint(uninterrupted / "checkpoint-5", out / "checkpoint-5")
    assert figures(out) == figures(uninterrupted)

    run_it(again, resume_from_checkpoint="checkpoint-4")
    assert names_in(out, "checkpoint-5*") == ["checkpoint-5", "checkpoint-5.abandoned", "checkpoint-5.abandoned-2"]
    run_it(settings, resume_from_checkpoint="checkpoint-5.abandoned")
    assert_equal(saved_tensors(out / "checkpoint-5.abandoned"), abandoned)
    run_it(settings, overwrite=True, max_train_steps=1)
    assert names_in(out) == ["checkpoint-1"]


def test_defect_2_a_kill_while_setting_aside_leaves_a_line(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each of the three renames, by repetitions of the command that goes back; the last is not."""
    out = tmp_path / "run"
    train(settings, checkpointing_steps=1)
    before = figures(out)
    allowed, replace = 0, os.replace

    def killed(source: Path, target: Path) -> None:
        nonlocal allowed
        if ".abandoned" in str(target):
            allowed -= 1
            if allowed < 0:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    for left in (4, 3, 2):
        with pytest.raises(KeyboardInterrupt):
            train(settings, resume_from_checkpoint="checkpoint-1")
        assert figures(out) == before, "the curve is cut after the checkpoints"
        assert [path.name for path in list_checkpoints(out)] == [f"checkpoint-{n}" for n in range(1, left + 1)]
        allowed = 1
    train(settings, checkpointing_steps=1, resume_from_checkpoint="checkpoint-1")
    assert [path.name for path in list_checkpoints(out)] == [f"checkpoint-{n}" for n in range(1, 5)]
    assert names_in(out, "*.abandoned*") == [f"checkpoint-{n}.abandoned" for n in (2, 3, 4)]
    assert figures(out) == before


def test_defect_2_a_damaged_newest_one_does_not_outlive_whole_ones(settings: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_it(settings, checkpointing_steps=2)
    os.truncate(out / "checkpoint-4" / OPTIMIZER, 10)
    run_it(settings, max_train_steps=3, checkpoints_total_limit=2)
    assert names_in(out) == ["checkpoint-2", "checkpoint-3", "checkpoint-4.abandoned"]


def test_defect_2_another_folders_checkpoint_begins_a_line_of_its_own(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that the folder held led up to it: neither the earlier checkpoints nor the curve."""
    out, other = tmp_path / "run", tmp_path / "other"
    settings |= {"checkpointing_steps": 1, "max_train_steps": 3}
    run_it(settings, seed=9)
    run_it(settings, output_dir=str(other))
    other_files = {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    named = {"resume_from_checkpoint": str(other / "checkpoint-2")}
    words = stop_at_once(monkeypatch, settings, **named)
    assert "saved at step 3; the same command with --resume_from_checkpoint latest resumes" in words
    aside = ["checkpoint-1.abandoned", "checkpoint-2.abandoned", "checkpoint-3.abandoned"]
    assert names_in(out) == sorted(["checkpoint-3", *aside])
    assert [line["step"] for line in figures(out)] == [3]
    assert len((out / "metrics.jsonl.abandoned").read_text().splitlines()) == 3
    assert other_files == {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    assert_same_checkpoint(other / "checkpoint-3", out / "checkpoint-3")


def test_defect_2_advice_names_the_checkpoint_that_is_gone_on_from(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is saved, when the pipeline cannot be written, and when no checkpoint could be."""
    run_it(settings, max_train_steps=3, checkpointing_steps=1)
    named = {"resume_from_checkpoint": "checkpoint-1", "max_train_steps": 2}
    monkeypatch.setattr(stop_request, "reason", "SIGTERM")
    with pytest.raises(Stopped, match="before its first step; the same command resumes from there"):
        run_it(settings, **named)
    assert names_in(tmp_path / "run") == ["checkpoint-1", "checkpoint-2", "checkpoint-3"], "it had not begun"
    monkeypatch.setattr(stop_request, "reason", None)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sd_recipes.commands.train.export_trained", full)
    for changes, resume_command in (
        (named, "with --resume_from_checkpoint latest resumes from checkpoint-2"),
        ({"overwrite": True, "max_train_steps": 2}, "without --overwrite resumes from checkpoint-2"),
    ):
        with pytest.raises(NotSaved, match=f"make room, and the same command {resume_command}"):
            run_it(settings, **changes)
    monkeypatch.setattr("sd_recipes.checkpoints.saver.write_checkpoint", full)
    source = str(shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "copy"))
    with pytest.raises(NotSaved, match=f"make room, and the same command resumes from {source}"):
        run_it(settings, resume_from_checkpoint=source)


# --------------------------------------------------------------------------------------- the trackers


def test_tensorboards_curve_goes_on_without_repeats(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"report_to": "tensorboard", "checkpointing_steps": 3, "max_train_steps": 8}
    out = tmp_path / "run"
    run_it(settings, max_train_steps=5)
    shutil.rmtree(out / "checkpoint-5")  # it was killed after step 5, and steps 4 and 5 are made again
    run_it(settings)
    events = EventAccumulator(str(out / "logs" / "text2image-fine-tune"))
    events.Reload()
    curve = events.Scalars("train_loss")
    assert [event.step for event in curve] == list(range(1, 9))
    assert [event.value for event in curve] == pytest.approx([line["train_loss"] for line in figures(out)])
    assert losses_of(run_quietly(settings, tmp_path)) == losses_of(out)


def run_quietly(settings: dict[str, Any], tmp_path: Path) -> Path:
    run_it(settings, output_dir=str(tmp_path / "uninterrupted"), report_to="none")
    return tmp_path / "uninterrupted"


def losses_of(out: Path) -> list[float]:
    return [line["train_loss"] for line in figures(out)]


def test_a_validation_that_was_missed_is_made(settings: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint comes before the validation of its step; killed between them, the run validates first."""
    settings |= {
        "validation_prompts": ["a disc"], "validation_inference_steps": 1, "validation_steps": 2,
        "checkpointing_steps": 2,
    }  # fmt: skip
    out = tmp_path / "run"
    train(settings, max_train_steps=2)
    picture = out / "samples" / "step-000002.png"
    drawn = picture.read_bytes()
    picture.unlink()
    train(settings, resume_from_checkpoint="latest")
    assert picture.read_bytes() == drawn
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]
    made = (out / "samples" / "step-000004.png").stat().st_mtime_ns
    train(settings, resume_from_checkpoint="latest")
    assert (out / "samples" / "step-000004.png").stat().st_mtime_ns == made, "and only one that was missed"


# ------------------------------------------------------------------------------------------ one owner


def test_a_second_run_in_a_folder_is_refused_by_name(settings: dict[str, Any]) -> None:
    with (
        output_dir_lock(Recipe(**settings), is_main=True),
        pytest.raises(RecipeError, match=rf"is in use by process {os.getpid()} on .* since 2.*: wait for it, stop it"),
    ):
        run_it(settings)
    run_it(settings, max_train_steps=1)


HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1] + "/.lock")
lock.acquire()
import json, os, socket
open(sys.argv[1] + "/.owner.json", "w").write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_dead_run_is_none(settings: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(RecipeError, match=f"in use by process {holder.pid}"),
        output_dir_lock(Recipe(**settings), is_main=True),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    with output_dir_lock(Recipe(**settings), is_main=True):
        assert json.loads((out / ".owner.json").read_text())["pid"] == os.getpid()
    assert time.monotonic() - started < 2
    assert not (out / ".owner.json").exists()
    holder.stdout.close()


def test_a_forked_loader_worker_does_not_keep_the_lock(settings: dict[str, Any], tmp_path: Path) -> None:
    with output_dir_lock(Recipe(**settings), is_main=True):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        with output_dir_lock(Recipe(**settings), is_main=True):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_dry_run_says_what_the_run_would(settings: dict[str, Any]) -> None:
    run_it(settings, max_train_steps=1)
    with pytest.raises(RecipeError, match="--optimizer is sgd and was adamw"):
        run_it(settings, dry_run=True, optimizer="sgd")


def test_dry_run_touches_no_run(settings: dict[str, Any], tmp_path: Path) -> None:
    run_it(settings, max_train_steps=1)
    before = tree(tmp_path / "run")
    run_it(settings, dry_run=True, overwrite=True)
    assert tree(tmp_path / "run") == before
    assert read_manifest(tmp_path / "run" / "checkpoint-1").files[OPTIMIZER].size > 0


def tree(folder: Path) -> dict[Path, int]:
    """Everything in a folder, itself included, with its time of change."""
    return {path: path.lstat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


@pytest.fixture
def with_a_bad_row(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings under which a start has everything to write: a bad row, a cache on disk, trackers, an average."""
    data = build_image_folder(tmp_path / "data", num_images=9)
    (data / "3.png").write_bytes(b"no picture")
    cached = {"cache_latents": "disk", "latent_cache_dir": str(tmp_path / "cache"), "center_crop": True}
    return settings | cached | {"train_data_dir": str(data), "report_to": "tensorboard", "use_ema": True}


def test_defect_32_dry_run_makes_no_folder(
    with_a_bad_row: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = tree(tmp_path)
    run_it(with_a_bad_row, dry_run=True, output_dir=str(tmp_path / "new" / "run"))
    run_it(with_a_bad_row, dry_run=True, cache_latents="memory", output_dir=str(tmp_path / "new" / "run"))
    assert "row 3" in caplog.text, "it says what it finds"
    assert tree(tmp_path) == before


def test_defect_32_dry_run_changes_nothing_in_a_run_that_another_owns(
    with_a_bad_row: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run_it(with_a_bad_row, max_train_steps=2, checkpointing_steps=1)
    (out / "bad_rows.jsonl").unlink()
    with output_dir_lock(Recipe(**with_a_bad_row), is_main=True):
        (out / ".checkpoint-3.partial").mkdir()  # which the other run is writing
        before = tree(tmp_path)
        run_it(with_a_bad_row, dry_run=True)
        assert tree(tmp_path) == before
        assert f"resumes from         {out / 'checkpoint-2'}" in capsys.readouterr().out
        run_it(with_a_bad_row, dry_run=True, resume_from_checkpoint="checkpoint-1")
        assert f"These did not lead up to {out / 'checkpoint-1'} and would be set aside: checkpoint-2." in caplog.text
        assert tree(tmp_path) == before


def test_defect_32_dry_run_says_what_the_run_would_of_an_output_dir(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/run"):
        with pytest.raises(RecipeError, match=r"--output_dir .* cannot be written: .*file is not a folder"):
            run_it(settings, dry_run=True, output_dir=str(tmp_path / place))
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for another than root
    with pytest.raises(RecipeError, match=rf"cannot be written: no permission to write to {tmp_path}, or a read-only"):
        run_it(settings, dry_run=True)


def test_defect_32_dry_run_refuses_what_the_run_would(settings: dict[str, Any], tmp_path: Path) -> None:
    """Also what is known only when the model is loaded."""
    train(settings, max_train_steps=1)
    other = build_tiny_pipeline(tmp_path / "other", unet_config={**UNET_CONFIG, "block_out_channels": [16, 32]})
    with pytest.raises(RecipeError, match=r"the unet of .*other .* differs from that of .*checkpoint-1"):
        run_it(settings, dry_run=True, pretrained_model_name_or_path=str(other))
