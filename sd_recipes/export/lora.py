"""Write a LoRA to one file, as diffusers' `load_lora_weights` reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save_file

from sd_recipes.flags import recipe_text
from sd_recipes.model.components import Components
from sd_recipes.model.family import Family
from sd_recipes.model.lora import LORA_FILE, lora_config, lora_layers, lora_tensors
from sd_recipes.recipe import Recipe
from sd_recipes.redaction import shown
from sd_recipes.writing import replacing


def export_lora(family: Family, components: Components, recipe: Recipe, output_dir: Path) -> Path:
    """Write the changes of the components, as they are, in float32; returns the file's path.

    Its metadata say how diffusers scales them, and what they are: rank, alpha, base and recipe, without this machine's
    folders. A kill leaves the old file or the new one. Raises OSError and SafetensorError.
    """
    tensors: dict[str, torch.Tensor] = {}
    config: dict[str, Any] = {}
    for model in ("unet", *family.text_models):
        module = getattr(components, model)
        if lora_layers(module):
            tensors |= {
                name: tensor.float().cpu().contiguous() for name, tensor in _named(model, lora_tensors(module)).items()
            }
            config |= {f"{model}.{name}": value for name, value in lora_config(module).items()}
    metadata = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(config, sort_keys=True),
        "rank": str(config["unet.r"]),
        "alpha": f"{config['unet.lora_alpha']:g}",
        "base_model": shown(recipe.pretrained_model_name_or_path or ""),
        "recipe": recipe_text(recipe, shared=True),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / LORA_FILE
    with replacing(path) as beside:
        save_file(tensors, beside, metadata)
    return path


def _named(model: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names that diffusers reads: peft's, with the model in front.

    CLIP's layers are named as all versions of diffusers, and other tools, know them, and DoRA's lengths as
    transformers (5.23) does. If none of its attention is changed, diffusers (0.42) understands only its own earlier
    names of the two matrices.
    """
    if model == "unet":
        return {f"{model}.{name}": tensor for name, tensor in tensors.items()}
    others = {".lora_magnitude_vector": ".lora_magnitude_vector.weight"}
    if not any("self_attn" in name for name in tensors):
        others |= {".lora_A.": ".lora_linear_layer.down.", ".lora_B.": ".lora_linear_layer.up."}
    return {
        reduce(lambda text, names: text.replace(*names), others.items(), f"{model}.text_model.{name}"): tensor
        for name, tensor in tensors.items()
    }
