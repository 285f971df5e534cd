"""The best weights: kept, exported, made again after a kill; and runs that stop early."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from training_runs import assert_equal, build, fit_from, losses, train, weights

from sd_recipes.checkpoints.best import list_best
from sd_recipes.checkpoints.format import list_checkpoints, step_of
from sd_recipes.commands.train import run
from sd_recipes.errors import RunError
from sd_recipes.evaluation import validation
from sd_recipes.evaluation.figures import best_of, held_out_losses
from sd_recipes.evaluation.sample_errors import read_table
from sd_recipes.evaluation.validation import Validator
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import forget_accelerator
from sd_recipes.runtime.trackers import list_tables, read_metrics

LOSSES = [9.0, 3.0, 2.0, 1.0, 1.5, 1.0, 3.0, 4.0, 5.0]  # held-out, by step


@pytest.fixture
def spoilt(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a run of 8 steps whose held-out loss is lowest at step 3, and at step 5."""
    figures_of, of_validator, steps = validation.figures_of, Validator._figures, [0]

    def noted(validator: Validator, table: Any, step: int, metrics: Path) -> dict[str, float]:
        steps.append(step)
        return of_validator(validator, table, step, metrics)

    def replaced(*arguments: Any) -> dict[str, float]:
        return figures_of(*arguments) | {"validation_loss": LOSSES[steps[-1]]}

    monkeypatch.setattr(Validator, "_figures", noted)
    monkeypatch.setattr(validation, "figures_of", replaced)
    return settings | {"validation_split": "2", "validation_steps": 1, "max_train_steps": 8, "train_batch_size": 2}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "metrics.jsonl")


def test_the_best_weights_are_kept_once_and_exported_if_asked_for(spoilt: dict[str, Any]) -> None:
    folder = Path(spoilt["output_dir"])
    forget_accelerator()
    run(Recipe(**spoilt, use_ema=True, export="best", checkpointing_steps=2))
    best = best_of(held_out_losses(lines_of(folder)))
    assert best is not None
    assert best.step == 3, "the first of two equal ones"
    assert [line["best_step"] for line in lines_of(folder) if "best_step" in line] == [1, 2, 3, 3, 3, 3, 3, 3]
    assert [step_of(path) for path in list_best(folder)] == [3]
    about = json.loads((folder / "best" / "step-3" / "state.json").read_text())
    assert about == {"step": 3, "validation_loss": 1.0, "averaged": True}
    kept = UNet2DConditionModel.from_pretrained(folder / "best" / "step-3" / "unet").state_dict()
    exported = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    assert_equal(kept, exported)
    end = UNet2DConditionModel.from_pretrained(folder / "checkpoint-8" / "unet_ema").state_dict()
    assert any(not torch.equal(kept[name], end[name]) for name in kept), "not the last ones"


@pytest.mark.slow
def test_a_killed_run_keeps_the_best_that_its_checkpoint_knows(spoilt: dict[str, Any]) -> None:
    """Killed after step 3, the best, with a checkpoint of step 2: what was best then is still there."""
    folder = Path(spoilt["output_dir"])
    train(spoilt, max_train_steps=3, checkpointing_steps=2, lr_scheduler="constant")
    shutil.rmtree(folder / "checkpoint-3")  # as if killed before its end
    assert [step_of(path) for path in list_best(folder)] == [3]
    resumed = build(spoilt, checkpointing_steps=2, resume_from_checkpoint="latest")
    fit_from(resumed)
    assert [step_of(path) for path in list_best(folder)] == [3], "made again"
    whole = train(spoilt, output_dir=f"{folder}-whole", checkpointing_steps=2)
    assert losses(whole) == losses(resumed)
    assert_equal(
        load_file(folder / "best" / "step-3" / "unet" / "diffusion_pytorch_model.safetensors"),
        load_file(Path(f"{folder}-whole") / "best" / "step-3" / "unet" / "diffusion_pytorch_model.safetensors"),
    )


def test_best_weights_that_a_kill_kept_from_being_written_are_made_up_for(spoilt: dict[str, Any]) -> None:
    """Killed after the figure was logged and the checkpoint of the same step was written."""
    folder = Path(spoilt["output_dir"])
    train(spoilt, max_train_steps=3)
    shutil.rmtree(folder / "best" / "step-3")
    fit_from(build(spoilt, max_train_steps=3, resume_from_checkpoint="latest"))
    assert [step_of(path) for path in list_best(folder)] == [3]


