"""Between logs the host waits for a device once a step, and copies to it from pinned memory: shown without a GPU.

Seen are operators that have to know values, and copies to the device. Copies to the host wait too, and are not seen: on
a CPU `.cpu()` and `.tolist()` copy nothing. Nor is what a loss scaler waits for, which a CPU does not have.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import build, fit_from

from sd_recipes.data.batches import Batch
from sd_recipes.training import loop
from sd_recipes.training.run import Run

# Each has to know values, or how many there are, before the host can go on.
WAITING = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.is_nonzero"}
BY_INDEX = {"aten.index", "aten.index_put", "aten.index_put_"}  # which waits for the number of a mask's places
STEPS = 4  # of which the first and the last are logged


class Waits(TorchDispatchMode):
    """Notes where operators would wait for what lies on a device: batches that were moved there, and what follows."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        for model in vars(run.model.components).values():
            if isinstance(model, torch.nn.Module):
                for tensor in (*model.parameters(), *model.buffers()):
                    tensor.is_on_device = True  # type: ignore[attr-defined]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        is_on_device = any(getattr(each, "is_on_device", False) for each in tensors)
        indices = args[1] if str(func.overloadpacket) in BY_INDEX else []
        by_mask = any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)
        if is_on_device and (str(func.overloadpacket) in WAITING or by_mask):
            frames = [frame for frame in traceback.extract_stack() if "/sd_recipes/" in frame.filename]
            self.found[f"{func} in {frames[-1].name}"] += 1
        result = func(*args, **(kwargs or {}))
        if is_on_device:
            for each in tree_leaves(result):
                if isinstance(each, torch.Tensor):
                    each.is_on_device = True  # type: ignore[attr-defined]
        return result


@contextmanager
def between_logs(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Counter[str], list[str]]]:
    """Trains; yields where it waited between the first step's log and the last one's, and what copied pageable memory.

    Pinned memory is what `pin_memory` returned, and views of it; a copy to the device is any from memory that is not
    on it.
    """
    waits, pageable, pinned = Waits(run), [], set()
    kept, log, to = [], loop.log, torch.Tensor.to

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(copy := tensor.clone())  # so that no other gets its place in memory
        pinned.add(copy.untyped_storage().data_ptr())
        return copy

    def note_copy(tensor: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        to_device = isinstance(named.get("device", next(iter(arguments), None)), torch.device)
        if not to_device or getattr(tensor, "is_on_device", False) or waits not in active:
            return to(tensor, *arguments, **named)
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in pinned:
            frames = [frame for frame in traceback.extract_stack()[:-1] if "/sd_recipes/" in frame.filename]
            pageable.append(f"{tuple(tensor.shape)} in {frames[-1].name}")
        moved = to(tensor, *arguments, **named).clone()
        moved.is_on_device = True  # type: ignore[attr-defined]
        return moved

    active: list[Waits] = []

    def log_and_look(of: Run, *rest: Any) -> None:
        if active:
            active.pop().__exit__(None, None, None)
        log(of, *rest)
        if of.state.progress.global_step < STEPS:
            waits.__enter__()
            active.append(waits)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.untyped_storage().data_ptr() in pinned)
    monkeypatch.setattr(torch.Tensor, "to", note_copy)
    monkeypatch.setattr(loop, "log", log_and_look)
    run.batches.pin_memory = True
    fit_from(run)
    monkeypatch.undo()
    yield waits.found, pageable


@pytest.mark.parametrize("changes", [
    {"use_ema": True, "snr_gamma": 5.0, "gradient_accumulation_steps": 2, "train_batch_size": 4, "micro_batch": 3},
    pytest.param({"lora_rank": 2, "lora_dropout": 0.1, "lora_text_encoder": True, "loss_type": "huber",
                  "dream_training": True}, marks=pytest.mark.slow),
    {"cache_latents": "disk", "center_crop": True, "random_flip": True, "noise_offset": 0.1,
     "input_perturbation": 0.1, "max_train_steps": STEPS, "train_batch_size": 3, "micro_batch": 2},
    pytest.param({"learned_uncertainty": True, "prediction_type": "v_prediction"}, marks=pytest.mark.slow),
    pytest.param({"max_grad_norm": 0, "fused_backward_pass": True, "optimizer": "adamw8bit"}, marks=pytest.mark.slow),
    pytest.param({"mixed_precision": "bf16", "weights_dtype": "bf16"}, marks=pytest.mark.slow),
    pytest.param({"train_text_encoder": True, "ema_snapshots": True}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_step_that_does_not_log_waits_for_the_gradients_norm_alone(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """The norm is waited for so that weights stay finite; on a GPU while that steps already (`loop.update`)."""
    run = build(settings, **{"max_train_steps": STEPS, "logging_steps": 100, "validation_steps": 100, **changes})
    with between_logs(run, monkeypatch) as (waits, pageable):
        assert waits == {"aten._local_scalar_dense.default in value": STEPS - 1}
        assert pageable == []


def test_a_wait_and_a_copy_of_pageable_memory_would_be_noticed(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(settings, max_train_steps=STEPS, logging_steps=100)
    encode = run.model.encoder.sample

    def waiting(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        latents = encode(moments, noise)
        latents[latents > 3].to(torch.float64)
        return latents if latents.max() < 1e9 else encode(moments, noise)

    run.model.encoder.sample = waiting  # type: ignore[method-assign]
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: batch)
    with between_logs(run, monkeypatch) as (waits, pageable):
        assert sum(waits.values()) == 3 * (STEPS - 1)
        assert len(pageable) >= 2 * (STEPS - 1), "input_ids, and what else a batch has"
