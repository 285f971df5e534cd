"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm.auto import tqdm

from sd_recipes.build import Training
from sd_recipes.checkpoint import Progress, find_checkpoint, load_checkpoint, save_checkpoint
from sd_recipes.model.conditioning import encode_text
from sd_recipes.model.latents import encode_pixels, sample_latents, to_pixel_values
from sd_recipes.recipe import Recipe, RunError

logger = logging.getLogger(__name__)


class TrainingDiverged(RunError):
    """The loss is not a finite number."""

    status = 3


def fit(training: Training) -> Progress:
    """Train to the last step, from a checkpoint if one was asked for (Ho et al. 2020, algorithm 1).

    Raises TrainingDiverged if the loss becomes NaN or infinite.
    """
    recipe, accelerator, components = training.recipe, training.accelerator, training.components
    output_dir = Path(recipe.output_dir)
    progress = resume(training, output_dir)
    training.tracker.start_at(progress.global_step)
    if progress.global_step >= training.max_train_steps:
        logger.info("Nothing left to train: %d of %d steps are done.", progress.global_step, training.max_train_steps)
    if recipe.validate_before_training and progress.global_step == 0:
        validate(training, progress.global_step)
    window = LossWindow(accelerator.device, progress)
    with tqdm(
        total=training.max_train_steps,
        initial=progress.global_step,
        desc="Steps",
        disable=not accelerator.is_local_main_process,
    ) as bar:
        for batch in training.batches(progress.samples_seen, training.max_train_steps - progress.global_step):
            plan = batch.plan
            batch = batch.to(accelerator.device)

            # Latents and conditioning
            moments = encode_pixels(components.vae, to_pixel_values(batch.pixel_values, training.weight_dtype))
            latents = sample_latents(components.vae, moments, batch.posterior_noise)
            encoder_hidden_states = encode_text(components.text_encoder, batch.input_ids)

            # Loss and backward. accelerate divides by the accumulation steps and averages over processes;
            # multiplied by both and divided by the global batch's size, the gradient is the mean over its
            # samples, also for an epoch's last one, whose micro-batches are fewer and uneven.
            accelerator.sync_gradients = plan.is_last
            with nullcontext() if plan.is_last else accelerator.no_sync(training.unet):
                losses = training.objective(
                    training.unet, latents, encoder_hidden_states, batch.timesteps, batch.noise, batch.input_noise
                )
                share = plan.weight * losses.sum() / plan.global_batch_size
                accelerator.backward(share * accelerator.gradient_accumulation_steps * accelerator.num_processes)
            window.add(share)
            if not plan.is_last:
                continue

            # Clip, step, schedule, average. A step that the loss scaler skipped advances neither of the last.
            accelerator.clip_grad_norm_(training.unet.parameters(), recipe.max_grad_norm)
            training.optimizer.step()
            training.optimizer.zero_grad()
            if not accelerator.optimizer_step_was_skipped:
                training.schedule.step()
                if training.ema:
                    training.ema.step()
            progress.global_step += 1
            progress.samples_seen = plan.samples_seen
            bar.update(1)
            is_done = progress.global_step == training.max_train_steps

            # Log. Only here does the host wait for the device.
            if progress.global_step % recipe.logging_steps == 0 or progress.global_step == 1 or is_done:
                figures = window.close(training, progress)
                training.tracker.log(figures, progress.global_step)
                speed = f"{figures['images_per_second']:.1f} images/s"
                bar.set_postfix_str(f"loss {figures['train_loss']:.4f}, lr {figures['lr']:.2e}, {speed}")

            # Checkpoint, then validate: what can fail comes after what must not be lost
            if progress.global_step % recipe.checkpointing_steps == 0:
                window.check_finite(training, progress)
                if accelerator.is_main_process:
                    save_checkpoint(training, progress, output_dir)
                accelerator.wait_for_everyone()
            if is_done or (plan.ends_epoch and is_validation_epoch(recipe, progress, training.order.num_rows)):
                validate(training, progress.global_step)
                window.restart(progress)
    return progress


class LossWindow:
    """Mean loss and speed since the last log; the loss stays on the device until then."""

    def __init__(self, device: torch.device, progress: Progress) -> None:
        self.loss = torch.zeros((), device=device)
        self.steps_from = progress.global_step
        self.restart(progress)

    def restart(self, progress: Progress) -> None:
        """Begin timing here: validation and pictures do not count as training time."""
        self.samples_from = progress.samples_seen
        self.started = time.perf_counter()

    def add(self, loss: torch.Tensor) -> None:
        self.loss += loss.detach()

    def check_finite(self, training: Training, progress: Progress) -> float:
        """Sum of the window's losses over all processes. Raises TrainingDiverged, so that no checkpoint holds NaN."""
        total = training.accelerator.reduce(self.loss, "sum").item()
        if not math.isfinite(total):
            raise TrainingDiverged(
                f"the loss is {total} by step {progress.global_step}: lower --learning_rate, or use --mixed_precision "
                f"bf16 or no, and continue with --resume_from_checkpoint latest if {training.recipe.output_dir} has one"
            )
        return total

    def close(self, training: Training, progress: Progress) -> dict[str, float]:
        """Mean loss of the window's steps over all processes, learning rate and images a second."""
        loss = self.check_finite(training, progress) / (progress.global_step - self.steps_from)
        elapsed = time.perf_counter() - self.started
        figures = {
            "train_loss": loss,
            "lr": float(training.schedule.get_last_lr()[0]),
            "epoch": progress.samples_seen / training.order.num_rows,
            "images_per_second": (progress.samples_seen - self.samples_from) / elapsed,
        }
        self.loss.zero_()
        self.steps_from = progress.global_step
        self.restart(progress)
        return figures


def resume(training: Training, output_dir: Path) -> Progress:
    """Restore the checkpoint that was asked for; a run without one begins at step 0, and says so."""
    wanted = training.recipe.resume_from_checkpoint
    if wanted is None:
        return Progress()
    path = find_checkpoint(output_dir, wanted)
    if path is None:
        logger.info("--resume_from_checkpoint latest: %s has no checkpoint yet, so the run starts anew.", output_dir)
        return Progress()
    progress = load_checkpoint(training, path)
    logger.info("Resuming from %s: step %d, %d samples.", path, progress.global_step, progress.samples_seen)
    return progress


def is_validation_epoch(recipe: Recipe, progress: Progress, num_rows: int) -> bool:
    """As in diffusers' script: after the first epoch, and then after every `validation_epochs`-th."""
    return (progress.samples_seen // num_rows - 1) % recipe.validation_epochs == 0


def validate(training: Training, step: int) -> None:
    """Validate on the main process while the others wait."""
    if training.accelerator.is_main_process:
        training.validator(training, step)
    training.accelerator.wait_for_everyone()
