"""What only a GPU can show; skipped, and said so, on a machine without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import assert_leaves_as_it_came, forget_accelerator

from sd_recipes.checkpoints.format import UNET_WEIGHTS, Progress
from sd_recipes.export.pipeline import export_pipeline
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import start_accelerator
from sd_recipes.runtime.trackers import read_metrics
from sd_recipes.training.build import Training, build_training
from sd_recipes.training.loop import Window, fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def build(tiny_pipeline: Path, image_folder: Path, output_dir: Path, **changes: Any) -> Training:
    forget_accelerator()
    settings = {
        "pretrained_model_name_or_path": str(tiny_pipeline), "train_data_dir": str(image_folder), "resolution": 32,
        "output_dir": str(output_dir), "train_batch_size": 4, "max_train_steps": 8, "learning_rate": 1e-3, "seed": 5,
        "lr_warmup_steps": 0, "device": "cuda", "report_to": "none", "logging_steps": 100, **changes,
    }  # fmt: skip
    recipe = Recipe(**settings)
    return build_training(recipe, start_accelerator(recipe))


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_step_that_does_not_log_never_waits_for_the_device(
    tiny_pipeline: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed_precision: str
) -> None:
    training = build(tiny_pipeline, image_folder, tmp_path, mixed_precision=mixed_precision)
    close = Window.close

    def close_with_waiting(window: Window, of: Training, progress: Progress) -> dict[str, float]:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return close(window, of, progress)
        finally:
            # The first step may wait: kernels are chosen and loaded in it. From here on a wait is an error, until the
            # last step, after which the run is saved.
            if progress.global_step < of.max_train_steps:
                torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(Window, "close", close_with_waiting)
    try:
        fit(training)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("changes", [
    {"mixed_precision": "fp16"}, {"mixed_precision": "bf16"}, {"mixed_precision": "bf16", "use_8bit_adam": True},
    {"gradient_checkpointing": True}, {"use_ema": True, "offload_ema": True}, {"dataloader_num_workers": 2},
])  # fmt: skip
def test_it_learns_on_the_gpu(tiny_pipeline: Path, image_folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = {"train_batch_size": 8, "max_train_steps": 200, "logging_steps": 50, "learning_rate": 3e-3, **changes}
    fit(build(tiny_pipeline, image_folder, tmp_path, **settings))
    losses = [line["train_loss"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_defect_10_frozen_parts_leave_a_run_on_the_gpu_as_they_came(
    tiny_pipeline: Path, image_folder: Path, tmp_path: Path, mixed_precision: str
) -> None:
    training = build(tiny_pipeline, image_folder, tmp_path, mixed_precision=mixed_precision, max_train_steps=2)
    fit(training)
    export_pipeline(training.components, tmp_path)
    assert_leaves_as_it_came(tmp_path, tiny_pipeline)


def test_defect_14_float32_is_float32_in_convolutions_too(
    tiny_pipeline: Path, image_folder: Path, tmp_path: Path
) -> None:
    pixels = torch.randn(4, 64, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = torch.nn.functional.conv2d(pixels, weight)
    build(tiny_pipeline, image_folder, tmp_path)
    found = torch.nn.functional.conv2d(pixels.float().cuda(), weight.float().cuda()).double().cpu()
    assert (found - exact).abs().max() < 1e-3  # TF32's error is 3e-2


@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_a_checkpoint_is_of_its_step_and_is_read_back(
    tiny_pipeline: Path, image_folder: Path, tmp_path: Path, mixed_precision: str
) -> None:
    """The copies to pinned memory are queued before the next step's kernels, and waited for before they are written."""
    settings = {"mixed_precision": mixed_precision, "use_ema": True, "checkpointing_steps": 4}
    short = build(tiny_pipeline, image_folder, tmp_path / "short", max_train_steps=4, **settings)
    fit(short)
    fit(build(tiny_pipeline, image_folder, tmp_path / "long", **settings))
    saved = load_file(tmp_path / "long" / "checkpoint-4" / "unet" / UNET_WEIGHTS)
    for name, value in short.components.unet.state_dict().items():
        torch.testing.assert_close(saved[name], value.cpu(), rtol=1e-3, atol=1e-5, msg=name)  # kernels may differ
    back = build(
        tiny_pipeline,
        image_folder,
        tmp_path / "long",
        resume_from_checkpoint="checkpoint-4",
        max_train_steps=4,
        **settings,
    )
    fit(back)  # nothing is left to train
    for name, value in back.components.unet.state_dict().items():
        assert torch.equal(saved[name], value.cpu()), name
    if mixed_precision == "fp16":
        assert back.accelerator.scaler is not None
        assert back.accelerator.scaler.get_scale() == short.accelerator.scaler.get_scale()


def test_a_skipped_step_of_the_loss_scaler_advances_neither_schedule_nor_average(
    tiny_pipeline: Path, image_folder: Path, tmp_path: Path
) -> None:
    training = build(
        tiny_pipeline,
        image_folder,
        tmp_path,
        mixed_precision="fp16",
        use_ema=True,
        lr_scheduler="linear",
        max_train_steps=3,
    )
    scaler = training.accelerator.scaler
    assert scaler is not None
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})  # overflows float16 in the first backward pass
    fit(training)
    assert training.schedule.last_epoch < 3
    assert training.ema is not None
    assert training.ema.model.optimization_step == training.schedule.last_epoch
