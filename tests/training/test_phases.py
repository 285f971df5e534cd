"""What the time of a step goes to, and how much of a device it uses."""

from __future__ import annotations

import gzip
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from training_runs import assert_equal, train, weights

from sd_recipes.runtime.trackers import read_metrics
from sd_recipes.training import phases
from sd_recipes.training.phases import phases_of, table
from sd_recipes.training.utilisation import flops_of, peak_of


def test_steps_are_profiled_by_phase_and_the_weights_stay_the_same(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"max_train_steps": 6, "use_ema": True}
    plain = train(settings, output_dir=settings["output_dir"] + "-plain")
    run = train(settings, profile_steps=2)
    assert_equal(weights(plain), weights(run))
    told, folder = capsys.readouterr().out, run.output_dir / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000005.json.gz", "step-000005.txt"]
    lines = (folder / "step-000005.txt").read_text()
    assert lines in told + "\n"
    assert "of steps 4 to 5, whose trace is" in told
    milliseconds = {line.split()[0]: float(line.split()[1]) for line in lines.splitlines()[1:]}
    assert list(milliseconds) == [
        "data",
        "encode",
        "forward",
        "backward",
        "optimizer",
        "average",
        "log",
        "other",
        "all",
    ]
    assert milliseconds["backward"] > milliseconds["average"] > 0
    with gzip.open(folder / "step-000005.json.gz", "rt") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]
    assert names.count("phase: forward") == 2
    figures = read_metrics(run.output_dir / "metrics.jsonl")[-1]
    assert run.model.utilisation is not None
    assert run.model.utilisation.flops is not None
    assert figures["teraflops"] == pytest.approx(
        figures["images_per_second"] * run.model.utilisation.flops / 1e12, rel=1e-6
    )
    assert "mfu" not in figures, "nobody knows this processor's peak"
    assert "teraflops" not in read_metrics(plain.output_dir / "metrics.jsonl")[-1]


def test_a_run_that_is_too_short_says_that_nothing_was_profiled(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run = train(settings, max_train_steps=2, profile_steps=1)
    assert "--profile_steps profiled nothing: the run made no more than its first 3 steps." in caplog.text
    assert not (run.output_dir / "profile").exists()


@pytest.mark.parametrize("broken", ["start", "export_chrome_trace"])
def test_whatever_goes_wrong_training_continues(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("kineto is not there")

    monkeypatch.setattr(torch.profiler.profile, broken, fail)
    with caplog.at_level(logging.WARNING):
        run = train(settings, max_train_steps=5, profile_steps=1)
    folder = run.output_dir / "profile"
    assert f"No profile in {folder} (RuntimeError: kineto is not there): training continues." in caplog.text
    assert run.state.progress.global_step == 5
    assert not list(folder.glob("*.txt"))


def test_a_profile_takes_no_time_of_the_steps(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if beginning or ending one took a thousand seconds."""
    clock, passed = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(passed))
    monkeypatch.setattr(phases.Profiler, "step", lambda profiler, number: passed.append(1000.0))
    run = train(settings, max_train_steps=2)
    assert len(passed) == 3
    assert read_metrics(run.output_dir / "metrics.jsonl")[-1]["images_per_second"] > 0.01


def event(category: str, name: str, begin: float, length: float, correlation: int | None = None) -> dict[str, Any]:
    return {"cat": category, "name": name, "ts": begin, "dur": length, "args": {"correlation": correlation}}


def test_what_a_gpu_does_belongs_to_the_phase_that_asked_for_it() -> None:
    """From whichever thread, and whenever it is done; a phase within another counts once."""
    found = phases_of([
        event("user_annotation", "phase: backward", 100, 50), event("user_annotation", "phase: optimizer", 200, 100),
        event("user_annotation", "phase: average", 240, 20), event("user_annotation", "something else", 0, 1000),
        event("cuda_runtime", "cudaLaunchKernel", 110, 1, 1), event("kernel", "convolution", 400, 70, 1),
        event("cuda_runtime", "cudaLaunchKernel", 250, 1, 2), event("kernel", "lerp", 500, 30, 2),
        event("cuda_runtime", "cudaMemcpyAsync", 270, 1, 3),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 600, 5, 3),
        event("cuda_runtime", "cudaStreamSynchronize", 280, 9, 4),
        event("cuda_driver", "cuLaunchKernel", 350, 1, 5), event("kernel", "of nobody", 700, 4, 5),
    ])  # fmt: skip
    assert dict(found.host) == {"backward": 50, "optimizer": 80, "average": 20}
    assert dict(found.device) == {"backward": 70, "average": 30, "optimizer": 5, "other": 4}
    assert found.waits == {"optimizer": 1}
    assert found.pageable == {"optimizer": 1}
    assert [line.split() for line in table(found, 2, 0.0003).splitlines()[1:]] == [
        ["backward", "0.03", "0.04", "0.0", "0.0"], ["optimizer", "0.04", "0.00", "0.5", "0.5"],
        ["average", "0.01", "0.01", "0.0", "0.0"], ["other", "0.07", "0.00", "0.0", "0.0"],
        ["all", "0.15", "0.05", "0.5", "0.5"],
    ]  # fmt: skip


def test_the_arithmetic_of_an_image_is_that_of_all_products(tiny_pipeline: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
    latents = torch.zeros(3, 4, 16, 16)
    conditioning = {"encoder_hidden_states": torch.zeros(3, 32, unet.config.cross_attention_dim)}
    counted = flops_of(unet, latents, conditioning)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        unet(latents, torch.zeros(3, dtype=torch.int64), **conditioning, return_dict=False)[0].sum().backward()
    assert 3 * counted == pytest.approx(counter.get_total_flops(), rel=0.05)
    # Captions and the first layer need no gradient back: 4 % of this UNet, and 0.1 % of Stable Diffusion 1.5's.
    unet.requires_grad_(False)
    assert flops_of(unet, latents, conditioning) == counted * 2 // 3


@pytest.mark.parametrize(("name", "precision", "expected"), [
    ("NVIDIA H100 80GB HBM3", "bf16", 989), ("NVIDIA H100 PCIe", "tf32", 378), ("NVIDIA H200", "fp32", 67),
    ("NVIDIA H200 NVL", "bf16", 835), ("NVIDIA A100-SXM4-80GB", "fp16", 312), ("NVIDIA L4", "bf16", 121),
    ("NVIDIA GeForce RTX 4090", "bf16", 165.2), ("Tesla T4", "fp16", 65), ("Tesla T4", "bf16", None),
    ("NVIDIA L40", "bf16", None), ("NVIDIA RTX A1000", "bf16", None), ("NVIDIA T400", "fp16", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None), ("NVIDIA GeForce RTX 4090 D", "bf16", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None), ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16", None),
    ("Something New", "bf16", None),
])  # fmt: skip
def test_peaks_are_of_whole_names_alone(name: str, precision: str, expected: float | None) -> None:
    assert peak_of(name, precision) == expected


@pytest.mark.slow
def test_an_sdxl_run_is_counted_too(xl_settings: dict[str, Any]) -> None:
    run = train(xl_settings, profile_steps=1, max_train_steps=4, lora_rank=2)
    assert run.model.utilisation is not None
    assert run.model.utilisation.flops
    assert (run.output_dir / "profile" / "step-000004.txt").is_file()
