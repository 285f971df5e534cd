"""Write what was trained: a pipeline, or a LoRA."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from sd_recipes.export.lora import export_trained_lora
from sd_recipes.model.components import Components
from sd_recipes.model.family import Family
from sd_recipes.recipe import Recipe
from sd_recipes.redaction import shown


def export_trained(family: Family, components: Components, recipe: Recipe, output_dir: Path) -> None:
    """Write what a run by that recipe leaves: the file of a LoRA, or else a whole pipeline. Raises as they do."""
    if recipe.trains_lora:
        export_trained_lora(family, components, recipe, output_dir)
    else:
        export_pipeline(family, components, output_dir)


def export_pipeline(
    family: Family, components: Components, output_dir: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write a folder that the family's pipeline class loads with `from_pretrained`, in safetensors, all in one type.

    Since diffusers loads its parts in float32 and transformers in the type they were saved in. The components are
    in that type afterwards.
    """
    for name in ("unet", *family.text_models):
        if name not in components.as_loaded:
            getattr(components, name).float()  # in place, for the run is over: its weights may be in bfloat16
    pipeline = family.build_pipeline(replace(components, **components.as_loaded))
    if dtype != torch.float32:
        pipeline.to(dtype)
    pipeline.save_pretrained(output_dir, safe_serialization=True)
    for pattern in ("model_index.json", *(f"{name}/*.json" for name in family.folders)):
        for path in output_dir.glob(pattern):
            _forget_folders(path)


def _forget_folders(path: Path) -> None:
    """Of the place that a part was loaded from, which its configuration names, keep only what may be shared."""
    config = json.loads(path.read_text(encoding="utf-8"))
    place = config.get("_name_or_path") if isinstance(config, dict) else None
    if isinstance(place, str) and (kept := shown(place)) != place:
        content = json.dumps({**config, "_name_or_path": kept}, indent=2, sort_keys=True)
        path.write_text(content + "\n", encoding="utf-8")
