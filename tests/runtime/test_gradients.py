"""Gradients summed over processes: the sums are right, and nobody waits for one whose memory has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import finish, start, torchrun
from shortages import BY_NUMBER, ONCE
from test_distributed import losses, saved
from training_runs import assert_equal, train

from sd_recipes.runtime import gradients
from sd_recipes.runtime.gradients import GradientExchange, in_buckets

STEPS = 3


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Seven rows in a global batch, of which one process has four and the other three, in micro-batches of two."""
    return settings | {
        "use_ema": True, "max_train_samples": 7, "max_grad_norm": 0.5, "checkpointing_steps": 100,
        "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": STEPS,
        "learned_uncertainty": True,
    }  # fmt: skip


def run_in_two(settings: dict[str, Any], *runs: dict[str, Any], timeout: float = 240) -> str:
    """Run after run in two processes, each with its changes of the settings; what they wrote."""
    given = [{**each, "settings": settings | each["settings"]} for each in runs]
    process = start(torchrun(2), json.dumps(given), script="tests/shortages.py")
    return finish(process, timeout=timeout)


def test_a_process_that_runs_out_of_memory_leaves_no_other_waiting(settings: dict[str, Any], tmp_path: Path) -> None:
    """At every place, in the first step, whose sums come after its backward pass, and in a later one.

    To the bit the same as if they had always taken so many at once, or as from that step on.
    """

    def out(name: str) -> dict[str, Any]:
        return {"output_dir": str(tmp_path / name)}

    runs: list[dict[str, Any]] = [
        {"settings": out("two")},
        {"settings": out("one") | {"micro_batch": 1}},
        {"settings": out("then one") | {"max_train_steps": STEPS - 1}},
        {"settings": out("then one") | {"micro_batch": 1, "resume_from_checkpoint": "latest"}},
    ]
    expected = {}
    for step, of_number in ((1, "one"), (STEPS, "then one")):
        for number, place in enumerate((*BY_NUMBER, *ONCE)):
            name = f"{place} {step}"
            expected[name] = of_number if place in BY_NUMBER else "two"
            short = {"place": place, "fits": 1, "step": step, "rank": (number + step) % 2}
            runs.append({"settings": out(name), "short": short})
    told = run_in_two(settings, *runs)
    for name, reference in expected.items():
        for part in ("unet", "unet_ema"):
            assert_equal(saved(tmp_path / name, STEPS, part), saved(tmp_path / reference, STEPS, part))
        assert losses(tmp_path / name) == losses(tmp_path / reference)
    assert told.count("No memory for 2 images at once") == len(BY_NUMBER) * 2
    one = train(settings, train_batch_size=7, gradient_accumulation_steps=1, output_dir=str(tmp_path / "alone"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    assert one.state.progress.global_step == STEPS


def test_buckets_are_of_one_type_and_of_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 100)
    sizes = [(10, torch.float32), (20, torch.float32), (5, torch.float32), (5, torch.bfloat16), (300, torch.bfloat16)]
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in sizes]
    buckets = in_buckets(parameters)
    assert [[each.numel() for each in bucket.parameters] for bucket in buckets] == [[10, 20], [5], [5, 300]]
    assert [each for bucket in buckets for each in bucket.parameters] == parameters


def test_what_is_not_needed_does_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    exchange = GradientExchange([weight], is_needed=False)
    assert exchange.is_set_up
    exchange.begin()
    exchange.is_last = True
    weight.sum().backward()
    exchange.finish(failed=False)
    assert torch.equal(weight.grad, torch.ones(3))
