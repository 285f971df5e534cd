"""Steps whose numbers are not finite are skipped, and told with their rows; so are steps whose loss leaps."""

from __future__ import annotations

import errno
import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from launching import finish, flags_of, start, torchrun
from safetensors.torch import load_file
from test_format_and_saver import train_scaled
from test_loop import build_poisoned
from test_resume import run_it
from training_runs import assert_equal, average, build, fit_from, losses, train, weights

from sd_recipes.checkpoints.format import list_checkpoints
from sd_recipes.runtime.trackers import read_incidents, read_metrics
from sd_recipes.training.build_parts import UNET_WEIGHTS
from sd_recipes.training.finite import TrainingDiverged, are_finite
from sd_recipes.training.loop import backward, update
from sd_recipes.training.run import Run


def incidents(folder: Path) -> list[dict[str, Any]]:
    return read_incidents(folder / "incidents.jsonl")


def rows_of_step(run: Run, number: int) -> list[str]:
    """The names of the rows of a run's global batch, the first one being number 1."""
    assert run.data.order is not None
    batches = run.data.order.batches_from(0)
    rows = [next(batches).rows.tolist() for _ in range(number)][-1]
    assert run.data.rows is not None
    return [f"row {row} ({run.data.rows[row]['image']['path']})" for row in rows]


# ---------------------------------------------------------------------------------------- not finite


def test_a_step_that_is_not_finite_leaves_all_but_the_position(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"lr_scheduler": "cosine", "use_ema": True, "checkpointing_steps": 1, "max_train_steps": 3}
    run = build_poisoned(settings, {3})
    fit_from(run)
    before, after = (tmp_path / "run" / f"checkpoint-{step}" for step in (2, 3))
    for file in before.rglob("*.safetensors"):
        assert_equal(load_file(file), load_file(after / file.relative_to(before)))
    then, now = (json.loads((path / "state.json").read_text()) for path in (before, after))
    assert {name for name in then if then[name] != now[name]} == {"progress"}
    assert now["progress"]["samples_seen"] == then["progress"]["samples_seen"] + 4
    assert run.state.schedule.last_epoch == average(run).num_updates == 2
    lines = read_metrics(run.tracker.path)
    assert ["train_loss" in line for line in lines] == ["grad_norm" in line for line in lines]
    assert ["train_loss" in line for line in lines] == [True, True, False]
    (incident,) = incidents(tmp_path / "run")
    assert incident == {
        "step": 3, "kind": "skipped", "rows": rows_of_step(run, 3), "grad_norm": "nan", "loss_not_finite": []
    }  # fmt: skip


def spoil_caption_of(run: Run, caption: str) -> None:
    """Its states become NaN, whenever it comes."""
    (ids,) = run.model.family.tokenize([run.model.components.tokenizer], [caption], run.recipe)
    encode: Callable[[torch.Tensor], Any] = run.model.encode_text

    def spoiled(input_ids: torch.Tensor) -> Any:
        spoils = (input_ids == ids).all(dim=1)
        return {
            name: states.masked_fill(spoils[:, None, None], torch.nan) for name, states in encode(input_ids).items()
        }

    run.model.encode_text = spoiled


@pytest.mark.parametrize("by_error", [False, True])
def test_a_row_whose_loss_is_not_finite_is_named_and_no_other_figure_has_it(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, by_error: bool
) -> None:
    """Twice, in two epochs; the mean over both has neither."""
    caplog.set_level(logging.WARNING)
    settings |= {"train_batch_size": 2, "max_train_steps": 8, "logging_steps": 100, "timesteps_by_error": by_error}
    run = build(settings)
    spoil_caption_of(run, "disc number 5")
    fit_from(run)
    found = incidents(tmp_path / "run")
    assert [len(each["rows"]) for each in found] == [2, 2]
    assert found[0]["step"] <= 4 < found[1]["step"]
    (name,) = {row for each in found for row in each["loss_not_finite"]}
    assert name == f"row 5 ({settings['train_data_dir']}/5.png)"
    assert caplog.text.count(f"the gradient's norm is nan, and the loss is not finite of {name}") == 2
    assert all(0 < loss < 3 for loss in losses(run))
    assert all(value.isfinite().all() for value in run.model.components.unet.parameters())
    if by_error:
        assert run.state.timestep_errors is not None
        assert run.state.timestep_errors.running.isfinite().all()


def test_a_skipped_step_teaches_the_timestep_errors_nothing(settings: dict[str, Any]) -> None:
    run = build_poisoned(settings | {"timesteps_by_error": True}, {2})
    errors = run.state.timestep_errors
    assert errors is not None
    for number, micro_batches in enumerate(run.batches(0, 2), 1):
        before = errors.running
        _, usable = backward(micro_batches, run.model, None, run.accelerator)
        update(run.state, run.accelerator, 1.0, usable)
        assert errors.of_step.sum() == 0
        assert torch.equal(errors.running, before) == (number == 2)


def test_so_many_in_a_row_end_the_run(settings: dict[str, Any], tmp_path: Path) -> None:
    """A row of two is not three. No checkpoint is from within a row, whose weights may be its cause."""
    settings |= {"max_train_steps": 12, "max_skipped_steps": 3, "checkpointing_steps": 2}
    run = build_poisoned(settings, {3, 4, 8, 9, 10})
    with pytest.raises(TrainingDiverged) as error:
        fit_from(run)
    path = tmp_path / "run" / "incidents.jsonl"
    assert str(error.value) == (
        "the gradient's norm is nan at step 10, which is not applied, like the 2 before it (--max_skipped_steps): "
        f"lower --learning_rate, or see to the rows in {path}; the same command then resumes from checkpoint-6"
    )
    assert [each.name for each in list_checkpoints(tmp_path / "run")] == [f"checkpoint-{step}" for step in (2, 5, 6)]
    assert [each["step"] for each in incidents(tmp_path / "run")] == [3, 4, 8, 9, 10]
    well = train(settings, resume_from_checkpoint="latest")
    assert well.state.progress.global_step == 12
    assert [each["step"] for each in incidents(tmp_path / "run")] == [3, 4]


def test_a_run_does_not_end_well_on_steps_that_were_skipped(settings: dict[str, Any], tmp_path: Path) -> None:
    """As after an update that broke the weights: that they are finite does not make them a model."""
    with pytest.raises(TrainingDiverged, match="like the 1 before it, and the run ends with it"):
        fit_from(build_poisoned(settings, {3, 4}))
    assert list_checkpoints(tmp_path / "run") == []


def test_a_run_that_resumes_within_a_row_counts_on(settings: dict[str, Any]) -> None:
    settings |= {"max_skipped_steps": 2}
    fit_from(build_poisoned(settings, {4}))
    more = settings | {"resume_from_checkpoint": "latest", "max_train_steps": 8}
    again = build_poisoned(more, {1})
    with pytest.raises(TrainingDiverged, match="at step 5, which is not applied, like the 1 before it"):
        fit_from(again)


@pytest.mark.slow
def test_two_processes_skip_alike_and_have_the_figures_of_one(settings: dict[str, Any], tmp_path: Path) -> None:
    """The second process's gradient is infinite at step 9, and its rows and the other's are written down."""
    settings |= {"train_batch_size": 8, "max_train_steps": 12, "optimizer": "sgd", "learning_rate": 0.01}
    one = build_poisoned(settings, {9})
    fit_from(one)
    out = tmp_path / "two"
    flags = flags_of(settings | {"output_dir": out, "train_batch_size": 2, "gradient_accumulation_steps": 2})
    # Its 17th and 18th micro-batch.
    finish(start(torchrun(2), *flags, script="tests/poisoned.py", POISONED_RANK="1", POISONED_STEPS="18"))
    for name, value in weights(one).items():
        found = load_file(out / "checkpoint-12" / "unet" / UNET_WEIGHTS)[name]
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6, msg=name)
    assert incidents(out) == incidents(tmp_path / "run")
    assert incidents(out)[0]["rows"] == rows_of_step(one, 9)
    lines, others = read_metrics(one.tracker.path), read_metrics(out / "metrics.jsonl")
    for key in ("train_loss", "quiet_loss"):
        assert [line["step"] for line in lines if key in line] == [line["step"] for line in others if key in line]
        expected = [line[key] for line in lines if key in line]
        assert len(expected) >= 6
        assert [line[key] for line in others if key in line] == pytest.approx(expected, rel=1e-4)