def test_a_page_that_cannot_be_written_ends_no_run(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    (Path(settings["output_dir"]) / "report.html").mkdir(parents=True)
    train(settings, validation_split="2", max_train_steps=2)
    assert "The run's page cannot be written (IsADirectoryError" in caplog.text


def test_until_a_checkpoint_has_come_the_best_before_it_stays(spoilt: dict[str, Any]) -> None:
    folder = Path(spoilt["output_dir"])
    seen: list[list[int]] = []
    from sd_recipes.checkpoints import best as module

    prune = module._prune

    def noted(output_dir: Path) -> None:
        prune(output_dir)
        seen.append([step_of(path) for path in list_best(output_dir)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_prune", noted)
        train(spoilt, max_train_steps=4, checkpointing_steps=1000)
    assert seen == [[1], [2], [3], [3]]
    assert [step_of(path) for path in list_checkpoints(folder)] == [4]


def test_a_run_stops_early_and_the_same_command_does_nothing_more(
    spoilt: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(spoilt["output_dir"])
    with caplog.at_level(logging.INFO):
        stopped = train(spoilt, early_stopping=3)
    assert "Stopping early at step 6: the last 3 validations were no better than that of step 3" in caplog.text
    assert [step_of(path) for path in list_checkpoints(folder)] == [6]
    assert max(line["step"] for line in lines_of(folder)) == 6
    again = build(spoilt, early_stopping=3, resume_from_checkpoint="latest")
    fit_from(again)
    assert_equal(weights(stopped), weights(again))
    assert max(line["step"] for line in lines_of(folder)) == 6
    longer = build(spoilt, early_stopping=9, resume_from_checkpoint="latest")
    fit_from(longer)
    assert max(line["step"] for line in lines_of(folder)) == 8


def test_a_full_disk_keeps_no_best_weights_and_ends_no_run(
    spoilt: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sd_recipes.checkpoints.best.write_folder", full)
    forget_accelerator()
    run(Recipe(**spoilt, export="best"))
    assert caplog.text.count("the best so far, cannot be kept") == 3
    assert "--export best: the weights of the best step, 3, are not in" in caplog.text
    assert_equal(
        UNet2DConditionModel.from_pretrained(Path(spoilt["output_dir"]) / "unet").state_dict(),
        UNet2DConditionModel.from_pretrained(Path(spoilt["output_dir"]) / "checkpoint-8" / "unet").state_dict(),
    )


def test_damaged_best_weights_are_told(spoilt: dict[str, Any]) -> None:
    folder = Path(spoilt["output_dir"])
    train(spoilt)
    file = folder / "best" / "step-3" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    forget_accelerator()
    with pytest.raises(RunError, match=r"--export best: .*step-3 cannot be read \(unet/.* is not as it was written\)"):
        run(Recipe(**spoilt, export="best"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"early_stopping": 2}, "--early_stopping 2 goes by the held-out loss: give --validation_split"),
        ({"export": "best"}, "--export best goes by the held-out loss: give --validation_split"),
        ({"export": "best", "validation_split": "0.1", "keep_best": False}, "drop --no-keep_best"),
    ],
)
def test_settings_that_need_a_held_out_loss(settings: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe(**settings | changes)


def test_validation_on_or_off_leaves_the_weights_alone_to_the_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"validation_split": str(settings["train_data_dir"]), "use_ema": True}
    validated = train(settings, validation_steps=1, output_dir=str(tmp_path / "on"))
    silent = train(settings | {"validation_split": None}, output_dir=str(tmp_path / "off"))
    assert_equal(weights(validated), weights(silent))
    tables = list_tables(tmp_path / "on")
    assert [path.name for path in tables] == [f"step-{step:06d}.parquet" for step in range(5)]
    first, last = read_table(tables[0]), read_table(tables[-1])
    for name in ("set", "weights", "row", "timestep"):
        assert first[name].equals(last[name]), "the same samples"
    assert set(zip(first["set"].to_pylist(), first["weights"].to_pylist(), strict=True)) == {
        (which, kind) for which in ("held_out", "train") for kind in ("averaged", "raw")
    }
