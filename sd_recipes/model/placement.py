"""How the models run, never what they compute: precision, memory format, attention, checkpointing, compilation."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D

from sd_recipes.errors import RecipeError
from sd_recipes.model.components import Components
from sd_recipes.model.family import Family
from sd_recipes.model.lora import lora_layers
from sd_recipes.model.narrow_heads import widen_narrow_heads
from sd_recipes.recipe import MemoryConfig, Recipe

logger = logging.getLogger(__name__)


def kept_as_loaded(family: Family, recipe: Recipe) -> tuple[str, ...]:
    """The frozen models that a run exports as they came, though it runs them rounded; a LoRA's exports none."""
    if recipe.trains_lora or (recipe.mixed_precision or "no") == "no":
        return ()
    return ("vae",) if recipe.train_text_encoder else ("vae", *family.text_models)


def keep_as_loaded(components: Components, names: Iterable[str]) -> None:
    """Keep models in float32 in host memory, and run copies of them, which may be rounded.

    Until the run ends they take 4 bytes per parameter: 0.83 GB for Stable Diffusion 1.5.
    """
    for name in names:
        components.as_loaded[name] = getattr(components, name)
        setattr(components, name, copy.deepcopy(components.as_loaded[name]))


def move_models(
    family: Family,
    components: Components,
    config: MemoryConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    contiguous_unet: bool,
) -> None:
    """Move the text models and the UNet to `device`, what is frozen of them in `dtype`, arranged as configured.

    `contiguous_unet` keeps the UNet out of channels last, for an optimizer that would undo it.
    """
    unet = components.unet
    for model in (unet, *(getattr(components, name) for name in family.text_models)):
        is_trained_whole = any(each.requires_grad for each in model.parameters()) and not lora_layers(model)
        for parameter in model.parameters():
            if config.weights_dtype == "bf16" and parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
            elif not parameter.requires_grad and not is_trained_whole:  # otherwise it is saved with what is trained
                parameter.data = parameter.data.to(dtype)
        model.to(device)
    if not contiguous_unet:
        apply_memory_format(unet, config, device, dtype)
        keep_memory_format(unet)
        for layer in lora_layers(unet).values():
            for parameter in layer.lora_A.parameters():  # of a convolution: DoRA views it as a matrix
                parameter.data = parameter.data.contiguous()
    if config.gradient_checkpointing_blocks:
        checkpoint_blocks(unet, config.gradient_checkpointing_blocks)
    elif config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        for text_model in trained_text_models(family, components):
            # What a frozen layer gives to one with a LoRA needs no gradient, which the other kind takes for an end.
            text_model.activation_checkpointing_enable({"use_reentrant": False})
    if device.type == "cpu":
        widen_narrow_heads(unet)
    if config.enable_xformers_memory_efficient_attention:
        if importlib.util.find_spec("xformers"):
            unet.enable_xformers_memory_efficient_attention()
        else:
            logger.warning("xFormers is not installed: PyTorch's own memory-efficient attention is used.")


def trained_text_models(family: Family, components: Components) -> list[Any]:
    """Those of the text models that are trained, whole or by a LoRA."""
    models = [getattr(components, name) for name in family.text_models]
    return [model for model in models if any(parameter.requires_grad for parameter in model.parameters())]


def checkpoint_blocks(unet: Any, names: Sequence[str]) -> None:
    """Let only some of the UNet's blocks recompute their activations. Raises RecipeError for one that there is not."""
    blocks = {f"down.{number}": block for number, block in enumerate(unet.down_blocks)}
    blocks |= {"mid": unet.mid_block} | {f"up.{number}": block for number, block in enumerate(unet.up_blocks)}
    for name in names:
        if name not in {*blocks, *(block.partition(".")[0] for block in blocks)}:
            raise RecipeError(
                f"--gradient_checkpointing_blocks {name}: the UNet has no such block: give some of down, up, "
                f"{', '.join(blocks)}"
            )
    unet.enable_gradient_checkpointing()
    for name, block in blocks.items():
        for module in block.modules() if {name, name.partition(".")[0]}.isdisjoint(names) else ():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def keep_memory_format(unet: Any) -> None:
    """Let a UNet's upsampling leave tensors in the memory format that they come in, whatever the batch.

    From 64 images on diffusers (0.42) makes them contiguous, since CUDA's kernel for channels last takes at most 2³¹
    elements (huggingface/diffusers#984): two copies of the activations, both ways.
    """
    for module in unet.modules():
        if isinstance(module, Upsample2D) and module.norm is None and module.interpolate and module.name == "conv":
            module.__class__ = _Upsampling


class _Upsampling(Upsample2D):
    """(B, C, h, w) to (B, C', 2h, 2w) or of `output_size`, to the same values as diffusers' module."""

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        height, width = output_size or (2 * hidden_states.shape[-2], 2 * hidden_states.shape[-1])
        plain = not self.use_conv or self.use_conv_transpose
        if plain or len(hidden_states) < 64 or hidden_states.shape[:2].numel() * height * width >= 2**31:
            return super().forward(hidden_states, output_size)
        return self.conv(F.interpolate(hidden_states, size=(height, width), mode="nearest"))


def apply_memory_format(model: Any, config: MemoryConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Put a convolutional model into channels last if that was asked for, or is faster."""
    wins = device.type == "cpu" or dtype != torch.float32
    if config.channels_last == "always" or (config.channels_last == "auto" and wins):
        model.to(memory_format=torch.channels_last)
