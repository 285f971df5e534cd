"""How the models run, never what they compute: precision, memory format, attention, checkpointing, compilation."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch

from sd_recipes.errors import RecipeError
from sd_recipes.model.components import Components
from sd_recipes.model.family import Family
from sd_recipes.recipe import MemoryConfig

logger = logging.getLogger(__name__)


def keep_as_loaded(family: Family, components: Components) -> None:
    """Keep the frozen models in float32 in host memory, and run copies of them, which may be rounded.

    Until the run ends they take 4 bytes per parameter: 0.83 GB for Stable Diffusion 1.5.
    """
    for name in ("vae", *family.text_models):
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
    """Move the text models to `device` in `dtype` and the UNet, arranged as configured.

    `contiguous_unet` keeps the UNet out of channels last, for an optimizer that would undo it.
    """
    for name in family.text_models:
        getattr(components, name).to(device, dtype=dtype)
    unet = components.unet.to(device)
    if config.weights_dtype == "bf16":
        unet.bfloat16()
    if not contiguous_unet:
        apply_memory_format(unet, config, device, dtype)
    if config.gradient_checkpointing_blocks:
        checkpoint_blocks(unet, config.gradient_checkpointing_blocks)
    elif config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        if importlib.util.find_spec("xformers"):
            unet.enable_xformers_memory_efficient_attention()
        else:
            logger.warning("xFormers is not installed: PyTorch's own memory-efficient attention is used.")
    if config.compile_unet:
        unet.compile()


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


def apply_memory_format(model: Any, config: MemoryConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Put a convolutional model into channels last if that was asked for, or is faster."""
    wins = device.type == "cpu" or dtype != torch.float32
    if config.channels_last == "always" or (config.channels_last == "auto" and wins):
        model.to(memory_format=torch.channels_last)
