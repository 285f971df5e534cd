"""What only a GPU can show; skipped, and said so, on a machine without one."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm
from training_runs import assert_leaves_as_it_came, average, build, fit_from, losses, train

from sd_recipes.export.pipeline import export_pipeline
from sd_recipes.runtime.trackers import read_metrics
from sd_recipes.training import loop
from sd_recipes.training.build import UNET_WEIGHTS, Run
from sd_recipes.training.meter import Meter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"device": "cuda", "max_train_steps": 8, "logging_steps": 100}


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_step_that_does_not_log_waits_for_the_gradients_norm_alone(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, mixed_precision: str
) -> None:
    """The norm is waited for so that weights stay finite; see `loop.update`."""
    run = build(settings, mixed_precision=mixed_precision)
    clip, log = run.accelerator.clip_grad_norm_, loop.log

    def clip_with_waiting(*arguments: Any) -> torch.Tensor:
        norm = clip(*arguments)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return norm.cpu()
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def log_with_waiting(of: Run, meter: Meter, bar: tqdm) -> None:
        torch.cuda.set_sync_debug_mode("default")
        log(of, meter, bar)
        # The first step may wait: kernels are chosen and loaded in it. From here on a wait is an error, until the
        # last step, after which the run is saved.
        if of.state.progress.global_step < of.num_steps:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(run.accelerator, "clip_grad_norm_", clip_with_waiting)
    monkeypatch.setattr(loop, "log", log_with_waiting)
    try:
        fit_from(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("changes", [
    {"mixed_precision": "fp16"}, {"mixed_precision": "bf16"}, {"mixed_precision": "bf16", "use_8bit_adam": True},
    {"gradient_checkpointing": True}, {"use_ema": True, "offload_ema": True}, {"dataloader_num_workers": 2},
])  # fmt: skip
def test_it_learns_on_the_gpu(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    settings |= {"train_batch_size": 8, "max_train_steps": 200, "logging_steps": 50, "learning_rate": 3e-3, **changes}
    run = train(settings)
    losses = [line["train_loss"] for line in read_metrics(run.output_dir / "metrics.jsonl")]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_defect_10_frozen_parts_leave_a_run_on_the_gpu_as_they_came(
    settings: dict[str, Any], tiny_pipeline: Path, mixed_precision: str
) -> None:
    run = train(settings, mixed_precision=mixed_precision, max_train_steps=2)
    export_pipeline(run.model.family, run.model.components, run.output_dir)
    assert_leaves_as_it_came(run.output_dir, tiny_pipeline)


def test_defect_14_float32_is_float32_in_convolutions_too(settings: dict[str, Any]) -> None:
    pixels = torch.randn(4, 64, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = torch.nn.functional.conv2d(pixels, weight)
    build(settings)
    found = torch.nn.functional.conv2d(pixels.float().cuda(), weight.float().cuda()).double().cpu()
    assert (found - exact).abs().max() < 1e-3  # TF32's error is 3e-2


@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_a_checkpoint_is_of_its_step_and_is_read_back(
    settings: dict[str, Any], tmp_path: Path, mixed_precision: str
) -> None:
    """The copies to pinned memory are queued before the next step's kernels, and waited for before they are written."""
    settings |= {"mixed_precision": mixed_precision, "use_ema": True, "checkpointing_steps": 4}
    short = train(settings, output_dir=str(tmp_path / "short"), max_train_steps=4)
    settings["output_dir"] = str(tmp_path / "long")
    train(settings)
    saved = load_file(tmp_path / "long" / "checkpoint-4" / "unet" / UNET_WEIGHTS)
    for name, value in short.model.components.unet.state_dict().items():
        torch.testing.assert_close(saved[name], value.cpu(), rtol=1e-3, atol=1e-5, msg=name)  # kernels may differ
    back = train(settings, resume_from_checkpoint="checkpoint-4", max_train_steps=4)  # nothing is left to train
    for name, value in back.model.components.unet.state_dict().items():
        assert torch.equal(saved[name], value.cpu()), name
    if mixed_precision == "fp16":
        assert back.state.scaler is not None
        assert back.state.scaler.get_scale() == short.state.scaler.get_scale()


def test_a_skipped_step_of_the_loss_scaler_advances_neither_schedule_nor_average(settings: dict[str, Any]) -> None:
    run = build(settings, mixed_precision="fp16", use_ema=True, lr_scheduler="linear", max_train_steps=3)
    scaler = run.state.scaler
    assert scaler is not None
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})  # overflows float16 in the first backward pass
    fit_from(run)
    assert run.state.schedule.last_epoch < 3
    assert average(run).num_updates == run.state.schedule.last_epoch


def test_a_step_that_runs_out_of_memory_is_done_again_with_fewer_images_at_once(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Really: torch may take little more than two images take, and a batch has eight."""
    settings |= {"resolution": 512, "train_batch_size": 8, "max_train_steps": 4, "logging_steps": 1}

    def empty() -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    empty()
    roomy = train(settings, micro_batch=2, output_dir=str(tmp_path / "roomy"))
    expected = losses(roomy)
    taken = torch.cuda.max_memory_reserved()
    del roomy
    empty()
    torch.cuda.set_per_process_memory_fraction(1.3 * taken / torch.cuda.get_device_properties(0).total_memory)
    try:
        run = train(settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert run.state.progress.micro_batch in (2, 4)
    assert all(map(math.isfinite, losses(run)))
    assert losses(run) == pytest.approx(expected, rel=1e-2)
    assert "out_of_memory" in (run.output_dir / "incidents.jsonl").read_text()
