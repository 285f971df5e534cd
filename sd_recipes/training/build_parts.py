"""Build what is trained: parts of the pipeline or LoRAs of them, and the learned uncertainty."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from sd_recipes.evaluation.uncertainty_plot import draw_uncertainty
from sd_recipes.model.components import Components
from sd_recipes.model.family import Family
from sd_recipes.model.lora import add_lora, trained_lora
from sd_recipes.model.lora_files import peft_settings
from sd_recipes.recipe import Recipe
from sd_recipes.redaction import redacted
from sd_recipes.training.objective import NoiseSchedule
from sd_recipes.training.rates import set_rates
from sd_recipes.training.state import TrainedPart
from sd_recipes.training.uncertainty import CONFIG, LEARNING_RATE, Uncertainty

# Of a part's folder in a checkpoint: by diffusers' name, or by transformers'.
UNET_WEIGHTS, WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
UNCERTAINTY = "uncertainty"
LORA = "_lora"  # suffix of the parts that are LoRAs of a component


def choose_trained(recipe: Recipe, family: Family, components: Components) -> None:
    """Let gradients reach what is trained besides the UNet, or a LoRA in its place. Raises RecipeError."""
    if recipe.trains_lora:
        add_lora(recipe, family, components)
    elif recipe.train_text_encoder:
        unused = family.without_effect(components)
        for name in family.text_models:
            for parameter_name, parameter in getattr(components, name).named_parameters():
                # What no loss depends on gets no gradient, and weight decay alone must not move it.
                parameter.requires_grad_(not parameter_name.startswith(unused.get(name, ())))


def trained_parts(recipe: Recipe, family: Family, components: Components, batch_size: int) -> dict[str, TrainedPart]:
    """What is trained, by name: parts of the components or LoRAs of them, and the learned uncertainty."""
    factor = batch_size if recipe.scale_lr else 1
    learning_rates = {"unet": recipe.learning_rate * factor}
    if recipe.train_text_encoder or recipe.lora_text_encoder:
        own = recipe.text_encoder_learning_rate
        learning_rates |= dict.fromkeys(family.text_models, (recipe.learning_rate if own is None else own) * factor)
    make = lora_part if recipe.trains_lora else whole_part
    parts: dict[str, TrainedPart] = {}
    for component, learning_rate in learning_rates.items():
        part = make(component, getattr(components, component).train(), learning_rate)
        parts[part.name] = part
    set_rates(list(parts.values()), recipe.param_groups or [], factor)
    if recipe.learned_uncertainty:
        parts[UNCERTAINTY] = uncertainty_part(components.scheduler, components.unet.device)
    return parts


def part_of(parts: Mapping[str, TrainedPart], component: str) -> TrainedPart:
    """The part that trains a component, itself or by a LoRA."""
    return parts.get(component) or parts[component + LORA]


def whole_part(component: str, module: Any, learning_rate: float) -> TrainedPart:
    """A component of the pipeline."""
    # FSDP changes the name of a module's class, so its configuration is taken before that.
    if component == "unet":
        config, rebuild = redacted(module.to_json_string()), partial(rebuild_unet, module.config)
        return TrainedPart(component, module, UNET_WEIGHTS, config, learning_rate, rebuild)
    return TrainedPart(component, module, WEIGHTS, redacted(module.config.to_json_string()), learning_rate)


def lora_part(component: str, module: Any, learning_rate: float) -> TrainedPart:
    """The LoRA of a component."""
    config = json.dumps(peft_settings(trained_lora(module)), indent=1) + "\n"
    return TrainedPart(component + LORA, module, WEIGHTS, config, learning_rate, is_whole=False)


def uncertainty_part(scheduler: DDPMScheduler, device: torch.device) -> TrainedPart:
    """The learned uncertainty, of which a run leaves a drawing."""
    uncertainty = Uncertainty(NoiseSchedule(scheduler, device))

    def export(tensors: Mapping[str, torch.Tensor], output_dir: Path) -> None:
        draw_uncertainty(uncertainty.by_timestep(tensors["weight"]), output_dir / "uncertainty.png")

    return TrainedPart(UNCERTAINTY, uncertainty, WEIGHTS, CONFIG, LEARNING_RATE, export=export)


def rebuild_unet(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A frozen UNet in float32 from whole tensors, which it uses without copying them if they are."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
    unet.load_state_dict(dict(tensors), assign=True)
    return unet.float().requires_grad_(False).eval()
