"""What a run is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sd_recipes.checkpoints.format import Manifest
from sd_recipes.data.batches import Batch, TrainingBatches
from sd_recipes.data.latent_store import LatentStore
from sd_recipes.data.training_data import TrainingData
from sd_recipes.evaluation.validation import Validator
from sd_recipes.model.components import Components
from sd_recipes.model.conditioning import Conditioning
from sd_recipes.model.family import Family, TextStates
from sd_recipes.model.latents import LatentEncoder
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.gradients import GradientExchange
from sd_recipes.runtime.trackers import Tracker
from sd_recipes.training.frozen_model import FrozenModel
from sd_recipes.training.guard import Guard
from sd_recipes.training.objective import DenoisingLoss
from sd_recipes.training.quiet_loss import QuietLoss
from sd_recipes.training.state import TrainState
from sd_recipes.training.timestep_errors import TimestepErrors
from sd_recipes.training.utilisation import Utilisation

Checkpoint = tuple[Path, Manifest]


@dataclass
class Model:
    """A pipeline's parts, loaded and placed, and how a training step uses them."""

    family: Family
    components: Components
    unet: Callable[..., Any]  # as a training step calls it: autocast, compiled, or sharded
    exchange: GradientExchange  # of all that is trained
    encoder: LatentEncoder
    encode_text: Callable[[torch.Tensor], TextStates]  # of input_ids in the host's memory
    dropout_seed: int | None  # if something of it draws dropout
    objective: DenoisingLoss
    quiet_loss: QuietLoss
    timestep_errors: TimestepErrors | None  # by which timesteps are drawn, instead of those that a batch has
    steps_in_backward: bool  # with --fused_backward_pass
    frozen: FrozenModel | None  # whose predictions are the targets of class pictures, with --prior_preservation model
    utilisation: Utilisation | None  # on a GPU, or if a run is profiled

    def losses(self, latents: torch.Tensor, conditioning: Conditioning, batch: Batch) -> torch.Tensor:
        """(B,) loss of each image of a batch on the device, whose latents are (B, C, h, w)."""
        errors = self.timestep_errors
        timesteps = batch.timesteps if errors is None else errors.timesteps(batch.timestep_u)
        noises = batch.noise, batch.input_noise
        if self.utilisation:
            self.utilisation.note(latents, conditioning)
        teacher = partial(self.frozen.predict, batch) if self.frozen is not None and batch.plan.is_class else None
        losses = self.objective.undivided(
            self.unet,
            latents,
            conditioning,
            timesteps,
            *noises,
            latent_weights=batch.latent_weights,
            teacher=teacher,
        )
        self.quiet_loss.add(batch, timesteps, losses.detach())
        is_learned_from = not batch.plan.is_class  # class pictures are only weighted by what the others have taught
        if errors is None:
            return self.objective.divided(losses, timesteps, is_learned_from=is_learned_from)
        if is_learned_from:
            errors.add(timesteps, losses.detach(), batch.weights)
        return errors.weights(timesteps) * losses


@dataclass
class Run:
    """The parts of a run, as `build_run` puts them together."""

    recipe: Recipe  # resolved
    accelerator: Accelerator
    data: TrainingData
    batches: TrainingBatches
    store: LatentStore | None
    model: Model
    state: TrainState
    validator: Validator
    tracker: Tracker
    guard: Guard
    num_steps: int  # of the whole run
    checkpoint: Checkpoint | None  # that it resumes from
    planned_memory: int | None = None  # bytes, to be compared with what is measured

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.output_dir)
