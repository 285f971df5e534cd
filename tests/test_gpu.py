"""What only a GPU can show; skipped, and said so, on a machine without one."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from test_loop import build_poisoned
from tqdm.auto import tqdm
from training_runs import assert_equal, assert_leaves_as_it_came, average, build, fit_from, losses, train, weights

from sd_recipes.export.pipeline import export_pipeline, export_trained
from sd_recipes.recipe import OptimConfig
from sd_recipes.runtime.accelerator import DTYPES
from sd_recipes.runtime.trackers import read_incidents, read_metrics
from sd_recipes.training import loop
from sd_recipes.training.bf16_weights import rounded
from sd_recipes.training.build_parts import UNET_WEIGHTS
from sd_recipes.training.ema import AveragedWeights, release_before_steps
from sd_recipes.training.fused_backward import FusedBackward
from sd_recipes.training.meter import Meter
from sd_recipes.training.run import Run
from sd_recipes.training.skipping import can_skip

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"device": "cuda", "max_train_steps": 8, "logging_steps": 100}


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("changes", [
    {}, {"mixed_precision": "bf16"}, {"use_8bit_adam": True}, {"use_ema": True, "offload_ema": True},
    {"mixed_precision": "bf16", "weights_dtype": "bf16", "cache_text": True},
    {"max_grad_norm": 0, "fused_backward_pass": True}, {"lora_rank": 4, "lora_dropout": 0.1, "mixed_precision": "bf16"},
    {"snr_gamma": 5.0, "use_ema": True, "gradient_accumulation_steps": 2, "micro_batch": 3},
    {"timesteps_by_error": True, "cache_text": True}, {"learned_uncertainty": True}, {"compile": "blocks"},
    {"cache_latents": "memory", "center_crop": True, "random_flip": True, "dataloader_num_workers": 0},
])  # fmt: skip
def test_a_step_that_does_not_log_waits_for_the_gradients_norm_alone(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """The norm is waited for so that weights stay finite (`loop.update`).

    Where the device steps meanwhile, that is a wait for an event, which the mode used here does not see.
    """
    run = build(settings, logging_steps=3, **changes)
    log = loop.log

    def waiting(norm_of: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wait(*arguments: Any) -> torch.Tensor:
            norm = norm_of(*arguments)
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("default")
            try:
                return norm.cpu()
            finally:
                torch.cuda.set_sync_debug_mode(mode)

        return wait

    def log_with_waiting(of: Run, meter: Meter, bar: tqdm) -> None:
        torch.cuda.set_sync_debug_mode("default")
        log(of, meter, bar)
        # The first step may wait: kernels are chosen and loaded in it; and the end of the first epoch, of two steps,
        # after which a cache is written. From here on a wait is an error, until the last step, after which the run is
        # saved.
        if 3 <= of.state.progress.global_step < of.num_steps:
            torch.cuda.set_sync_debug_mode("error")

    if not can_skip(run.state.optimizer):
        monkeypatch.setattr(run.accelerator, "clip_grad_norm_", waiting(run.accelerator.clip_grad_norm_))
    if fused := run.state.fused_backward:
        monkeypatch.setattr(fused, "grad_norm", waiting(fused.grad_norm))
    monkeypatch.setattr(loop, "log", log_with_waiting)
    try:
        fit_from(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("changes", [{}, {"mixed_precision": "bf16", "use_ema": True, "offload_ema": True}])
def test_a_step_that_is_not_finite_is_skipped_by_the_kernel(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """As if the host had looked first: the first step, and one between others."""
    found = []
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(loop, "can_skip", lambda optimizer: False)
        run = build_poisoned({**settings, **changes, "output_dir": str(tmp_path / str(ahead))}, {1, 4})
        fit_from(run)
        assert [line["step"] for line in read_incidents(tmp_path / str(ahead) / "incidents.jsonl")] == [1, 4]
        assert {int(state["step"]) for state in run.state.optimizer.state.values()} == {run.num_steps - 2}
        found.append(weights(run))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("changes", [
    {"mixed_precision": "fp16"}, {"mixed_precision": "bf16"}, {"mixed_precision": "bf16", "use_8bit_adam": True},
    {"gradient_checkpointing": True}, {"use_ema": True, "offload_ema": True}, {"dataloader_num_workers": 2},
    {"mixed_precision": "bf16", "weights_dtype": "bf16", "use_ema": True, "offload_ema": True},
    {"fused_backward_pass": True, "max_grad_norm": 0}, {"optimizer": "paged_adamw8bit", "cache_text": True},
    {"mixed_precision": "bf16", "train_text_encoder": True, "gradient_checkpointing": True},
    {"mixed_precision": "fp16", "train_text_encoder": True, "text_encoder_steps": 20},
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


@pytest.mark.parametrize("how", ["blocks", "unet", "graphs"])
@pytest.mark.parametrize("changes", [
    {}, {"mixed_precision": "bf16", "use_ema": True},
    {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
])  # fmt: skip
def test_what_is_compiled_trains_as_the_eager_one_up_to_rounding(
    settings: dict[str, Any], how: str, changes: dict[str, Any]
) -> None:
    """Also where CUDA graphs add up micro-batches."""
    settings |= {"optimizer": "sgd", "learning_rate": 1e-2, "logging_steps": 1, **changes}
    eager = train(settings, output_dir=settings["output_dir"] + "-eager")
    compiled = train(settings, compile=how)
    tolerance = 3e-2 if "mixed_precision" in changes else 1e-3
    assert losses(compiled) == pytest.approx(losses(eager), rel=tolerance)
    for part, name in ((compiled, "compiled"), (eager, "eager")):
        assert all(value.isfinite().all() for value in weights(part).values()), name
    torch.compiler.reset()


def test_a_run_with_8_bit_states_resumes_to_the_bit(settings: dict[str, Any]) -> None:
    settings |= {"use_8bit_adam": True, "mixed_precision": "bf16", "use_ema": True, "checkpointing_steps": 4}
    whole = train(settings, output_dir=settings["output_dir"] + "-whole")
    train(settings, max_train_steps=4)
    assert_equal(weights(whole), weights(train(settings, resume_from_checkpoint="latest")))


def test_a_run_in_channels_last_resumes_to_the_bit_and_repeats(settings: dict[str, Any]) -> None:
    settings |= {"channels_last": "always", "checkpointing_steps": 4, "dataloader_num_workers": 2}
    whole = train(settings, output_dir=settings["output_dir"] + "-whole")
    train(settings, max_train_steps=4)
    assert_equal(weights(whole), weights(train(settings, resume_from_checkpoint="latest")))


def test_a_profile_says_what_the_device_did_and_what_the_host_waited_for(settings: dict[str, Any]) -> None:
    run = train(settings, profile_steps=2)
    lines = (run.output_dir / "profile" / "step-000005.txt").read_text().splitlines()
    of_all = lines[-1].split()
    assert float(of_all[2]) > 0, "milliseconds on the device"
    assert float(of_all[4]) == 0, "copies of pageable memory"
    figures = read_metrics(run.output_dir / "metrics.jsonl")[-1]
    assert figures["teraflops"] > 0


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_in_host_memory_is_the_one_on_the_device_to_the_bit(dtype: torch.dtype) -> None:
    """While the parameters keep changing, which has to wait for the updates that still read them."""
    shapes = [(640, 320, 3, 3), (4096, 2560), (1,), (2560, 4096), (1280, 1280, 3, 3), (77, 768)]
    parameters = {str(shape): torch.nn.Parameter(torch.randn(shape, dtype=dtype, device="cuda")) for shape in shapes}
    for parameter in parameters.values():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    config = OptimConfig(ema_length=0.1)
    kept = AveragedWeights(parameters, config.model_copy(update={"offload_ema": True}))
    plain = AveragedWeights(parameters, config)
    assert kept.on_host is not None
    assert all(memory.is_pinned() for memory in kept.on_host.memory)
    assert sum(memory.nbytes for memory in kept.on_host.memory) < 1.5 * 4 * sum(map(torch.numel, parameters.values()))
    release_before_steps(optimizer, [kept, plain])
    for _ in range(20):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        for each in (kept, plain):
            each.step()
    found = kept.named_tensors()
    for name, tensor in plain.named_tensors().items():
        assert torch.equal(found[name], tensor.cpu()), name
        assert found[name].stride() == tensor.stride()


def peak_of_step(*, fused: bool) -> int:
    """Bytes above what is there before it, of a step of eight layers whose weights take 64 MiB each."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, bias=False) for _ in range(8))).cuda()
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-3)
    if fused:
        FusedBackward(optimizer)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layers(torch.randn(2, 4096, device="cuda")).square().mean().backward()
    optimizer.step()
    return torch.cuda.max_memory_allocated() - before


