"""A step that the optimizer's kernel skips by itself, given to the device before the host knows the gradient's norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_loop import build_poisoned
from training_runs import assert_equal, fit_from, weights

from sd_recipes.training import loop
from sd_recipes.training.eight_bit import AdamW8bit
from sd_recipes.training.skipping import Reading, can_skip, skipped_unless


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


def test_fused_kernels_can_skip_and_no_others() -> None:
    parameters = [torch.nn.Parameter(torch.ones(1))]
    assert can_skip(torch.optim.AdamW(parameters, fused=True))
    assert not can_skip(torch.optim.AdamW(parameters, fused=False))
    assert not can_skip(torch.optim.AdamW(parameters))
    assert not can_skip(AdamW8bit(parameters))


def test_a_run_gives_the_step_to_the_device_before_it_reads_the_norm_and_ends_with_the_same_weights(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """As if the host had looked first: once with a step in the middle that is skipped."""
    order = []
    read = Reading.value
    monkeypatch.setattr(Reading, "value", lambda reading: (order.append("read"), read(reading))[1])
    found = []
    for ahead in (True, False):
        run = build_poisoned({**settings, "use_ema": True, "output_dir": str(tmp_path / str(ahead))}, {2})
        assert can_skip(run.state.optimizer)
        step = run.state.optimizer.step
        monkeypatch.setattr(run.state.optimizer, "step", lambda step=step: (order.append("step"), step())[1])
        if not ahead:
            monkeypatch.setattr(loop, "can_skip", lambda optimizer: False)
        order.clear()
        fit_from(run)
        looked_first = ["read", "step", "read", "read", "step", "read", "step"]  # the second is skipped
        assert order == (["step", "read"] * 4 if ahead else looked_first)
        found.append(weights(run) | {f"average of {name}": each for name, each in average_of(run).items()})
    assert_equal(*found)


def average_of(run: Any) -> dict[str, torch.Tensor]:
    return run.state.parts["unet"].average.named_tensors()
