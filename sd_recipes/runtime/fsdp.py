"""A UNet sharded over the processes (FSDP2): each holds a shard of all weights, gradients and optimizer state.

accelerate shards it with torch's `fully_shard`, whose tensors are DTensors (Zhao et al. 2023, "PyTorch FSDP"). This
module turns shards into whole tensors and back: checkpoints and pipelines hold whole ones, so a run can resume sharded
or not, on any number of processes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.launcher import configuration, precision_in_words

logger = logging.getLogger(__name__)

# What `accelerate launch` sets, from its configuration, for the processes that it starts.
FSDP_VARIABLE, VERSION_VARIABLE, OFFLOAD_VARIABLE = "ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS"
OTHER_VARIABLES = {"DeepSpeed": "ACCELERATE_USE_DEEPSPEED", "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM"}
NEEDS_WHOLE_WEIGHTS = "needs whole weights, which FSDP shards"


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def fsdp_plugin(recipe: Recipe, mixed_precision: str) -> FullyShardedDataParallelPlugin | None:
    """What accelerate's configuration says about FSDP; None if nothing. Raises RecipeError for what is unsupported."""
    for name, variable in OTHER_VARIABLES.items():
        if is_set(variable):
            raise RecipeError(
                f"{name}, which {configuration()} asks for, is not supported: shard the model with "
                "accelerate_configs/fsdp2.yaml, or keep it whole with accelerate_configs/multi_gpu.yaml"
            )
    if not is_set(FSDP_VARIABLE):
        return None
    if os.environ.get(VERSION_VARIABLE) != "2":
        raise RecipeError(f"{configuration()} asks for FSDP 1: write fsdp_version: 2 under its fsdp_config")
    if is_set(OFFLOAD_VARIABLE):
        raise RecipeError(f"fsdp_offload_params of {configuration()} is not supported: set it to false")
    if mixed_precision == "fp16":
        origin = precision_in_words(recipe.mixed_precision, mixed_precision)
        raise RecipeError(
            f"{origin} scales the loss, which is not supported with FSDP: use --mixed_precision bf16 or no"
        )
    if recipe.optimizer not in ("adamw", "sgd"):
        raise RecipeError(f"--optimizer {recipe.optimizer} {NEEDS_WHOLE_WEIGHTS}: use adamw or sgd")
    if recipe.trains_lora:
        raise RecipeError(
            f"FSDP, which {configuration()} asks for, shards what is trained, and a LoRA is megabytes: train it with "
            "accelerate_configs/multi_gpu.yaml"
        )
    for name in ("offload_ema", "compile_unet", "compile", "fused_backward_pass"):  # the one sets the other
        if value := getattr(recipe, name):
            flag = f"--{name}" if value is True else f"--{name} {value}"
            raise RecipeError(f"{flag} {NEEDS_WHOLE_WEIGHTS}: drop it")
    if recipe.weights_dtype != "float32":
        raise RecipeError(f"--weights_dtype {recipe.weights_dtype} {NEEDS_WHOLE_WEIGHTS}: use float32")
    if recipe.channels_last == "always":
        raise RecipeError(f"--channels_last always {NEEDS_WHOLE_WEIGHTS}: use auto")
    # Weights travel in bfloat16, and gradients are summed in float32 as without FSDP.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy if mixed_precision == "bf16" else None)


def turn_on(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Let `accelerator` shard what it prepares on the CPU too, which accelerate 1.15 does not ask torch to do."""
    if accelerator.num_processes == 1:
        logger.warning("FSDP shards a model over processes, and there is only one: it stays whole.")
    elif accelerator.device.type == "cpu":
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin


def check_wrapped_classes(accelerator: Accelerator, unet: torch.nn.Module) -> None:
    """Raises RecipeError if the model is to be sharded by classes of modules that it does not have."""
    if not accelerator.is_fsdp2:
        return
    classes = {type(module).__name__ for module in unet.modules()}
    for name in accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap or []:
        if name not in classes:
            raise RecipeError(
                f"fsdp_transformer_layer_cls_to_wrap of {configuration()} names {name}, which the UNet does not "
                "have: use Transformer2DModel,ResnetBlock2D, as accelerate_configs/fsdp2.yaml does"
            )


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, for which every process has to call it; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(reference: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a whole tensor, on `reference`'s device; the tensor itself if that is not sharded."""
    if not isinstance(reference, DTensor):
        return tensor
    # Not scattered by the first process: every process has read the whole tensor.
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def gather(tensors: Mapping[str, torch.Tensor], *, is_wanted: bool, copied: bool = False) -> dict[str, torch.Tensor]:
    """The whole of each tensor in host memory, where it is wanted; every process has to call it.

    What lies there already is the tensor itself, unless it is to be `copied`.

    One at a time, so that no device runs out of memory in the middle of these collectives.
    """
    whole = {}
    for name, tensor in tensors.items():
        gathered = full_tensor(tensor.detach())
        if is_wanted:
            whole[name] = gathered.to("cpu", copy=copied)
    return whole
