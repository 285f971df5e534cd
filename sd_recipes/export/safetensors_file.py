"""One safetensors file for other programs: in a type, with metadata by the ModelSpec standard, whole or not at all.

The standard is Stability AI's (github.com/Stability-AI/ModelSpec, version 1.0.1).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from sd_recipes.errors import RecipeError
from sd_recipes.model.family import Family
from sd_recipes.model.sources import ENCODER_LAYER
from sd_recipes.writing import replacing

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HASH = "modelspec.hash_sha256"
NO_HASH = f"0x{'0' * 64}"  # as long as one, which takes its place
PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


def model_spec(
    *,
    architecture: str,
    implementation: str,
    title: str,
    prediction_type: str | None = None,
    resolution: str | None = None,
) -> dict[str, str]:
    """Metadata of a model, with the present date; the hash is filled in by `write_tensors`."""
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture,
        "implementation": implementation,
        "title": title,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "prediction_type": PREDICTION_TYPES.get(prediction_type or ""),
        "resolution": resolution,
    }
    return {f"modelspec.{name}": value for name, value in spec.items() if value is not None}


def encoder_layer(family: Family, clip_skip: int | None) -> dict[str, str]:
    """What a model's metadata say of its --clip_skip: which layer from the end its text states are of."""
    return {} if clip_skip is None else {ENCODER_LAYER: str(family.encoder_layer(clip_skip))}


def cast(tensors: Mapping[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """In `dtype`, but for whole numbers. Raises RecipeError as `check_range`."""
    check_range(tensors, dtype)
    return {
        name: (value.to(DTYPES[dtype]) if value.is_floating_point() else value).contiguous()
        for name, value in tqdm(tensors.items(), desc=f"To {dtype}", unit="tensor", leave=False)
    }


def check_range(tensors: Mapping[str, torch.Tensor], dtype: str) -> None:
    """Raises RecipeError for values that the type cannot hold, which would draw nothing but black."""
    if dtype != "fp16":
        return
    highest = torch.finfo(torch.float16).max
    for name, value in tensors.items():
        if value.is_floating_point() and value.numel() and (largest := float(value.abs().max())) > highest:
            raise RecipeError(
                f"--dtype fp16 holds values up to {highest:.0f}, and {name} has {largest:.3g}: use --dtype bf16 or fp32"
            )


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Write a file in the place of what is there; returns the SHA-256 of its tensors.

    Raises OSError and SafetensorError; what was there is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        save_file(dict(tensors), beside, {"format": "pt", **metadata, HASH: NO_HASH})
        digest = hash_of_tensors(beside)
        with beside.open("r+b") as file:
            header = file.read(8 + _header_length(beside))
            file.seek(header.index(NO_HASH.encode()))
            file.write(f"0x{digest}".encode())
            file.flush()
            os.fsync(file.fileno())
    return digest


def hash_of_tensors(path: Path) -> str:
    """SHA-256 of all that follows a safetensors file's header."""
    with path.open("rb") as file:
        file.seek(8 + _header_length(path))
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header_length(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")
