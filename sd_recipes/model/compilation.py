"""The UNet compiled by torch: each of its blocks, the whole of it, or the whole of it as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.compiler.config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

# torch 2.13 fuses an upsampling into the group norm after it, and the kernel that comes of it reads its input against
# the grain: up to 6 times as slow (pytorch#189488).
AGAINST_SLOW_FUSION = {"loop_reindexing_after_fusion": False}
REPEATED = (ResnetBlock2D, BasicTransformerBlock)
# Batches of one size of pictures: whole ones, an epoch's last, and those halved when memory ran out.
BATCH_SIZES = 4


def compiler_arguments(how: str) -> dict[str, Any]:
    """What torch.compile is called with. Each shape gets a program of its own, which is faster than one for several."""
    options = AGAINST_SLOW_FUSION | ({"triton.cudagraphs": True} if how == "graphs" else {})
    return {"backend": "inductor", "dynamic": False, "options": options}


def compile_unet(unet: Any, how: str, *, num_sizes: int, num_passes: int) -> None:
    """Let a UNet compile when it is first called, without other names for its parameters.

    `how` is blocks, unet or graphs. Blocks that are alike share a program. Pictures have `num_sizes` sizes, and a step
    calls the UNet in `num_passes` ways; shapes beyond what these explain are not compiled.
    """
    blocks = [module for module in unet.modules() if isinstance(module, REPEATED)] if how == "blocks" else [unet]
    for block in blocks:
        block.compile(**compiler_arguments(how))
    config, num_programs = torch.compiler.config, len(blocks) * num_sizes * num_passes * BATCH_SIZES
    config.recompile_limit = max(config.recompile_limit, num_programs)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, num_programs)
    if how == "graphs":
        for parameter in unet.parameters():
            if parameter.requires_grad:
                # A gradient lies in the graph's memory, where the next micro-batch's would overwrite it before the two
                # are added up: silently wrong sums (pytorch#96693, pytorch#169545).
                parameter.register_hook(torch.clone)


def in_steps(unet: Callable[..., Any]) -> Callable[..., Any]:
    """A UNet of CUDA graphs as a step calls it: what it returned before is not needed any more."""

    def call(*arguments: Any, **named: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return unet(*arguments, **named)

    return call
