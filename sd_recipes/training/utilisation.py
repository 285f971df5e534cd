"""How much of a device a run uses: the model's arithmetic against the device's peak.

Chowdhery et al. 2022, appendix B, model FLOPs utilization.

Counted is the UNet's forward and backward pass, whatever else a step computes: not the VAE and the text encoder, the
optimizer, or what gradient checkpointing recomputes.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from sd_recipes.model.conditioning import Conditioning, unet_arguments

Peaks = dict[str, float]  # teraflop/s of dense products by precision, with float32 sums

# From NVIDIA's data sheets (H100, H200, A100, L40S, L4, V100, T4; those with sparsity halved) and white papers (Ada GPU
# architecture, appendix A; GA102, table 2).
HOPPER_SXM: Peaks = {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67}
HOPPER_NVL: Peaks = {"bf16": 835, "fp16": 835, "tf32": 417, "fp32": 60}
A100: Peaks = {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}
V100_SXM: Peaks = {"fp16": 125, "fp32": 15.7}
V100_PCIE: Peaks = {"fp16": 112, "fp32": 14}
# By the whole name that torch gives a device: slices (MIG), boards of laptops and smaller cards have similar ones.
PEAKS: dict[str, Peaks] = {
    "NVIDIA H100 80GB HBM3": HOPPER_SXM,
    "NVIDIA H100 NVL": HOPPER_NVL,
    "NVIDIA H100 PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51},
    "NVIDIA H200": HOPPER_SXM,
    "NVIDIA H200 NVL": HOPPER_NVL,
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100 80GB PCIe": A100,
    "NVIDIA L40S": {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6},
    "NVIDIA L4": {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3},
    "NVIDIA GeForce RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "NVIDIA GeForce RTX 3090": {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6},
    "Tesla V100-SXM2-16GB": V100_SXM,
    "Tesla V100-SXM2-32GB": V100_SXM,
    "Tesla V100-PCIE-16GB": V100_PCIE,
    "Tesla V100-PCIE-32GB": V100_PCIE,
    "Tesla T4": {"fp16": 65, "fp32": 8.1},
}


def peak_of(device_name: str, precision: str) -> float | None:
    """Teraflop/s of a device at best; None if nobody has written it down."""
    return PEAKS.get(device_name, {}).get(precision)


def flops_of(unet: Any, latents: torch.Tensor, conditioning: Conditioning) -> int:
    """Floating-point operations of an image in a training step, from latents (B, C, h, w) and what goes with them.

    A backward pass takes twice a forward pass; where the UNet's own weights are frozen, once. Counted on a UNet of the
    same configuration without memory.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        same = UNet2DConditionModel.from_config(dict(unet.config))
        named = {name: on_meta(each) for name, each in conditioning.items()}
        same(on_meta(latents), torch.zeros(len(latents), dtype=torch.int64), **unet_arguments(named))
    is_trained = any(each.requires_grad for name, each in unet.named_parameters() if ".lora_" not in name)
    return int(counter.get_total_flops()) // len(latents) * (3 if is_trained else 2)


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """As many numbers without memory, those with fractions in float32."""
    return tensor.to("meta", torch.float32 if tensor.is_floating_point() else tensor.dtype)


class Utilisation:
    """Counts an image's arithmetic at the run's first step, and says of a speed how much of the device it is."""

    def __init__(self, unet: Any, accelerator: Accelerator, *, allow_tf32: bool) -> None:
        self.unet, self.num_processes = unet, accelerator.num_processes
        self.flops: int | None = None  # of an image
        precision = accelerator.mixed_precision
        if precision == "no":
            precision = "tf32" if allow_tf32 else "fp32"
        self.peak: float | None = None  # teraflop/s
        if accelerator.device.type == "cuda":
            self.peak = peak_of(torch.cuda.get_device_name(accelerator.device), precision)

    def note(self, latents: torch.Tensor, conditioning: Conditioning) -> None:
        """Count the arithmetic of what a step feeds the UNet with, once; sizes of pictures have about one area."""
        if self.flops is None:
            self.flops = flops_of(self.unet, latents, conditioning)

    def figures(self, images_per_second: float) -> dict[str, float]:
        """Of each device: teraflop/s, and their share of its peak where that is known. Class pictures are images."""
        if not self.flops:
            return {}
        teraflops = images_per_second * self.flops / self.num_processes / 1e12
        return {"teraflops": teraflops, **({"mfu": teraflops / self.peak} if self.peak else {})}