def test_a_step_in_the_backward_pass_keeps_no_gradients() -> None:
    peak_of_step(fused=False)  # cuBLAS takes its workspace
    assert peak_of_step(fused=False) > 8 * 2**26
    assert peak_of_step(fused=True) < 4 * 2**26


def test_numbers_are_rounded_stochastically_on_the_gpu_too() -> None:
    values = torch.full((1_000_000,), 1.001, device="cuda")
    found = rounded(values, torch.Generator("cuda").manual_seed(0))
    assert sorted(found.unique().tolist()) == [1.0, 1.0078125]
    assert found.double().mean().item() == pytest.approx(1.001, abs=2e-5)


def test_a_paged_state_is_in_pages_again_when_it_is_loaded() -> None:
    from sd_recipes.training.eight_bit import PagedAdamW8bit

    def of_copy() -> tuple[torch.nn.Parameter, PagedAdamW8bit]:
        parameter = torch.nn.Parameter(start.clone())
        return parameter, PagedAdamW8bit([parameter], lr=1e-2)

    def step(parameter: torch.nn.Parameter, optimizer: PagedAdamW8bit, number: int) -> None:
        generator = torch.Generator("cuda").manual_seed(number)
        parameter.grad = torch.randn(parameter.shape, generator=generator, device="cuda")
        optimizer.step()

    start = torch.randn(512, 512, device="cuda")
    (one, whole), (other, resumed) = of_copy(), of_copy()
    for number in range(3):
        step(one, whole, number)
    with torch.no_grad():
        other.copy_(one)
    resumed.load_state_dict(whole.state_dict())
    for name in ("state1", "state2"):
        paged = resumed.state[other][name]
        assert paged.is_paged
        assert torch.equal(paged, whole.state[one][name])
    step(one, whole, 3)
    step(other, resumed, 3)
    assert torch.equal(one, other)


