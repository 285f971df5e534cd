"""The optimizer of the trained parts, and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from sd_recipes.errors import RecipeError
from sd_recipes.recipe import OptimConfig
from sd_recipes.training.state import TrainedPart

LAST_RATE = 1e-7  # of diffusers' polynomial schedule


def build_optimizer(parts: Sequence[TrainedPart], config: OptimConfig, *, fused: bool) -> torch.optim.Optimizer:
    """The optimizer that `config` names, with a group for each part, which has its own learning rate.

    `fused` asks for AdamW's single kernel; not with a loss scaler, since a skipped step then cannot be
    seen from outside. Raises RecipeError if bitsandbytes is needed and not installed.
    """
    groups = [{"params": list(part.parameters.values()), "lr": part.learning_rate} for part in parts]
    # Also as the default of all groups: from it diffusers' polynomial schedule knows how far it may decay.
    rate, decay = parts[0].learning_rate, config.adam_weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, rate, momentum=config.sgd_momentum, weight_decay=decay)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, rate, weight_decay=decay)
    adam: dict[str, Any] = {
        "lr": rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": decay,
    }
    if config.optimizer == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise RecipeError(
                "--use_8bit_adam needs bitsandbytes: pip install 'sd-recipes[bitsandbytes]', or drop the flag"
            ) from error
        return bitsandbytes.optim.AdamW8bit(groups, **adam)
    return torch.optim.AdamW(groups, fused=fused, **adam)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, max_train_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """diffusers' schedule of that name, in optimizer steps, on any number of processes. Raises RecipeError."""
    if config.lr_scheduler == "polynomial":
        if optimizer.defaults["lr"] <= LAST_RATE:
            raise RecipeError(
                f"--lr_scheduler polynomial ends at a learning rate of {LAST_RATE:g}, and --learning_rate "
                f"{config.learning_rate:g} is not above it: raise it, or use --lr_scheduler linear"
            )
        if config.lr_warmup_steps == max_train_steps:  # it would divide by the steps in between
            raise RecipeError(
                f"--lr_scheduler polynomial has no step left after --lr_warmup_steps {config.lr_warmup_steps}, and the "
                f"run has {max_train_steps}: use --lr_warmup_steps {max_train_steps // 10}"
            )
    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )
