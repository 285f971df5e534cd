"""Steps inside the backward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from poisoned import poison
from tiny_models import build_image_folder
from training_runs import assert_equal, average, build, fit_from, losses, train, weights

from sd_recipes.errors import RecipeError
from sd_recipes.flags import build_recipe
from sd_recipes.runtime.trackers import read_incidents
from sd_recipes.training.finite import TrainingDiverged
from sd_recipes.training.fused_backward import check_fused_backward

UNCLIPPED = {"max_grad_norm": 0, "max_train_steps": 2}
FUSED = {**UNCLIPPED, "fused_backward_pass": True}


@pytest.mark.parametrize("changes", [
    {"use_ema": True, "lr_scheduler": "linear"}, pytest.param({"optimizer": "adamw8bit"}, marks=pytest.mark.slow),
    {"mixed_precision": "bf16", "weights_dtype": "bf16", "optimizer": "sgd", "gradient_checkpointing": True},
])  # fmt: skip
def test_it_is_the_same_step(settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = train(settings, **UNCLIPPED, **changes, output_dir=str(tmp_path / "plain"))
    fused = train(settings, **FUSED, **changes)
    assert_equal(weights(plain), weights(fused))
    assert losses(plain) == losses(fused)
    assert plain.state.schedule.get_last_lr() == fused.state.schedule.get_last_lr()
    if "use_ema" in changes:
        assert_equal(average(plain).named_tensors(), average(fused).named_tensors())
        norms = [
            [json.loads(line)["grad_norm"] for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
            for run in (plain, fused)
        ]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_one_gradient_is_there_at_a_time(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(settings, **FUSED)
    optimizer, parameters = run.state.optimizer.optimizer, list(run.state.parameters.values())
    there: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: there.append(sum(each.grad is not None for each in parameters)))
    fit_from(run)
    assert there == [1] * 2 * len(parameters)
    assert all(each.grad is None for each in parameters)


def test_it_resumes_to_the_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    """The learning rate is the schedule's, also once the optimizer's groups were loaded."""
    settings |= {**FUSED, "max_train_steps": 4, "checkpointing_steps": 2, "lr_scheduler": "cosine"}
    whole = train(settings)
    again = train(settings, output_dir=str(tmp_path / "again"), resume_from_checkpoint=f"{tmp_path}/run/checkpoint-2")
    assert_equal(weights(whole), weights(again))


@pytest.mark.slow
def test_rows_that_cannot_be_used_leave_the_mean_over_the_others(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = build_image_folder(tmp_path / "pictures")
    sorted(folder.glob("*.png"))[3].write_bytes(b"")
    settings |= {"train_data_dir": str(folder), "train_batch_size": 8, "check_data": "off", "max_bad_rows": 8}
    plain = train(settings, **UNCLIPPED, optimizer="sgd", output_dir=str(tmp_path / "plain"))
    fused = train(settings, **FUSED, optimizer="sgd")
    torch.testing.assert_close(weights(plain), weights(fused), rtol=1e-5, atol=1e-7)
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    run = build(settings, **FUSED, output_dir=str(tmp_path / "none"), max_bad_rows=100)
    before = weights(run)
    fit_from(run)
    assert_equal(weights(run), before)


def test_a_gradient_that_is_not_finite_leaves_finite_weights_and_is_told(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run = build(settings, **{**FUSED, "max_train_steps": 3}, use_ema=True)
    poison(run, {2})
    fit_from(run)
    assert all(each.isfinite().all() for each in weights(run).values())
    assert run.state.schedule.last_epoch == average(run).num_updates == 2
    (incident,) = read_incidents(run.output_dir / "incidents.jsonl")
    assert incident["step"] == 2
    assert "Step 2 takes gradients that are not finite for 0" in caplog.text
    ended = build(settings, **FUSED, max_skipped_steps=0, output_dir=f"{settings['output_dir']}-ended")
    poison(ended, {2})
    with pytest.raises(TrainingDiverged, match="at step 2, which is applied without it: lower --learning_rate"):
        fit_from(ended)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, r"nothing can be clipped to it: add --max_grad_norm 0, or drop --fused_backward_pass"),
        ({**FUSED, "gradient_accumulation_steps": 2}, "use a larger --train_batch_size, or drop one"),
        ({**FUSED, "micro_batch": 2}, "which --micro_batch 2 divides: drop one"),
        ({**FUSED, "micro_batch": "auto"}, "which --micro_batch auto divides: drop one"),
    ],
)
def test_settings_that_it_does_not_go_with(settings: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build_recipe({**settings, "fused_backward_pass": True, **changes})


@pytest.mark.parametrize(
    ("num_micro_batches", "num_processes", "mixed_precision", "words"),
    [
        (2, 1, "no", "a global batch takes 2 of them: "),
        (1, 2, "no", "and there are 2: train on one process, "),
        (1, 1, "fp16", "use --mixed_precision bf16 or no, "),
    ],
)
def test_runs_that_it_does_not_go_with(
    num_micro_batches: int, num_processes: int, mixed_precision: str, words: str
) -> None:
    """One of a batch that was kept from more processes, of several, and with a loss scaler."""
    with pytest.raises(RecipeError, match=f"{words}.*or drop --fused_backward_pass"):
        check_fused_backward(num_processes, mixed_precision, num_micro_batches)
