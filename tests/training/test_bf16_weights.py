"""Weights in bfloat16, rounded stochastically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import assert_equal, assert_leaves_as_it_came, average, build, train, weights

from sd_recipes.commands.train import run
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import OptimConfig, Recipe
from sd_recipes.training import bf16_weights
from sd_recipes.training.bf16_weights import rounded
from sd_recipes.training.build_parts import UNET_WEIGHTS
from sd_recipes.training.optim import build_optimizer
from sd_recipes.training.state import TrainedPart

BF16 = {"mixed_precision": "bf16", "weights_dtype": "bf16"}


@pytest.mark.parametrize("value", [1.001, -1.001, 0.9999, 3e-39, 255.7, 1.0])
def test_a_number_becomes_one_of_its_neighbours_and_itself_on_average(value: float) -> None:
    values = torch.full((100_000,), value)
    exact = values[0].item()
    found = rounded(values, torch.Generator().manual_seed(0))
    assert torch.equal(found, found.bfloat16().float())
    ends = sorted(set(found.tolist()))
    gap = ends[-1] - ends[0]
    if value == 1.0:
        assert ends == [1.0]
        return
    assert len(ends) == 2
    above = torch.nextafter(torch.tensor(ends[0]).bfloat16(), torch.tensor(torch.inf).bfloat16())
    assert above.item() == ends[1], "no bfloat16 lies between them"
    # Five standard deviations of the mean of coin throws.
    assert abs(found.double().mean().item() - exact) < 5 * 0.5 * gap / 100_000**0.5


def test_what_is_not_finite_stays_so_and_what_is_too_large_overflows() -> None:
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0]).repeat(1000, 1)
    found = rounded(values.clone(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, values, equal_nan=True, rtol=0, atol=0)
    largest = torch.full((1000,), torch.finfo(torch.float32).max)
    assert torch.inf in set(rounded(largest, torch.Generator().manual_seed(0)).tolist())


def optimizer_of(module: torch.nn.Module, config: OptimConfig, step: list[int]) -> Any:
    part = TrainedPart("it", module, "model.safetensors", "{}", config.learning_rate)
    return build_optimizer([part], config, fused=True, seed=3, step_number=lambda: step[0])


def descend(config: OptimConfig, steps: int) -> torch.Tensor:
    """A layer's bfloat16 weights, which begin at 1, after steps with the gradient 1."""
    module = torch.nn.Linear(100, 100).bfloat16()
    torch.nn.init.ones_(module.weight)
    step = [0]
    optimizer = optimizer_of(module, config, step)
    for step[0] in range(steps):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in module.parameters())
    return module.weight.detach()


def test_updates_below_half_of_the_last_bit_are_made_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD by 1e-4, of which bfloat16 between 1/2 and 1 has steps of 4e-3."""
    config = OptimConfig(optimizer="sgd", learning_rate=1e-4, sgd_momentum=0.0, adam_weight_decay=0.0)
    assert descend(config, 50).double().mean().item() == pytest.approx(1 - 50e-4, abs=5e-4)
    monkeypatch.setattr(bf16_weights, "rounded", lambda values, generator: values)
    assert descend(config, 50).unique().tolist() == [1.0], "rounded to the nearest"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor", "adamw8bit"])
def test_the_rounding_depends_on_seed_step_and_parameter_alone(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = OptimConfig(optimizer=optimizer, learning_rate=1e-3)
    found = descend(config, 5)
    assert torch.equal(found, descend(config, 5))
    monkeypatch.setattr(bf16_weights, "CHUNK_BYTES", 1)
    assert torch.equal(found, descend(config, 5)), "however many are updated at a time"


def test_a_run_resumes_to_the_bit_with_its_state_and_averages_in_float32(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {**BF16, "use_ema": True, "max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 3}
    whole = train(settings, output_dir=str(tmp_path / "whole"))
    assert {each.dtype for each in whole.state.parameters.values()} == {torch.bfloat16}
    folder = tmp_path / "whole" / "checkpoint-2"
    assert {each.dtype for each in load_file(folder / "unet" / UNET_WEIGHTS).values()} == {torch.bfloat16}
    for name in ("optimizer.safetensors", f"unet_ema/{UNET_WEIGHTS}"):
        assert {each.dtype for each in load_file(folder / name).values()} == {torch.float32}
    resumed = train(settings, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(folder))
    assert_equal(weights(whole), weights(resumed))
    assert_equal(average(whole).named_tensors(), average(resumed).named_tensors())
    one, other = whole.state.state_dict(), resumed.state.state_dict()
    assert_equal(one.tensors["optimizer.safetensors"], other.tensors["optimizer.safetensors"])


@pytest.mark.parametrize("changes", [{}, {"use_ema": True, "validation_split": "0.25", "export": "best"}])
def test_the_pipeline_is_one_in_float32(
    settings: dict[str, Any], tiny_pipeline: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Of the rounded weights, or of averages that were never rounded."""
    run(Recipe(**{**settings, **BF16, "max_train_steps": 2, **changes}))
    assert_leaves_as_it_came(tmp_path / "run", tiny_pipeline)
    exported = load_file(tmp_path / "run" / "unet" / UNET_WEIGHTS)
    is_rounded = all(torch.equal(each, each.bfloat16().float()) for each in exported.values())
    assert is_rounded == (not changes)


def test_a_trained_text_encoder_is_exported_in_float32_too(settings: dict[str, Any], tmp_path: Path) -> None:
    run(Recipe(**{**settings, **BF16, "max_train_steps": 1, "train_text_encoder": True}))
    exported = load_file(tmp_path / "run" / "text_encoder" / "model.safetensors")
    assert {each.dtype for each in exported.values()} == {torch.float32}
    assert all(torch.equal(each, each.bfloat16().float()) for each in exported.values()), "it was trained in bfloat16"


def test_the_pipeline_has_the_averages_themselves(settings: dict[str, Any]) -> None:
    made = train(settings, **BF16, use_ema=True, max_train_steps=2)
    before = weights(made)
    with made.state.evaluated(made.model.components):
        assert_equal(weights(made), average(made).named_tensors())
    assert_equal(weights(made), before)


@pytest.mark.parametrize("mixed_precision", ["no", None])
def test_weights_that_the_unet_does_not_compute_with_are_refused(
    settings: dict[str, Any], mixed_precision: str | None
) -> None:
    with pytest.raises(RecipeError, match="mixed precision is no: add --mixed_precision bf16, or drop"):
        build(settings, weights_dtype="bf16", mixed_precision=mixed_precision)
