"""The same command goes on: position, settings compared, the curve, the folder's owner."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import UNET_CONFIG, build_image_folder, build_tiny_pipeline
from training import assert_equal, forget_accelerator, train, weights

from sd_recipes.checkpoint import OPTIMIZER, STATE, UNET_WEIGHTS, list_checkpoints, read_manifest
from sd_recipes.flags import NOT_OF_THE_RUN, recipe_text
from sd_recipes.recipe import Recipe, RecipeError
from sd_recipes.resume import EFFECTS
from sd_recipes.run import run
from sd_recipes.run_folder import owned
from sd_recipes.signals import Stopped, stop_request
from sd_recipes.tracking import Tracker


def run_it(settings: dict[str, Any], **changes: Any) -> Recipe:
    """What the command does, in this process."""
    forget_accelerator()
    recipe = Recipe(**{**settings, **changes})
    run(recipe)
    return recipe


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
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("images_per_second", "data_wait")} for line in lines
    ]


# ---------------------------------------------------------------------------------- the same command


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd", "adafactor"])
def test_state_weights_and_curve_are_the_quiet_runs(settings: dict[str, Any], tmp_path: Path, optimizer: str) -> None:
    """Stopped at step 5, of a log of every 3 steps and in the middle of an epoch; all that is saved is the same."""
    settings |= {
        "optimizer": optimizer, "use_ema": True, "lr_scheduler": "cosine", "max_train_steps": 8, "train_batch_size": 3,
        "checkpointing_steps": 5, "random_flip": True, "caption_dropout": 0.3, "logging_steps": 3,
    }  # fmt: skip
    quiet, cut = tmp_path / "quiet", tmp_path / "cut"
    train(settings, output_dir=str(quiet))
    shutil.copytree(quiet, cut)
    shutil.rmtree(cut / "checkpoint-8")  # as if it had been killed after step 7, and its log
    train(settings, output_dir=str(cut), resume_from_checkpoint="latest")
    assert_same_checkpoint(quiet / "checkpoint-8", cut / "checkpoint-8")
    assert figures(cut) == figures(quiet)


def test_typing_it_again_continues_and_a_finished_run_trains_nothing(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    out = tmp_path / "run"
    del settings["seed"]
    first = run_it(settings, max_train_steps=3)
    assert first.seed is not None
    before = {path: path.stat().st_mtime_ns for path in (out / "checkpoint-3").rglob("*")}
    again = run_it(settings, max_train_steps=3)
    assert "Nothing left to train: 3 of 3 steps are done" in caplog.text
    assert "--overwrite" in caplog.text
    assert again.seed == first.seed, "the seed that was drawn is the run's"
    assert before == {path: path.stat().st_mtime_ns for path in (out / "checkpoint-3").rglob("*")}
    run_it(settings, max_train_steps=5)
    assert [line["step"] for line in figures(out)] == [1, 2, 3, 4, 5]
    run_it(settings, max_train_steps=5, seed=first.seed, output_dir=str(tmp_path / "quiet"))
    assert_same_checkpoint(tmp_path / "quiet" / "checkpoint-5", out / "checkpoint-5")
    assert_equal(load_file(tmp_path / "quiet" / "unet" / UNET_WEIGHTS), load_file(out / "unet" / UNET_WEIGHTS))


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
        ({}, "the same command goes on"),
        ({"overwrite": True}, "the same command without --overwrite goes on"),
        ({"resume_from_checkpoint": "checkpoint-1"}, "the same command with --resume_from_checkpoint latest goes on"),
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
    assert f"{out} has no checkpoint yet: the run starts anew" in caplog.text
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
    with pytest.raises(ValueError, match="--overwrite starts anew"):
        Recipe(**settings, overwrite=True, resume_from_checkpoint="latest")


# ---------------------------------------------------------------------------------- changed settings


def test_every_setting_is_classified() -> None:
    assert set(EFFECTS) == set(Recipe.model_fields)
    never_saved = {name for name in NOT_OF_THE_RUN if EFFECTS[name] != "free"}
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
    with pytest.raises(RecipeError, match=r"the UNet of .*other .* is another than that of .*checkpoint-1"):
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
    told = [record.getMessage() for record in caplog.records if record.name == "sd_recipes.resume"]
    for words in (
        "--learning_rate is 0.0005 and was 0.001 in", "--resolution is 64 and was 32",
        "--max_train_steps is 2 and was 1, by which the cosine schedule is drawn out anew",
        "--use_ema is False and was True", "--random_flip is True and was False",
        "The global batch (--train_batch_size x --gradient_accumulation_steps x processes) is 2 and was 4",
        "others (6 rows", f"{settings['train_data_dir']} (8 rows",
        f"--pretrained_model_name_or_path is {model} and was {settings['pretrained_model_name_or_path']}",
    ):  # fmt: skip
        assert any(words in line for line in told), words
    assert len([line for line in told if " was " in line or " were " in line]) == 9, "nothing else"


def test_what_the_weights_do_not_depend_on_is_free(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = train(settings, output_dir=str(tmp_path / "quiet"), max_train_steps=4)
    train(settings, max_train_steps=2)
    data = shutil.copytree(settings["train_data_dir"], tmp_path / "moved-data")
    caplog.clear()
    changes = {
        "train_data_dir": str(data), "max_train_steps": 4, "validation_prompts": ["a disc"],
        "validation_inference_steps": 1, "logging_steps": 2, "checkpointing_steps": 1, "dataloader_num_workers": 1,
        "gradient_accumulation_steps": 1, "check_data": "off",
    }  # fmt: skip
    resumed = train(settings, **changes, resume_from_checkpoint="latest")
    assert [r.getMessage() for r in caplog.records if r.name == "sd_recipes.resume" and r.levelname == "WARNING"] == []
    assert_equal(weights(quiet), weights(resumed))


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
    run_it(settings, output_dir=str(tmp_path / "quiet"), max_train_steps=4)
    now, now_ns = time.time, time.time_ns
    for step in (2, 3, 4):
        run_it(settings, max_train_steps=step)
        monkeypatch.setattr(time, "time", lambda days=step: now() - 86400 * days)
        monkeypatch.setattr(time, "time_ns", lambda days=step: now_ns() - 86400 * 10**9 * days)
        for path in (tmp_path / "run").rglob("*"):
            os.utime(path, (time.time(), time.time()))
    assert_same_checkpoint(tmp_path / "quiet" / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-4"]
    assert [line["step"] for line in figures(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_mere_name_is_a_checkpoint_of_the_output_folder(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = train(settings, checkpointing_steps=2)
    train(settings, max_train_steps=2, seed=9, output_dir=str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = train(settings, checkpointing_steps=2, resume_from_checkpoint="checkpoint-2")
    assert_equal(weights(quiet), weights(again))


def test_going_back_to_an_older_one_is_told(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = train(settings, checkpointing_steps=2)
    again = train(settings, checkpointing_steps=2, resume_from_checkpoint="checkpoint-2")
    assert f"{tmp_path}/run/checkpoint-4 is newer than" in caplog.text
    assert_equal(weights(quiet), weights(again))


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
    run_it(settings, output_dir=str(tmp_path / "quiet"), report_to="none")
    return tmp_path / "quiet"


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
        owned(Recipe(**settings), is_main=True),
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
    with pytest.raises(RecipeError, match=f"in use by process {holder.pid}"), owned(Recipe(**settings), is_main=True):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    with owned(Recipe(**settings), is_main=True):
        assert json.loads((out / ".owner.json").read_text())["pid"] == os.getpid()
    assert time.monotonic() - started < 2
    assert not (out / ".owner.json").exists()
    holder.stdout.close()


def test_a_forked_loader_worker_does_not_keep_the_lock(settings: dict[str, Any], tmp_path: Path) -> None:
    with owned(Recipe(**settings), is_main=True):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        with owned(Recipe(**settings), is_main=True):
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
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    run_it(settings, dry_run=True, overwrite=True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert read_manifest(tmp_path / "run" / "checkpoint-1").files[OPTIMIZER].size > 0
