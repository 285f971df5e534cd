"""The optimizer of the trained parts, and its learning-rate schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from sd_recipes.errors import RecipeError
from sd_recipes.recipe import OptimConfig
from sd_recipes.training.bf16_weights import with_bf16_weights
from sd_recipes.training.optimizer_classes import optimizer_class
from sd_recipes.training.state import TrainedPart

logger = logging.getLogger(__name__)

LAST_RATE = 1e-7  # of diffusers' polynomial schedule


def build_optimizer(
    parts: Sequence[TrainedPart], config: OptimConfig, *, fused: bool | None, seed: int, step_number: Callable[[], int]
) -> torch.optim.Optimizer:
    """The optimizer that `config` names, with a group for each learning rate of each part.

    `fused` asks for AdamW's single kernel, None for whatever torch takes: with a loss scaler the single kernel skips a
    step by itself, which cannot be seen from outside. bfloat16 parameters are rounded at random, as a function of
    `seed` and of the number of the step that is being made. Raises RecipeError as `optimizer_class`, and if the
    optimizer refuses the parameters.
    """
    groups: list[dict[str, Any]] = [
        {"params": list(group.parameters.values()), "lr": group.learning_rate}
        for part in parts
        for group in part.groups
    ]
    parameters = [each for group in groups for each in group["params"]]
    kind = optimizer_class(config, parameters[0].device, fused)
    if config.optimizer == "paged_adamw8bit" and parameters[0].device.type == "cpu":
        logger.warning("Only a GPU has pages: on this device --optimizer paged_adamw8bit is adamw8bit.")
    if any(each.dtype == torch.bfloat16 for each in parameters):
        kind = replace(kind, make=with_bf16_weights(kind.make, seed=seed, step_number=step_number))
    # Also as the default of all groups: from it diffusers' polynomial schedule knows how far it may decay.
    return kind(groups, parts[0].learning_rate)


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
