"""What a step asks of a device, and how often: counted on a CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import bitsandbytes
import pytest
import torch
import training_runs
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import build, fit_from

from sd_recipes.model import latents
from sd_recipes.training import build_state, loop
from sd_recipes.training.adafactor import Adafactor
from sd_recipes.training.eight_bit import AdamW8bit, Lion, Lion8bit
from sd_recipes.training.ema import move_towards
from sd_recipes.training.meter import Meter


class Operators(TorchDispatchMode):
    """Notes the names of operators, and the tensors whose values the host has asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.asked_for: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.overloadpacket))
        if self.names[-1] == "aten._local_scalar_dense":
            self.asked_for.append(args[0])
        return func(*args, **(kwargs or {}))


def test_an_average_takes_one_operator_for_all_parameters() -> None:
    averages, parameters = ([torch.full((3, 2), float(each)) for each in range(20)] for _ in range(2))
    with Operators() as operators:
        move_towards(averages, parameters, 0.1)
    assert operators.names == ["aten._foreach_lerp_"]


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"maximize": True, "d": 2.0, "eps": (1e-8, 1e-2)}])
def test_adafactor_is_torchs_and_asks_for_nothing_but_the_number_of_its_step(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7,), (5, 4), (3, 2, 3, 3), (1,)]

    def draw() -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator) for shape in shapes]

    start, gradients = draw(), [draw() for _ in range(4)]
    found: list[list[torch.nn.Parameter]] = []
    asked_for: list[int] = []
    for kind in (Adafactor, torch.optim.Adafactor):
        parameters = [torch.nn.Parameter(each.clone()) for each in start]
        optimizer = kind(parameters, lr=0.3, **settings)
        for of_step in gradients:
            for parameter, gradient in zip(parameters, of_step, strict=True):
                parameter.grad = gradient.clone()
            with Operators() as operators:
                optimizer.step()
        numbers = [state["step"] for state in optimizer.state.values()]
        asked_for.append(sum(all(each is not number for number in numbers) for each in operators.asked_for))
        found.append(parameters)
    assert asked_for == [0, 2 * len(shapes)], "torch's own asks, else nothing is shown here"
    torch.testing.assert_close(*found)
    assert all((one - other).abs().max() > 0.01 for one, other in zip(found[0], start, strict=True))


@pytest.mark.parametrize(("kind", "usual"), [
    (AdamW8bit, bitsandbytes.optim.AdamW8bit), (Lion, bitsandbytes.optim.Lion), (Lion8bit, bitsandbytes.optim.Lion8bit),
])  # fmt: skip
def test_optimizers_of_bitsandbytes_do_not_wait_after_each_parameter(
    kind: Any, usual: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[torch.Tensor] = []
    monkeypatch.setattr(bitsandbytes.optim.optimizer, "sync_gpu", waited.append)

    def num_waits(of: Any) -> int:
        waited.clear()
        parameters = [torch.nn.Parameter(torch.ones(4096)) for _ in range(3)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        of(parameters, lr=1e-3).step()
        return len(waited)

    assert num_waits(kind) == 0
    assert num_waits(usual) >= 3, "its own waits: else nothing is shown here"


@pytest.mark.parametrize(("mixed_precision", "fused"), [("fp16", None), ("bf16", True), ("no", True)])
def test_adamw_of_a_loss_scaler_is_not_told_to_do_without_its_multi_tensor_kernels(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, mixed_precision: str, fused: bool | None
) -> None:
    """`fused=False` would turn `foreach` off too: thousands of operators a step."""
    monkeypatch.setattr(latents, "TRIAL_SIDE", 16)  # in float16 a CPU takes seconds for more
    made = []
    build_optimizer = build_state.build_optimizer

    def noted(*arguments: Any, **named: Any) -> Any:
        made.append(named["fused"])
        return build_optimizer(*arguments, **named)

    monkeypatch.setattr(build_state, "build_optimizer", noted)

    build_run = training_runs.build_run

    def with_precision(recipe: Any, accelerator: Any, checkpoint: Any) -> Any:
        monkeypatch.setattr(type(accelerator), "mixed_precision", mixed_precision)
        return build_run(recipe, accelerator, checkpoint)

    monkeypatch.setattr(training_runs, "build_run", with_precision)
    build(settings)
    assert made == [fused]


@pytest.mark.parametrize("held_out", [None, 4])
def test_a_validation_of_nothing_neither_empties_a_cache_nor_ends_what_speed_is_measured_over(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, held_out: int | None
) -> None:
    """One is due after the first epoch and every fifth: only then is the run's page written."""
    phases, restarts, pages = [], [], []
    restart = Meter.restart
    monkeypatch.setattr(loop, "another_phase", lambda device: (phases.append(device), nullcontext())[1])
    monkeypatch.setattr(Meter, "restart", lambda meter, progress: (restarts.append(1), restart(meter, progress))[1])
    monkeypatch.setattr(loop, "show_page", pages.append)
    settings |= {"train_batch_size": 2, "max_train_steps": 12, "logging_steps": 12, "validation_epochs": 1}
    fit_from(build(settings, validation_split=held_out))
    assert len(phases) == (7 if held_out else 0)  # before the first step, and after each of six epochs of two steps
    assert len(pages) == (7 if held_out else 3)
    assert len(restarts) == 3, "at the start, and where it logs: at the first step and the last"
