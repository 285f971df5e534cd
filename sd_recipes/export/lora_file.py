"""A LoRA as one file, in diffusers' keys or kohya's."""

from __future__ import annotations

from pathlib import Path

from sd_recipes.export.safetensors_file import cast, model_spec, write_tensors
from sd_recipes.model.lora_files import Lora, alpha_of, diffusers_tensors, kohya_tensors, rank_of


def export_lora(
    lora: Lora,
    path: Path,
    *,
    kohya: bool,
    dtype: str,
    title: str,
    architecture: str,
    prediction_type: str | None = None,
    more: dict[str, str] | None = None,
) -> str:
    """Write a LoRA for models of an architecture, with `more` metadata; returns the SHA-256 of its tensors.

    Raises RecipeError for values that the type cannot hold, and OSError and SafetensorError if it cannot be written.
    """
    metadata = model_spec(
        architecture=f"{architecture}/lora",
        implementation="diffusers",  # whose modules' names both kinds of keys have
        title=title,
        prediction_type=prediction_type,
    )
    if kohya:  # what programs show of such a file
        metadata |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank_of(lora)),
            "ss_network_alpha": f"{alpha_of(lora):g}",
            "ss_v2": str("-v2-" in architecture),
        }
    tensors = cast(kohya_tensors(lora) if kohya else diffusers_tensors(lora), dtype)
    return write_tensors(path, tensors, {**metadata, **(more or {})})
