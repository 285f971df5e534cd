"""Components to a StableDiffusionPipeline: for validation pictures, and as a folder at the end."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

from diffusers import StableDiffusionPipeline

from sd_recipes.model.components import Components
from sd_recipes.redaction import shown

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")  # folders of the pipeline's folder


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
    for path in [
        output_dir / "model_index.json",
        *(path for part in PARTS for path in output_dir.glob(f"{part}/*.json")),
    ]:
        _forget_folders(path)


def _forget_folders(path: Path) -> None:
    """Of the place from which a part was loaded, which its configuration names, keep what others may read."""
    config = json.loads(path.read_text())
    place = config.get("_name_or_path") if isinstance(config, dict) else None
    if isinstance(place, str) and (kept := shown(place)) != place:
        path.write_text(json.dumps({**config, "_name_or_path": kept}, indent=2, sort_keys=True) + "\n")
