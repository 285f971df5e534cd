"""Loss and gradient are means over the rows that could be used; a step without any leaves everything as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import finish, flags_of, start, torchrun
from safetensors.torch import load_file
from training_runs import assert_equal, average, build, fit_from, train, weights

from sd_recipes.training.build_parts import UNET_WEIGHTS
from sd_recipes.training.loop import backward, update
from sd_recipes.training.run import Run


@pytest.fixture
def settings(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in Path(settings["train_data_dir"]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return settings | {
        "train_data_dir": str(folder), "check_data": "off", "max_bad_rows": 8, "optimizer": "sgd",
        "learning_rate": 0.1, "use_ema": True,
    }  # fmt: skip


def spoil(settings: dict[str, Any], rows: set[int]) -> None:
    for row in rows:
        (Path(settings["train_data_dir"]) / f"{row}.png").write_bytes(b"\x89PNG garbage")


def rows_of_steps(settings: dict[str, Any], number: int) -> list[list[int]]:
    """The rows of the first global batches."""
    run = build(settings)
    assert run.data.order is not None
    batches = run.data.order.batches_from(0)
    return [next(batches).rows.tolist() for _ in range(number)]


def figures(settings: dict[str, Any]) -> list[dict[str, Any]]:
    lines = (Path(settings["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def gradients(run: Run) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in run.state.parameters.items() if each.grad is not None}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_gradient_is_the_mean_over_the_usable_rows(settings: dict[str, Any], accumulated: int) -> None:
    settings |= {"train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
    bad = rows_of_steps(settings, 1)[0][:3]
    spoil(settings, set(bad))
    run = build(settings)
    micro_batches = next(run.batches(0, 1))
    assert [int(batch.weights.count_nonzero()) for batch in micro_batches] == ([1] if accumulated == 1 else [0, 1])
    loss, usable = backward(micro_batches, run.model, run.store, run.accelerator)
    assert usable == 1 / 4
    norm = update(run.state, run.accelerator, 1e9, usable)

    alone = build(settings)
    micro_batch = micro_batches[-1]
    (number,) = micro_batch.weights.nonzero()[:, 0].tolist()
    latents = alone.model.encoder.sample(
        micro_batch.all_moments(alone.model.encoder.encode), micro_batch.posterior_noise
    )
    conditioning = alone.model.family.conditioning(alone.model.encode_text(micro_batch.input_ids), micro_batch)
    every = alone.model.objective(alone.model.unet, latents, conditioning, micro_batch.timesteps, micro_batch.noise)
    every[number].backward()
    assert loss.item() / usable == pytest.approx(every[number].item(), rel=1e-5)
    expected = torch.nn.utils.get_total_norm(list(gradients(alone).values()))
    assert norm == pytest.approx(expected.item(), rel=1e-4)


def test_the_logged_loss_is_the_mean_over_the_usable_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"max_train_steps": 1}
    bad = rows_of_steps(settings, 1)[0][1:]
    spoil(settings, set(bad))
    run = build(settings)
    (micro_batch,) = next(run.batches(0, 1))
    total = backward([micro_batch], run.model, None, run.accelerator)[0].item()
    train(settings)
    (line,) = [line for line in figures(settings) if "train_loss" in line]
    assert line["train_loss"] == pytest.approx(4 * total, rel=1e-5)
    assert line["bad_rows"] == 3


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_a_step_without_a_usable_row_changes_nothing_and_has_no_loss(
    settings: dict[str, Any], logging_steps: int
) -> None:
    settings |= {"max_train_steps": 2, "lr_scheduler": "linear", "logging_steps": logging_steps}
    first, second = rows_of_steps(settings, 2)
    spoil(settings, set(second))
    one = train(settings, max_train_steps=1, output_dir=settings["output_dir"] + "-one", lr_scheduler="constant")
    run = train(settings)
    assert_equal(weights(one), weights(run))
    assert_equal(average(one).named_tensors(), average(run).named_tensors())
    assert average(run).num_updates == run.state.schedule.last_epoch == 1
    progress = run.state.progress
    assert (progress.global_step, progress.samples_seen) == (2, 8)
    lines = figures(settings)
    assert [line["step"] for line in lines] == [1, 2]
    assert "train_loss" in lines[0]
    assert "train_loss" not in lines[1]
    assert "grad_norm" not in lines[1]
    assert lines[1]["bad_rows"] == len(set(second))
    assert first != second


def test_a_mean_over_several_steps_leaves_out_those_without_a_row(settings: dict[str, Any]) -> None:
    settings |= {"max_train_steps": 4, "logging_steps": 10}
    spoil(settings, set(rows_of_steps(settings, 2)[1]))
    train(settings | {"logging_steps": 1, "output_dir": settings["output_dir"] + "-each"})
    each = figures({"output_dir": settings["output_dir"] + "-each"})
    losses = [line["train_loss"] for line in each if "train_loss" in line]
    assert len(losses) < len(each) == 4
    train(settings)
    assert figures(settings)[-1]["train_loss"] == pytest.approx(sum(losses[1:]) / len(losses[1:]), rel=1e-6)


def test_a_resumed_run_knows_of_steps_without_a_row(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"max_train_steps": 4, "logging_steps": 10, "checkpointing_steps": 2}
    spoil(settings, set(rows_of_steps(settings, 2)[1]))
    whole = train(settings)
    resumed = train(
        settings, output_dir=str(tmp_path / "again"), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
    )
    assert_equal(weights(whole), weights(resumed))
    expected, found = figures(settings)[-1], figures({"output_dir": tmp_path / "again"})[-1]
    assert found["train_loss"] == expected["train_loss"]


def test_a_run_without_any_usable_row_has_no_curve_and_no_loss(settings: dict[str, Any]) -> None:
    spoil(settings, set(range(8)))
    before = weights(build(settings))
    run = build(settings)
    fit_from(run)
    assert_equal(weights(run), before)
    assert all("train_loss" not in line for line in figures(settings))


@pytest.mark.slow
def test_two_processes_divide_by_the_rows_of_both(settings: dict[str, Any], tmp_path: Path) -> None:
    """One of them has fewer usable rows than the other, and in one step none."""
    settings |= {"learning_rate": 0.01, "max_train_steps": 2, "max_grad_norm": 1e9}
    first = rows_of_steps(settings, 1)[0]
    spoil(settings, {first[0], first[2]})  # both rows of the first process, in the first step
    alone = train(settings, train_batch_size=4)
    flags = flags_of(settings | {"train_batch_size": 2, "output_dir": str(tmp_path / "two")})
    finish(start(torchrun(2), *flags))
    together = load_file(tmp_path / "two" / "checkpoint-2" / "unet" / UNET_WEIGHTS)
    for name, value in weights(alone).items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-6, msg=name)
    alone_losses, losses = (
        [line["train_loss"] for line in figures({"output_dir": folder})]
        for folder in (settings["output_dir"], tmp_path / "two")
    )
    assert losses == pytest.approx(alone_losses, rel=1e-5)
