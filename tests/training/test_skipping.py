"""A step that the optimizer's kernel skips by itself, given to the device before the host knows the gradient's norm."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import build_poisoned
from training_runs import assert_equal, average, build, fit_from, weights

from sd_recipes.runtime.host_memory import OnItsWay
from sd_recipes.training import loop
from sd_recipes.training.eight_bit import AdamW8bit
from sd_recipes.training.run import Run
from sd_recipes.training.skipping import can_skip, skipped_unless


def stepped(*gradients: float) -> torch.optim.Optimizer:
    """An optimizer after these gradients, of which those that are not finite are skipped on the device."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        with skipped_unless(weight.grad.sum().isfinite(), optimizer):
            optimizer.step()
    return optimizer


@pytest.mark.parametrize("gradients", [(torch.nan, 1.0, 2.0), (1.0, torch.inf, -torch.inf, 2.0), (1.0, 2.0, torch.nan)])
def test_a_skipped_step_leaves_weights_state_and_count_as_if_it_had_not_been(gradients: tuple[float, ...]) -> None:
    one, other = stepped(*gradients), stepped(1.0, 2.0)
    (weight,), (same,) = one.param_groups[0]["params"], other.param_groups[0]["params"]
    assert_equal({"weight": weight, **one.state[weight]}, {"weight": same, **other.state[same]})
    assert one.state[weight]["step"] == 2
    assert not hasattr(one, "found_inf"), "the next step would be skipped too"


def test_a_step_of_a_usable_gradient_is_that_of_the_optimizer_by_itself() -> None:
    one = stepped(1.0, 0.5)
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    other = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for gradient in (1.0, 0.5):
        weight.grad = torch.full_like(weight, gradient)
        other.step()
    assert_equal({"weight": one.param_groups[0]["params"][0]}, {"weight": weight})


def test_adams_fused_kernels_can_skip_and_no_others() -> None:
    parameters = [torch.nn.Parameter(torch.ones(1))]
    assert can_skip(torch.optim.AdamW(parameters, fused=True))
    assert can_skip(torch.optim.Adam(parameters, fused=True))
    assert not can_skip(torch.optim.AdamW(parameters, fused=False))
    assert not can_skip(torch.optim.AdamW(parameters))
    assert not can_skip(AdamW8bit(parameters))
    assert not can_skip(torch.optim.SGD(parameters, momentum=0.9, fused=True)), "its first momentum would be garbage"

    class Other(torch.optim.AdamW):
        """It may do anything in its step."""

    assert not can_skip(Other(parameters, fused=True))


@pytest.mark.parametrize("poisoned", [{1}, {2}, {1, 2}])
def test_a_run_gives_the_step_to_the_device_before_it_reads_the_norm_and_ends_with_the_same_weights(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, poisoned: set[int]
) -> None:
    """As if the host had looked first: with steps that are skipped, the first one among them."""
    order = []
    read = OnItsWay.value
    monkeypatch.setattr(OnItsWay, "value", lambda number: (order.append("read"), read(number))[1])
    found = []
    for ahead in (True, False):
        run = build_poisoned({**settings, "use_ema": True, "output_dir": str(tmp_path / str(ahead))}, poisoned)
        assert can_skip(run.state.optimizer)
        step = run.state.optimizer.step
        monkeypatch.setattr(run.state.optimizer, "step", lambda step=step: (order.append("step"), step())[1])
        if not ahead:
            monkeypatch.setattr(loop, "can_skip", lambda optimizer: False)
        order.clear()
        fit_from(run)
        looked_first = [["read"] if number in poisoned else ["read", "step"] for number in (1, 2, 3, 4)]
        assert order == (["step", "read"] * 4 if ahead else [*chain(*looked_first)])
        found.append(weights(run) | {f"average of {name}": each for name, each in averaged(run).items()})
    assert_equal(*found)


def test_a_run_whose_only_steps_were_skipped_resumes_as_if_they_had_not_been(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = build_poisoned({**settings, "output_dir": str(tmp_path / "whole")}, {1})
    fit_from(whole)
    fit_from(build_poisoned({**settings, "max_train_steps": 1, "checkpointing_steps": 1}, {1}))
    resumed = build(settings, resume_from_checkpoint="latest")
    assert resumed.checkpoint is not None
    fit_from(resumed)
    assert_equal(weights(whole), weights(resumed))


def averaged(run: Run) -> dict[str, torch.Tensor]:
    return average(run).named_tensors()
