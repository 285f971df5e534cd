"""LoRAs of the tiny SDXL: random changes of every layer that one may change, and what is drawn with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from sd_recipes.model.lora_files import LoraLayer, lora_parts, merge_lora


def load(model: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: StableDiffusionXLPipeline) -> np.ndarray:
    pixels: np.ndarray = pipeline(
        "disc number 2", num_inference_steps=2, height=32, width=32, output_type="np",
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]  # fmt: skip
    return pixels


def random_lora(
    pipeline: StableDiffusionXLPipeline, *parts: str, alpha: float = 3.0
) -> dict[str, dict[str, LoraLayer]]:
    """Of rank 2, of all layers of these parts (default: of all parts) that files have names for."""
    torch.manual_seed(1)
    lora: dict[str, dict[str, LoraLayer]] = {}
    for part, model in lora_parts(pipeline).items():
        for name, module in model.named_modules():
            is_layer = isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name != "text_projection"
            if is_layer and (not parts or part in parts):
                shape: Any = module.weight.shape
                down, up = torch.randn(2, *shape[1:]), torch.randn(shape[0], 2, *[1] * (len(shape) - 2))
                lora.setdefault(part, {})[name] = LoraLayer(0.1 * down, 0.1 * up, alpha)
    return lora


def drawn_with(model: Path, file: Path) -> np.ndarray:
    """By stock diffusers."""
    pipeline = load(model)
    pipeline.load_lora_weights(str(file))
    return picture(pipeline)


def drawn_merged(model: Path, lora: dict[str, dict[str, LoraLayer]]) -> np.ndarray:
    pipeline = load(model)
    merge_lora(lora_parts(pipeline), lora)
    return picture(pipeline)
