"""The model as it was before training, for prior preservation: its predictions of class pictures are their targets.

What a class looked like to the model is then kept whatever the class pictures show; they need not be the model's own.
With a LoRA it is the same model without its changes; otherwise a copy of what is trained, in the run's precision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from sd_recipes.data.batches import Batch
from sd_recipes.model.components import Components
from sd_recipes.model.conditioning import unet_arguments
from sd_recipes.model.family import Family
from sd_recipes.model.lora import without_lora
from sd_recipes.model.placement import apply_memory_format, trained_text_models
from sd_recipes.recipe import Recipe


@dataclass(frozen=True)
class FrozenModel:
    """The family's components as they were loaded, and how its UNet is called."""

    family: Family
    components: Components
    unet: Callable[..., Any]
    copies: tuple[torch.nn.Module, ...]  # that were made for it
    with_lora: tuple[torch.nn.Module, ...]  # whose LoRA is left out in a prediction
    dtype: torch.dtype

    def called_as(self, unet: Callable[..., Any]) -> FrozenModel:
        """Of a run whose UNet is prepared as `unet`, which it calls too, unless it has a copy."""
        return self if self.copies else replace(self, unet=unet)

    @torch.no_grad()
    def predict(self, batch: Batch, noisy_latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) float32: the prediction of a batch's noisy latents at timesteps, by the batch's captions."""
        with ExitStack() as left_out:
            for module in self.with_lora:
                left_out.enter_context(without_lora(module))
            states = self.family.encode_text(self.components, batch.input_ids)
            conditioning = self.family.conditioning(states, batch)
            prediction: torch.Tensor = self.unet(
                noisy_latents.to(self.dtype), timesteps, **unet_arguments(conditioning), return_dict=False
            )[0]
        return prediction.float()


def frozen_model(
    recipe: Recipe, family: Family, components: Components, device: torch.device, dtype: torch.dtype
) -> FrozenModel:
    """What `components` are as they were loaded; to be called before they are moved, and trained."""
    trained = [components.unet, *trained_text_models(family, components)]
    if recipe.trains_lora:
        return FrozenModel(family, components, components.unet, (), tuple(trained), torch.float32)
    copies: dict[str, Any] = {
        name: copy.deepcopy(getattr(components, name)).to(device, dtype).requires_grad_(False).eval()
        for name in ("unet", *family.text_models)
        if any(getattr(components, name) is each for each in trained)
    }
    apply_memory_format(copies["unet"], recipe, device, dtype)
    return FrozenModel(family, replace(components, **copies), copies["unet"], tuple(copies.values()), (), dtype)
