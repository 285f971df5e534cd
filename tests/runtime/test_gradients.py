"""Gradients summed over processes: the sums are right, and nobody waits for one whose memory has ended."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import finish, start, torchrun
from shortages import BY_NUMBER, ONCE
from test_distributed import losses, saved
from tiny_models import build_image_folder
from training_runs import assert_equal, train

from sd_recipes.checkpoints.format import list_checkpoints
from sd_recipes.runtime import gradients
from sd_recipes.runtime.gradients import GradientExchange, in_buckets

STEPS = 3


# Where memory ends, and in which step: the first one, whose sums come after its backward pass, or a later one.
SOME = [("backward", 1), ("last backward", STEPS), ("optimizer", STEPS)]
ALL = [(place, step) for step in (1, STEPS) for place in (*BY_NUMBER, *ONCE)]


@pytest.fixture
def settings(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Global batches of eight and seven rows, of which a process has four or three, in micro-batches of two."""
    return settings | {
        "train_data_dir": str(build_image_folder(tmp_path / "pictures", 15)), "use_ema": True, "max_grad_norm": 0.5,
        "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": STEPS, "learned_uncertainty": True,
        "checkpointing_steps": 100, "dataloader_num_workers": 0,
    }  # fmt: skip


def start_two(settings: dict[str, Any], *runs: dict[str, Any], **variables: str) -> subprocess.Popen:
    """Run after run in two processes, each with its changes of the settings."""
    given = [{**each, "settings": settings | each.get("settings", {})} for each in runs]
    return start(torchrun(2), json.dumps(given), script="tests/shortages.py", **variables)


def what_ended(process: subprocess.Popen) -> str:
    """What the processes of a run that fails have written; none may hang."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0, output
    return output


@pytest.fixture(params=["gloo", pytest.param("nccl", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"))])  # fmt: skip
def device_of_one_process(request: pytest.FixtureRequest) -> Iterator[str]:
    """A group of one process, whose exchanges are made all the same."""
    torch.distributed.init_process_group(request.param, store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield "cuda" if request.param == "nccl" else "cpu"
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_summed_over_one_process_are_its_own(device_of_one_process: str, dtype: torch.dtype) -> None:
    """In the first step, in later ones, and after one that failed; of parameters in channels last."""

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        layers = (torch.nn.Conv2d(3, 64, 3, padding=1), torch.nn.GroupNorm(8, 64), torch.nn.Conv2d(64, 3, 3, padding=1))
        return torch.nn.Sequential(*layers).to(device_of_one_process, dtype).to(memory_format=torch.channels_last)

    exchanged, plain = model(), model()
    exchange = GradientExchange(list(exchanged.parameters()), is_needed=True)
    images = torch.randn(4, 3, 16, 16, device=device_of_one_process, dtype=dtype)
    for failed in (False, False, True, False):
        exchange.begin()
        for network in (exchanged, plain):
            network.zero_grad()
            for part, some in enumerate(images.split(2)):
                exchange.is_last = part == 1 and network is exchanged
                network(some).float().square().mean().backward()
        exchange.finish(failed=failed)
        if not exchange.is_set_up:
            exchange.set_up()
        if not failed:
            torch.testing.assert_close(gradients_of(exchanged), gradients_of(plain))


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("shortages", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_process_that_runs_out_of_memory_leaves_no_other_waiting(
    settings: dict[str, Any], tmp_path: Path, shortages: list[tuple[str, int]]
) -> None:
    """To the bit the same as if both had taken so many at once, always or from that step on; or had never run out."""

    def out(name: str) -> dict[str, Any]:
        return {"output_dir": str(tmp_path / name)}

    runs: list[dict[str, Any]] = [
        {"settings": out("two")},
        {"settings": out("one from 1") | {"micro_batch": 1}},
        {"settings": out(f"one from {STEPS}") | {"max_train_steps": STEPS - 1}},
        {"settings": out(f"one from {STEPS}") | {"micro_batch": 1, "resume_from_checkpoint": "latest"}},
    ]
    for number, (place, step) in enumerate(shortages):
        short = {"place": place, "fits": 1, "step": step, "rank": number % 2}
        runs.append({"settings": out(f"{place} {step}"), "short": short})
    told = finish(start_two(settings, *runs), timeout=400)
    for place, step in shortages:
        short, expected = tmp_path / f"{place} {step}", tmp_path / (f"one from {step}" if place in BY_NUMBER else "two")
        for part in ("unet", "unet_ema"):
            assert_equal(saved(short, STEPS, part), saved(expected, STEPS, part))
        assert losses(short) == losses(expected)
    assert told.count("No memory for 2 images at once") == len([place for place, _ in shortages if place in BY_NUMBER])
    train(settings, train_batch_size=8, gradient_accumulation_steps=1, output_dir=str(tmp_path / "alone"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


@pytest.mark.slow
def test_two_processes_end_alike_where_not_even_one_image_fits_on_one(settings: dict[str, Any]) -> None:
    short = {"place": "last backward", "fits": 0, "step": 3, "rank": 1}
    told = what_ended(start_two(settings, {"short": short}))
    words = "error: no memory for even one image at once (CUDA out of memory. Tried to allocate 1 GiB.): use "
    assert words in told
    assert "the same command then resumes from checkpoint-2" in told
    assert "Traceback" not in told.partition("ChildFailedError")[0].partition("elastic")[0]
    assert [path.name for path in list_checkpoints(Path(settings["output_dir"]))] == ["checkpoint-2"]


def test_buckets_are_of_one_type_and_of_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 100)
    sizes = [(10, torch.float32), (20, torch.float32), (5, torch.float32), (5, torch.bfloat16), (300, torch.bfloat16)]
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in sizes]
    buckets = in_buckets(parameters)
    assert [[each.numel() for each in bucket.parameters] for bucket in buckets] == [[10, 20], [5], [5, 300]]
    assert [each for bucket in buckets for each in bucket.parameters] == parameters


def test_gradients_that_only_earlier_micro_batches_have_are_summed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over this process and another like it; they are sent off last, so that the others need not wait for them."""
    sent = []

    def all_reduce(tensor: torch.Tensor, async_op: bool) -> SimpleNamespace:
        sent.append(len(tensor))
        tensor.mul_(2)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(gradients.distributed, "broadcast", lambda tensor, src: None)
    monkeypatch.setattr(gradients.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 1)  # one for each parameter
    early, late, never = (torch.nn.Parameter(torch.ones(size)) for size in (3, 2, 1))
    exchange = GradientExchange([early, late, never], is_needed=True)
    for step in range(2):
        exchange.begin()
        (early.sum() + late.sum()).backward()
        exchange.is_last = True
        late.sum().backward()
        assert sent == [2] * step, "from the second step on, within the backward pass"
        exchange.finish(failed=False)
        if not exchange.is_set_up:
            exchange.set_up()
        assert sent == [2, 3]
        assert early.grad.tolist() == [2.0] * 3
        assert late.grad.tolist() == [4.0] * 2
        assert never.grad is None
        early.grad = late.grad = None
        sent.clear()


def test_what_is_not_needed_does_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    exchange = GradientExchange([weight], is_needed=False)
    assert exchange.is_set_up
    exchange.begin()
    exchange.is_last = True
    weight.sum().backward()
    exchange.finish(failed=False)
    assert torch.equal(weight.grad, torch.ones(3))
