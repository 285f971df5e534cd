"""A pipeline as one file in Stable Diffusion's own layout, which A1111, ComfyUI and their like read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from sd_recipes import assets
from sd_recipes.assets import Generation
from sd_recipes.errors import RecipeError
from sd_recipes.export.safetensors_file import DTYPES, cast, check_range, model_spec, write_tensors
from sd_recipes.model.components import Components
from sd_recipes.model.lora_files import lora_parts
from sd_recipes.model.original_layout import original_tensors

logger = logging.getLogger(__name__)

ARCHITECTURES: dict[Generation, str] = {  # as the standard calls them
    1: "stable-diffusion-v1",
    2: "stable-diffusion-v2-768-v",
    "XL": "stable-diffusion-xl-v1-base",
}
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"  # whose names the tensors have
# Empty tensors by whose names programs know what a file does not say otherwise.
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
# What a file cannot say, and programs take for granted: settings of the UNet, and of the noise schedule.
OF_THE_UNET = (
    "block_out_channels", "layers_per_block", "down_block_types", "up_block_types", "cross_attention_dim",
    "attention_head_dim", "in_channels", "out_channels", "use_linear_projection", "transformer_layers_per_block",
    "addition_time_embed_dim", "projection_class_embeddings_input_dim",
)  # fmt: skip
DEFAULTS = {"use_linear_projection": False, "transformer_layers_per_block": 1}
OF_THE_SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")


def export_single_file(
    components: Components, path: Path, *, dtype: str, title: str, resolution: int, more: dict[str, str] | None = None
) -> str:
    """Write the model to a file, with `more` metadata; returns the SHA-256 of its tensors.

    The components are in `dtype` afterwards: beside them, a copy of SDXL would take 7 GB. Says what other programs will
    not take from the file. Raises RecipeError for what it cannot hold, and OSError and SafetensorError if it cannot be
    written.
    """
    check_can_be_one_file(components)
    check_range(tensors_of(components), dtype)
    for module in models_of(components).values():
        for parameter in module.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
    tensors = cast(tensors_of(components), dtype)
    predicts = components.scheduler.config.prediction_type
    if predicts == "v_prediction":
        tensors[V_PREDICTION] = torch.zeros(0)
    if components.scheduler.config.rescale_betas_zero_snr:
        tensors[ZERO_SNR] = torch.zeros(0)
    spec = model_spec(
        architecture=architecture_of(components),
        implementation=IMPLEMENTATION,
        title=title,
        prediction_type=predicts,
        resolution=f"{resolution}x{resolution}",
    )
    say_what_is_lost(components, path)
    return write_tensors(path, tensors, {**spec, **(more or {})})


def models_of(components: Components) -> dict[str, Any]:
    """By part, those that have weights."""
    return {"vae": components.vae, **lora_parts(components)}


def tensors_of(components: Components) -> dict[str, torch.Tensor]:
    """All tensors of a model, by their names in a file; most of them lie in the model's memory."""
    generation = generation_of(components)
    return {
        name: value
        for part, module in models_of(components).items()
        for name, value in original_tensors(part, module.state_dict(), module.config, generation).items()
    }


def check_can_be_one_file(components: Components) -> None:
    """Raises RecipeError for a model that no program could draw with from such a file."""
    if components.scheduler.config.prediction_type == "score":
        raise RecipeError(
            "--to single_file: the model predicts scores, which no program that reads such files can sample from: use "
            "--to pipeline, and draw with `sd-recipes sample`"
        )


def generation_of(components: Any) -> Generation:
    """Of Stable Diffusion: XL has two text encoders; 2 has OpenCLIP's, which its activation tells; else 1."""
    if hasattr(components, "text_encoder_2"):
        return "XL"
    return 2 if components.text_encoder.config.hidden_act == "gelu" else 1


def architecture_of(components: Components) -> str:
    """The standard's name of the model's kind."""
    generation = generation_of(components)
    if generation == 2 and components.scheduler.config.prediction_type != "v_prediction":
        return "stable-diffusion-v2-512"
    return ARCHITECTURES[generation]


def say_what_is_lost(components: Components, path: Path) -> None:
    """Warn of what other programs will take to be otherwise."""
    generation, scheduler = generation_of(components), components.scheduler.config
    folder = assets.CONFIGURATIONS[generation]
    usual = {**DEFAULTS, **json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))}
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    unusual = [name for name in OF_THE_UNET if _plain(components.unet.config[name]) != _plain(usual.get(name))]
    if unusual:
        logger.warning(
            "The UNet is not that of Stable Diffusion %s (%s): programs that take no configuration cannot read %s, as "
            "diffusers does with `config=` and this one with --base.", generation, ", ".join(unusual), path.name,
        )  # fmt: skip
    if odd := [name for name in OF_THE_SCHEDULE if scheduler[name] != schedule[name]]:
        logger.warning(
            "The noise schedule is not Stable Diffusion's (%s), which a file cannot say: other programs will draw by "
            "that one.", ", ".join(f"{name} {scheduler[name]}" for name in odd),
        )  # fmt: skip
    if scheduler.prediction_type == "sample":
        logger.warning(
            "The model predicts x_0, which the file says in modelspec.prediction_type only: ComfyUI draws from it with "
            "its node ModelSamplingDiscrete set to x0, and others take it for epsilon."
        )
    if generation == 1 and scheduler.prediction_type == "v_prediction":
        logger.warning(
            "The model predicts v, which the file says by a tensor `%s` and modelspec.prediction_type: A1111 takes a "
            "Stable Diffusion 1 for epsilon unless a %s beside it has `parameterization: v`.",
            V_PREDICTION, path.with_suffix(".yaml").name,
        )  # fmt: skip


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
