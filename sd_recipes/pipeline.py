"""Components to a StableDiffusionPipeline: for validation pictures, and as a folder at the end."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from diffusers import StableDiffusionPipeline

from sd_recipes.model.components import Components


def build_pipeline(components: Components) -> StableDiffusionPipeline:
    """A pipeline over the live components; without a safety checker, as none was loaded."""
    return StableDiffusionPipeline(
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        unet=components.unet,
        scheduler=copy.deepcopy(components.sampler),  # sampling leaves state in it
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export_pipeline(components: Components, output_dir: Path) -> None:
    """Write a folder that StableDiffusionPipeline.from_pretrained loads, in safetensors, all parts in float32.

    In one type, since diffusers loads its parts in float32 and transformers in the type in which they were saved.
    """
    build_pipeline(replace(components, **components.as_loaded)).save_pretrained(output_dir, safe_serialization=True)
