"""A LoRA as one file: as a run leaves it, or for other programs, in diffusers' keys or kohya's."""

from __future__ import annotations

import json
from pathlib import Path

from sd_recipes.export.safetensors_file import cast, model_spec, write_tensors
from sd_recipes.flags import recipe_text
from sd_recipes.model.components import Components
from sd_recipes.model.family import Family
from sd_recipes.model.lora import trained_lora
from sd_recipes.model.lora_files import (
    ADAPTER_METADATA,
    LORA_FILE,
    Lora,
    alpha_of,
    diffusers_tensors,
    kohya_tensors,
    peft_settings,
    rank_of,
    with_alpha_of_ranks,
)
from sd_recipes.recipe import Recipe
from sd_recipes.redaction import shown


def export_trained_lora(family: Family, components: Components, recipe: Recipe, output_dir: Path) -> Path:
    """Write the changes of the components, as they are, in float32; returns the file's path.

    Its metadata say how diffusers scales them, and what they are: rank, alpha, base and recipe, without this machine's
    folders. A kill leaves the old file or the new one. Raises OSError and SafetensorError.
    """
    of_models = {model: trained_lora(getattr(components, model)) for model in ("unet", *family.text_models)}
    lora = {model: layers for model, layers in of_models.items() if layers}
    settings = {f"{model}.{name}": value for model in lora for name, value in peft_settings(lora[model]).items()}
    metadata = {
        ADAPTER_METADATA: json.dumps(settings, sort_keys=True),
        "rank": str(settings["unet.r"]),
        "alpha": f"{settings['unet.lora_alpha']:g}",
        "base_model": shown(recipe.pretrained_model_name_or_path or ""),
        "recipe": recipe_text(recipe, shared=True),
    }
    path = output_dir / LORA_FILE
    write_tensors(path, cast(diffusers_tensors(lora), "fp32"), metadata)
    return path


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
    tensors = cast(kohya_tensors(lora) if kohya else diffusers_tensors(with_alpha_of_ranks(lora)), dtype)
    return write_tensors(path, tensors, {**metadata, **(more or {})})