def test_segments_grow_in_a_process_that_sets_the_allocator_up_before_it_uses_the_gpu() -> None:
    program = """
import os
for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
    os.environ.pop(name, None)
from sd_recipes.runtime.allocator import set_up_allocator
set_up_allocator()
import torch
torch.ones(2**25, device="cuda")
assert all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
"""
    subprocess.run([sys.executable, "-c", program], check=True)


LORA = {"lora_rank": 16, "lora_targets": ["all"], "lora_text_encoder": True, "train_batch_size": 8}


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_a_lora_learns_on_the_gpu_over_a_rounded_base(settings: dict[str, Any], mixed_precision: str) -> None:
    settings |= {**LORA, "mixed_precision": mixed_precision, "max_train_steps": 200, "learning_rate": 1e-2}
    run = train(settings)
    losses = [line["train_loss"] for line in read_metrics(run.output_dir / "metrics.jsonl")]
    assert losses[-1] < 0.7 * losses[0]
    dtype = DTYPES[mixed_precision]
    for name, parameter in run.model.components.unet.named_parameters():
        assert parameter.dtype == (torch.float32 if ".lora_" in name else dtype), name


@pytest.mark.parametrize("changes", [{}, {"lora_use_dora": True}])
def test_a_lora_of_the_gpu_is_drawn_by_stock_diffusers(
    settings: dict[str, Any], tiny_pipeline: Path, changes: dict[str, Any]
) -> None:
    run = train(settings | LORA, learning_rate=1e-2, **changes)
    components = run.model.components
    export_trained(run.model.family, components, run.recipe, run.output_dir)
    stock = StableDiffusionPipeline.from_pretrained(tiny_pipeline).to("cuda")
    stock.load_lora_weights(run.output_dir)
    with run.validator.evaluating(), run.validator.encoder.on_device():
        pictures = [draw(pipeline) for pipeline in (run.model.family.build_pipeline(components), stock)]
    np.testing.assert_allclose(*pictures, atol=1e-3)


def draw(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("disc", num_inference_steps=3, height=32, width=32, output_type="np", generator=generator).images


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
