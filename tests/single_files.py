"""Checkpoints in one file, in Stable Diffusion's own layout, made of a pipeline's parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sd_recipes.assets import Generation
from sd_recipes.model.original_layout import open_clip_name, unet_name, vae_name

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


def part_of(pipeline: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(pipeline / part / WEIGHTS[part])


def config_of(pipeline: Path, part: str) -> dict[str, Any]:
    return json.loads((pipeline / part / "config.json").read_text())


def original_unet(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {f"model.diffusion_model.{unet_name(name, config)}": value for name, value in tensors.items()}


def original_vae(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """With the attention's matrices as convolutions of one pixel, as the original has them."""
    original = {}
    for name, value in tensors.items():
        is_matrix = "attentions" in name and value.ndim == 2
        original[f"first_stage_model.{vae_name(name, config)}"] = value[:, :, None, None] if is_matrix else value
    return original


def original_text(
    generation: Generation, tensors: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The text encoder of Stable Diffusion 1 or 2, or both of XL."""
    if generation == 1:
        return original_clip(tensors, "cond_stage_model.transformer.text_model.")
    if generation == 2:
        return with_unused_layer(original_open_clip(tensors, "cond_stage_model.model."))
    assert second is not None
    first = original_clip(tensors, "conditioner.embedders.0.transformer.text_model.")
    return {**first, **original_open_clip(second, "conditioner.embedders.1.model.")}


def original_clip(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """In transformers' names of that time."""
    original = {f"{prefix}{name}": value for name, value in tensors.items()}
    num_positions = tensors["embeddings.position_embedding.weight"].shape[0]
    return {**original, f"{prefix}embeddings.position_ids": torch.arange(num_positions)[None]}


def original_open_clip(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """With three projections in one tensor, and the text's projection as a matrix from the right."""
    original = {f"{prefix}logit_scale": torch.zeros(())}
    for name, value in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        old = open_clip_name(name)
        if ".q_proj." in name:
            old = old.replace("q_proj.", "in_proj_")
            value = torch.cat([tensors[name.replace(".q_proj.", f".{each}_proj.")] for each in "qkv"])
        original[prefix + old] = value.T if old == "text_projection" else value
    return original


def with_unused_layer(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With a last layer and a projection, which Stable Diffusion 2 does not use."""
    layers = {int(name.split("resblocks.")[1].split(".")[0]) for name in original if "resblocks." in name}
    last, unused = f"resblocks.{max(layers)}.", f"resblocks.{max(layers) + 1}."
    copied = {name.replace(last, unused): torch.zeros_like(value) for name, value in original.items() if last in name}
    width = original["cond_stage_model.model.ln_final.weight"].shape[0]
    return {**original, **copied, "cond_stage_model.model.text_projection": torch.zeros(width, width)}


def single_file(
    path: Path,
    pipeline: Path,
    *,
    generation: Generation = 1,
    parts: tuple[str, ...] = ("unet", "vae", "text_encoder"),
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
    **more: torch.Tensor,
) -> Path:
    """Write a pipeline's parts to one file; `more` are tensors to add."""
    tensors: dict[str, torch.Tensor] = dict(more)
    if "unet" in parts:
        tensors |= original_unet(part_of(pipeline, "unet"), config_of(pipeline, "unet"))
    if "vae" in parts:
        tensors |= original_vae(part_of(pipeline, "vae"), config_of(pipeline, "vae"))
    if "text_encoder" in parts:
        second = part_of(pipeline, "text_encoder_2") if generation == "XL" else None
        tensors |= original_text(generation, part_of(pipeline, "text_encoder"), second)
    kept = {
        name: value if dtype is None or not value.is_floating_point() else value.to(dtype)
        for name, value in tensors.items()
    }
    save_file({name: value.contiguous() for name, value in kept.items()}, path, metadata=metadata)
    return path