def test_the_loss_scalers_search_is_no_incident_but_a_gradient_that_no_scale_helps_is(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"optimizer": "sgd", "max_train_steps": 30, "logging_steps": 100}
    run = train_scaled(settings, set(range(1, 11)))
    assert run.state.schedule.last_epoch == 20
    assert not (tmp_path / "run" / "incidents.jsonl").exists()
    with pytest.raises(TrainingDiverged, match="which is not applied, like the 4 before it"):
        train_scaled(settings | {"output_dir": str(tmp_path / "never")}, set(range(1, 31)))
    # From 65536 to 1 in 16 halvings; the 17th leads below 1.
    assert [each["step"] for each in incidents(tmp_path / "never")] == [17, 18, 19, 20, 21]


# -------------------------------------------------------------------------------------------- spikes


def test_a_loss_that_leaps_is_told_with_its_rows(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The latents of one row are ten times too large, once, between two logs."""
    caplog.set_level(logging.WARNING)
    settings |= {"max_train_steps": 50, "logging_steps": 10, "checkpointing_steps": 15}
    run = build(settings, prediction_type="v_prediction")
    sample, calls = run.model.encoder.sample, []

    def with_a_huge_row(*arguments: Any) -> torch.Tensor:
        latents = sample(*arguments)
        calls.append(latents)
        if len(calls) == 44:
            latents[1] *= 10
        return latents

    run.model.encoder.sample = with_a_huge_row  # type: ignore[method-assign]
    fit_from(run)
    (incident,) = incidents(tmp_path / "run")
    assert (incident["kind"], incident["step"]) == ("spike", 44)
    assert incident["quiet_loss"] > 1.5 * incident["usual"] > 0
    (first, second, *_) = incident["rows"]
    assert first["row"] == rows_of_step(run, 44)[1]
    assert first["ratio"] > 4 > second["ratio"]
    assert len(incident["rows"]) == 4
    assert caplog.text.count("The loss leapt at step 44: quiet_loss") == 1
    assert f"at their timesteps: {first['row']} {first['ratio']:.3g} times, " in caplog.text

    # A run that goes on from before it has not met it.
    train(settings, resume_from_checkpoint="checkpoint-30", prediction_type="v_prediction")
    assert incidents(tmp_path / "run") == []


# ---------------------------------------------------------------------------------- incidents.jsonl


def test_incidents_follow_the_runs_history(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit_from(build_poisoned(settings, {1, 3}, checkpointing_steps=2))
    run_it(settings, resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert [each["step"] for each in incidents(folder)] == [1]
    # Of another folder's checkpoint: those here led up to something else.
    shutil.copytree(folder / "checkpoint-2", tmp_path / "elsewhere" / "checkpoint-2")
    run_it(settings, resume_from_checkpoint=str(tmp_path / "elsewhere" / "checkpoint-2"))
    assert not (folder / "incidents.jsonl").exists()
    assert [each["step"] for each in read_incidents(folder / "incidents.jsonl.abandoned")] == [1]
    (folder / "incidents.jsonl").write_text('{"step": 1, "kind": "skipped", "rows": []}\n')
    run_it(settings, overwrite=True)
    assert not list(folder.glob("incidents.jsonl*"))


def test_a_full_disk_costs_the_incident_and_not_the_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = Path.open

    def open_full(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "incidents.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_full)
    run = build_poisoned(settings, {2, 3})
    fit_from(run)
    assert run.state.progress.global_step == 4
    assert caplog.text.count(f"{tmp_path / 'run' / 'incidents.jsonl'} cannot be written") == 1
    assert caplog.text.count("is skipped: the gradient's norm is nan") == 2


def test_a_part_without_numbers_is_finite() -> None:
    """As a process has where there are fewer rows than processes."""
    accelerator = Accelerator(cpu=True)
    assert are_finite(accelerator, [torch.zeros(0, 4), torch.ones(3)])
    assert are_finite(accelerator, [torch.zeros(0, 4)])
    assert not are_finite(accelerator, [torch.zeros(0, 4), torch.tensor([1.0, math.nan])])
    assert not are_finite(accelerator, [torch.ones(3), torch.tensor([math.inf], dtype=torch.bfloat16)])
