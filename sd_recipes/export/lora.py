"""A LoRA as one file: as a run leaves it, or for other programs, in diffusers' keys or kohya's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_recipes.export.safetensors_file import cast, encoder_layer, model_spec, write_tensors
from sd_recipes.export.single_file import architecture_of, generation_of
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

# By which A1111 tells which models a file of kohya's scripts is for, and leaves it out for others.
BASE_VERSIONS = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2-512": "sd_v2",
    "stable-diffusion-v2-768-v": "sd_v2_v",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
}
# What a file says of its tensors, which is no longer true in other keys.
OF_TENSORS = re.compile(rf"format|rank|alpha|{ADAPTER_METADATA}|ss_network_.*|sshs_.*")


@dataclass(frozen=True)
class LoraTarget:
    """The model that a LoRA changes, as far as its file says it."""

    architecture: str  # by the ModelSpec standard
    prediction_type: str | None = None
    xl_unet: Mapping[str, Any] | None = None  # SDXL's UNet's configuration, by which kohya's keys name its layers

    @classmethod
    def of(cls, components: Components) -> LoraTarget:
        is_xl = generation_of(components) == "XL"
        return cls(
            architecture_of(components),
            components.scheduler.config.prediction_type,
            components.unet.config if is_xl else None,
        )


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
        **origin_of(family, recipe),
    }
    path = output_dir / LORA_FILE
    write_tensors(path, cast(diffusers_tensors(lora), "fp32"), metadata)
    return path


def origin_of(family: Family, recipe: Recipe) -> dict[str, str]:
    """What a LoRA's metadata say of the run that trained it, without this machine's folders."""
    return {
        "base_model": shown(recipe.pretrained_model_name_or_path or ""),
        "recipe": recipe_text(recipe, shared=True),
        **encoder_layer(family, recipe.clip_skip),
    }


def origin_in(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a LoRA's metadata say of where it came from."""
    return {name: value for name, value in metadata.items() if not OF_TENSORS.fullmatch(name)}


def export_lora(
    lora: Lora, path: Path, target: LoraTarget, *, kohya: bool, dtype: str, title: str, origin: Mapping[str, str]
) -> str:
    """Write a LoRA, with metadata that say its `origin`; returns the SHA-256 of its tensors.

    Raises RecipeError for values that the type cannot hold, and OSError and SafetensorError if it cannot be written.
    """
    metadata = model_spec(
        architecture=f"{target.architecture}/lora",
        implementation="diffusers",  # whose modules' names both kinds of keys have
        title=title,
        prediction_type=target.prediction_type,
    )
    if kohya:  # what programs show of such a file
        metadata |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank_of(lora)),
            "ss_network_alpha": f"{alpha_of(lora):g}",
            "ss_v2": str("-v2-" in target.architecture),
            "ss_base_model_version": BASE_VERSIONS[target.architecture],
        }
    tensors = kohya_tensors(lora, target.xl_unet) if kohya else diffusers_tensors(with_alpha_of_ranks(lora))
    return write_tensors(path, cast(tensors, dtype), {**origin, **metadata})
