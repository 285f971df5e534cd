"""Build the state of a run: its trained parts, prepared, with their optimizer, schedule and averages."""

from __future__ import annotations

from accelerate import Accelerator

from sd_recipes.errors import RecipeError
from sd_recipes.model.components import Components
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.agreement import wait_for_all
from sd_recipes.runtime.fsdp import check_wrapped_classes
from sd_recipes.training.ema import AveragedWeights, release_before_steps
from sd_recipes.training.fused_backward import FusedBackward, check_fused_backward
from sd_recipes.training.optim import build_optimizer, build_schedule
from sd_recipes.training.optimizer_check import check_combinations
from sd_recipes.training.quiet_loss import QuietLoss
from sd_recipes.training.row_losses import RowLosses
from sd_recipes.training.run_length import micro_batches_of_step
from sd_recipes.training.schedule_free import EvaluationWeights, has_modes
from sd_recipes.training.state import SNAPSHOTS, TrainedPart, TrainState
from sd_recipes.training.timestep_errors import TimestepErrors


def build_state(
    recipe: Recipe,
    components: Components,
    parts: dict[str, TrainedPart],
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_steps: int,
    num_rows: int | None,
) -> TrainState:
    """Give the parts their optimizer and averages, and prepare them for the device and its processes.

    Raises RecipeError for what does not go together.
    """
    num_train_timesteps = components.scheduler.config.num_train_timesteps
    quiet_loss = QuietLoss(num_train_timesteps, recipe, None if num_rows is None else RowLosses(num_rows))
    timestep_errors = (
        TimestepErrors(num_train_timesteps, recipe, accelerator.device) if recipe.timesteps_by_error else None
    )
    if recipe.fused_backward_pass:
        num_micro_batches = micro_batches_of_step(recipe, batch_size, accelerator.num_processes)
        check_fused_backward(accelerator.num_processes, accelerator.mixed_precision, num_micro_batches)
    assert recipe.seed is not None, "the recipe is resolved"
    optimizer = build_optimizer(
        list(parts.values()),
        recipe,
        fused=None if accelerator.mixed_precision == "fp16" or accelerator.device.type == "meta" else True,
        seed=recipe.seed,
        step_number=lambda: state.progress.global_step,
    )
    check_combinations(optimizer, recipe)
    fused_backward = FusedBackward(optimizer) if recipe.fused_backward_pass else None
    schedule = build_schedule(optimizer, recipe, num_steps)
    check_wrapped_classes(accelerator, components.unet)
    if accelerator.is_fsdp2 and len(parts) > 1:  # of several modules accelerate (1.15) shards the last one only
        raise RecipeError(f"FSDP shards one model, and this run trains {', '.join(parts)}: train without FSDP")
    wait_for_all()  # one may have taken far longer than another to read its data or its model
    if accelerator.is_fsdp2:
        *prepared, wrapped = accelerator.prepare(*(part.module for part in parts.values()), optimizer)
    else:  # without DDP: gradients are summed by the model's `exchange`
        prepared = [accelerator.prepare_model(part.module, evaluation_mode=True) for part in parts.values()]
        wrapped = accelerator.prepare_optimizer(optimizer)
    for part, module in zip(parts.values(), prepared, strict=True):
        part.prepared = module
        if recipe.use_ema:
            part.average = AveragedWeights(part.parameters, recipe)
        elif has_modes(optimizer):
            part.average = EvaluationWeights(part.parameters, optimizer)
        if recipe.ema_snapshots:
            part.snapshots = {
                suffix: AveragedWeights(part.parameters, recipe, length) for suffix, length in SNAPSHOTS.items()
            }
    release_before_steps(optimizer, [average for part in parts.values() for average in part.averages.values()])
    state = TrainState(
        parts,
        wrapped,
        schedule,
        accelerator.scaler,
        quiet_loss,
        timestep_errors=timestep_errors,
        fused_backward=fused_backward,
    )
    return state
