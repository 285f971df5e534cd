"""How the models run, never what they compute: precision, memory format, attention, checkpointing, compilation."""

from __future__ import annotations

import copy
import importlib.util
import logging
from typing import Any

import torch

from sd_recipes.model.components import Components
from sd_recipes.recipe import MemoryConfig

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU may round float32 to TF32, in matrix products and convolutions alike.

    By itself torch allows it in convolutions only.
    """
    # Not by torch's newer `fp32_precision`: accelerate sets these, and what then reads them refuses a mixture.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def place(
    components: Components,
    config: MemoryConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    contiguous_unet: bool,
    exports: bool,
) -> None:
    """Move the frozen models to `device` in `dtype` and the UNet in float32, arranged as configured.

    `contiguous_unet` keeps the UNet out of channels last, for an optimizer that would undo it. A process that `exports`
    keeps the frozen models in float32 as well, in the host's memory, where `dtype` would round them.
    """
    if exports and dtype != torch.float32:
        # They take 4 bytes a parameter, of Stable Diffusion 1.5 0.83 GB, until the run ends.
        components.as_loaded = {"vae": components.vae, "text_encoder": components.text_encoder}
        components.vae, components.text_encoder = copy.deepcopy((components.vae, components.text_encoder))
    components.vae.to(device, dtype=dtype)
    components.text_encoder.to(device, dtype=dtype)
    unet = components.unet.to(device)
    if not contiguous_unet:
        arrange(unet, config, device, dtype)
    arrange(components.vae, config, device, dtype)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        if importlib.util.find_spec("xformers"):
            unet.enable_xformers_memory_efficient_attention()
        else:
            logger.warning("xFormers is not installed: PyTorch's own memory-efficient attention is used.")
    if config.compile_unet:
        unet.compile()


def arrange(model: Any, config: MemoryConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Put a convolutional model into channels last where that was asked for, or wins."""
    wins = device.type == "cpu" or dtype != torch.float32
    if config.channels_last == "always" or (config.channels_last == "auto" and wins):
        model.to(memory_format=torch.channels_last)
