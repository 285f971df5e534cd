"""The training loop."""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from sd_recipes.checkpoints.format import Progress, list_checkpoints, resume_command, resume_hint
from sd_recipes.checkpoints.resume import identity_of, load_checkpoint
from sd_recipes.checkpoints.run_folder import begin_history
from sd_recipes.checkpoints.saver import Checkpointer, NotSaved
from sd_recipes.data.batches import Batch
from sd_recipes.data.order import MicroBatch
from sd_recipes.errors import RecipeError, RunError
from sd_recipes.export.report import FIGURES
from sd_recipes.model.latents import batch_moments, sample_latents
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.agreement import all_gather, broadcast, wait_for_all
from sd_recipes.runtime.fsdp import full_tensor
from sd_recipes.runtime.out_of_memory import is_out_of_memory
from sd_recipes.runtime.signals import Stopped, stop_request
from sd_recipes.runtime.trackers import read_metrics
from sd_recipes.training.build import Training

logger = logging.getLogger(__name__)

MUCH_WAITING = 0.1  # share of the time that is spent waiting for data
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM}
SECONDS_TO_JUDGE = 30  # of training: the first batch always takes long


class TrainingDiverged(RunError):
    """Loss, gradient or weights are not finite numbers."""

    status = 3


def fit(training: Training) -> Progress:
    """Train to the last step, from a checkpoint if one was asked for.

    Raises TrainingDiverged if loss, gradient or weights become NaN or infinite, and Stopped, with all saved, if any
    process was asked to end; NotSaved if it could not be saved then.
    """
    try:
        return _train(training)
    except TrainingDiverged as error:
        wait_for_all()  # until the first process has written what it was writing
        output_dir = Path(training.recipe.output_dir)
        advice = "lower --learning_rate"
        if training.accelerator.mixed_precision == "fp16":
            advice += ", or use --mixed_precision bf16 or no"
        there_is = f"{output_dir} has no checkpoint"
        if list_checkpoints(output_dir):
            there_is = f"{resume_command(training.recipe)} then {resume_hint(training.recipe)}"
        raise TrainingDiverged(f"{error}: {advice}; {there_is}") from None


def _train(training: Training) -> Progress:
    """Ho et al. 2020, algorithm 1."""
    recipe, accelerator, components = training.recipe, training.accelerator, training.components
    output_dir = Path(recipe.output_dir)
    identity = identity_of(training)
    progress = resume(training, identity)
    if training.checkpoint:
        wait_for_all()  # it fits on all of them
        if accelerator.is_main_process:
            begin_history(output_dir, *training.checkpoint)
    try:
        training.tracker.start_at(progress.global_step)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise RecipeError(
            f"--output_dir {output_dir} cannot be written ({error}): make room, or choose another"
        ) from error
    if progress.global_step >= training.max_train_steps:
        logger.info(
            "Nothing left to train: %d of %d steps are done. A larger %s goes on; --overwrite starts anew.",
            progress.global_step,
            training.max_train_steps,
            length_of(recipe),
        )
    begins = recipe.validate_before_training and progress.global_step == 0
    if begins or (progress.awaits_validation and not was_validated(training, progress.global_step)):
        validate(training, progress)
    if training.any_rank_stopping(wait=True):
        raise stop_request.stopped(f"at step {progress.global_step}, before another was made")
    window = Window(accelerator.device, progress)
    steps_left = training.max_train_steps - progress.global_step
    with (
        memory_given_back(training),
        Checkpointer(training, output_dir, identity) as checkpointer,
        tqdm(
            total=training.max_train_steps,
            initial=progress.global_step,
            desc="Steps",
            disable=not accelerator.is_local_main_process,
        ) as bar,
        closing(training.batches(progress.samples_seen, steps_left, progress.stream_state)) as batches,
    ):
        for batch in window.waits(batches):
            plan = batch.plan
            training.bad_rows.add(batch.bad, progress.samples_seen)

            # Latents and conditioning
            encoder_hidden_states = training.encode_text(batch.input_ids)
            batch = batch.to(accelerator.device)
            moments = batch_moments(components.vae, batch, training.weight_dtype, training.cache)
            latents = sample_latents(components.vae, moments, batch.posterior_noise)

            # Loss and backward. accelerate divides by the accumulation steps and averages over processes;
            # multiplied by both and divided by the global batch's size, the gradient is the mean over its
            # samples, also for an epoch's last one, whose micro-batches are fewer and uneven.
            accelerator.sync_gradients = plan.is_last
            # What is divided to save memory must not keep whole gradients until the last micro-batch.
            with nullcontext() if plan.is_last or accelerator.is_fsdp2 else accelerator.no_sync(training.unet):
                losses = training.objective(
                    training.unet, latents, encoder_hidden_states, batch.timesteps, batch.noise, batch.input_noise
                )
                share = (batch.weights * losses).sum() / plan.global_batch_size
                accelerator.backward(share * accelerator.gradient_accumulation_steps * accelerator.num_processes)
            window.add(share)
            if not plan.is_last:
                continue

            # Clip, step, schedule, average. A step that the loss scaler skipped advances neither of the last; without
            # one the host waits here for the norm, the same on all processes, so that the weights stay finite.
            grad_norm = accelerator.clip_grad_norm_(training.unet.parameters(), recipe.max_grad_norm)
            window.grad_norm = full_tensor(grad_norm).item()
            if accelerator.scaler is None and not math.isfinite(window.grad_norm):
                raise TrainingDiverged(
                    f"the gradient's norm is {window.grad_norm} at step {progress.global_step + 1}, which is not made"
                )
            training.optimizer.step()
            training.optimizer.zero_grad()
            if not accelerator.optimizer_step_was_skipped:
                training.schedule.step()
                if training.ema:
                    training.ema.step()
            progress.global_step += 1
            progress.samples_seen = plan.samples_seen
            progress.stream_state = plan.stream_state
            bar.update(1)
            is_done = progress.global_step == training.max_train_steps

            # Log
            is_logged = progress.global_step % recipe.logging_steps == 0 or progress.global_step == 1 or is_done
            if is_logged:
                figures = window.close(training, progress)
                training.tracker.log(figures, progress.global_step)
                speed = f"{figures['images_per_second']:.1f} images/s"
                bar.set_postfix_str(f"loss {figures['train_loss']:.4f}, lr {figures['lr']:.2e}, {speed}")

            # Checkpoint, then validate: what can fail comes after what must not be lost
            validates = is_done or is_validation_step(recipe, progress, plan)
            is_saved = is_done or is_checkpoint_step(training, checkpointer, progress, is_logged=is_logged)
            progress.awaits_validation = validates
            if is_saved:
                save(training, progress, window, checkpointer)
            else:
                checkpointer.allocate_buffers()
            if training.cache and plan.ends_epoch:
                finish_cached_epoch(training, plan.epoch)
            if validates:
                validate(training, progress)
                window.restart(progress)
            if training.any_rank_stopping(wait=validates):
                if not is_saved:
                    save(training, progress, window, checkpointer)
                checkpointer.wait()
                stop_request.resume_command = resume_command(recipe)
                wait_for_all()  # a launcher ends the others when the first one leaves
                if checkpointer.failure:
                    raise NotSaved(
                        f"asked to stop, and step {progress.global_step} could not be saved ({checkpointer.failure}): "
                        f"make room, and {stop_request.resume_command} {resume_hint(recipe)}"
                    )
                raise stop_request.stopped(f"saved at step {progress.global_step}")
    if training.cache:
        training.cache.flush()
        wait_for_all()
        training.cache.close()
    progress.not_saved = checkpointer.not_saved
    return progress


def length_of(recipe: Recipe) -> str:
    """The flag that says how long a run is."""
    return "--num_train_epochs" if recipe.max_train_steps is None else "--max_train_steps"


class Window:
    """Mean loss, speed and waiting since the last log; the loss stays on the device until then."""

    def __init__(self, device: torch.device, progress: Progress) -> None:
        self.loss = torch.tensor(progress.loss_sum, device=device)
        self.steps_from = progress.logged_step
        self.grad_norm = 0.0  # of the last step, before clipping
        self.waited_in_all = self.elapsed_in_all = 0.0
        self.warned_of_waiting = False
        self.restart(progress)

    def restart(self, progress: Progress) -> None:
        """Begin timing here: validation and pictures do not count as training time."""
        self.samples_from = progress.samples_seen
        self.waited = 0.0
        self.started = time.perf_counter()

    def waits(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time for which the loop waits for them."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, loss: torch.Tensor) -> None:
        self.loss += loss.detach()

    def sum_up(self, training: Training, progress: Progress) -> tuple[float, int]:
        """Sum of the window's losses and number of bad rows so far, over all processes.

        Raises TrainingDiverged, so that no checkpoint holds NaN, and TooManyBadRows.
        """
        sums = torch.stack([self.loss, torch.full_like(self.loss, len(training.bad_rows))])
        loss, bad = training.accelerator.reduce(sums, "sum").tolist()
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss is {loss} by step {progress.global_step}")
        if bad and training.accelerator.num_processes > 1:  # several may have met the same row, in another epoch
            bad = len({name for names in all_gather(list(training.bad_rows.reasons)) for name in names})
        training.bad_rows.check(int(bad), progress.samples_seen)
        return loss, int(bad)

    def close(self, training: Training, progress: Progress) -> dict[str, float]:
        """Mean loss of the window's steps over all processes, learning rate, images a second, share of waiting."""
        loss, bad_rows = self.sum_up(training, progress)
        elapsed = time.perf_counter() - self.started
        figures = {
            "train_loss": loss / (progress.global_step - self.steps_from),
            "grad_norm": self.grad_norm,
            "lr": float(training.schedule.get_last_lr()[0]),
            "images_per_second": (progress.samples_seen - self.samples_from) / elapsed,
            "data_wait": self.waited / elapsed,
        }
        if training.num_rows:
            figures["epoch"] = progress.samples_seen / training.num_rows
        if not math.isfinite(self.grad_norm):  # of a step that the loss scaler skipped; JSON has no infinity
            del figures["grad_norm"]
        if bad_rows:
            figures["bad_rows"] = bad_rows
        self.waited_in_all += self.waited
        self.elapsed_in_all += elapsed
        share = self.waited_in_all / self.elapsed_in_all
        if share > MUCH_WAITING and self.elapsed_in_all > SECONDS_TO_JUDGE and not self.warned_of_waiting:
            self.warned_of_waiting = True
            logger.warning("%.0f %% of the time goes into waiting for data: try %s", 100 * share, remedy(training))
        self.loss.zero_()
        self.steps_from = progress.global_step
        self.restart(progress)
        return figures


@contextmanager
def memory_given_back(training: Training) -> Iterator[None]:
    """A cache in memory ends with the run also where that is ended.

    Of several processes only by a stop, on which they agree: one that fails must not take it away from the others, for
    which the launcher, and the next run, are there.
    """
    try:
        yield
    except BaseException as error:
        alone = training.accelerator.num_processes == 1
        if training.cache and (alone or isinstance(error, (Stopped, NotSaved))):
            training.cache.give_back()
        raise


def remedy(training: Training) -> str:
    """What to do about a loader that is slower than the model."""
    recipe = training.recipe
    remedies = []
    workers = max(1, (os.cpu_count() or 1) // training.accelerator.num_processes)
    if recipe.dataloader_num_workers < workers:
        remedies.append(f"--dataloader_num_workers {workers}")
    if recipe.cache_latents == "off" and not recipe.streaming:
        fixed = "" if recipe.cropping != "random" else " --center_crop"
        remedies.append(f"--cache_latents disk{fixed}")
    return " or ".join(remedies) or "smaller image files, or a faster disk or network"


def resume(training: Training, identity: dict[str, Any]) -> Progress:
    """Restore the checkpoint from which the run goes on, if there is one. Raises RecipeError if it holds NaN."""
    for name in ("unet", "vae", "text_encoder"):
        if not are_finite(training.accelerator, getattr(training.components, name).parameters()):
            raise RecipeError(
                f"--pretrained_model_name_or_path {training.recipe.pretrained_model_name_or_path}: {name} holds "
                f"weights that are not finite in {training.accelerator.mixed_precision} mixed precision: use another "
                "copy or --variant of the model, or --mixed_precision no"
            )
    if training.checkpoint is None:
        return Progress()
    path, manifest = training.checkpoint
    progress = load_checkpoint(training, path, manifest, identity)
    if not have_finite_weights(training):
        others = [each.name for each in list_checkpoints(path.parent) if each.resolve() != path.resolve()]
        raise RecipeError(
            f"{path} holds weights that are not finite: go back with --resume_from_checkpoint to an older one "
            f"of {others or 'none'}, or start anew with --overwrite"
        )
    if not training.accelerator.is_main_process:
        progress.loss_sum = 0.0  # it is over all processes
    logger.info("Resuming from %s: step %d, %d samples.", path, progress.global_step, progress.samples_seen)
    return progress


def is_checkpoint_step(training: Training, checkpointer: Checkpointer, progress: Progress, *, is_logged: bool) -> bool:
    """Every so many steps, or minutes: several processes ask for those when they log, as they have to agree."""
    if progress.global_step % training.recipe.checkpointing_steps == 0:
        return True
    if training.recipe.checkpointing_minutes is None:
        return False
    if training.accelerator.num_processes == 1:
        return checkpointer.is_overdue()
    return is_logged and broadcast(checkpointer.is_overdue())


def save(training: Training, progress: Progress, window: Window, checkpointer: Checkpointer) -> None:
    """Write a checkpoint, after what it relies on: finite numbers, the latent cache, and the curve up to here.

    Raises TrainingDiverged.
    """
    was_logged = window.steps_from == progress.global_step  # and summed up there, for which the host waited
    progress.loss_sum = 0.0 if was_logged else window.sum_up(training, progress)[0]
    progress.logged_step = window.steps_from
    if not have_finite_weights(training):
        raise TrainingDiverged(f"the weights are not finite by step {progress.global_step}")
    if training.cache:
        training.cache.flush()
    training.tracker.flush()
    checkpointer.save(progress)


def have_finite_weights(training: Training) -> bool:
    """Whether all weights are finite, and their average: a finite gradient times a huge rate may not leave them so."""
    average = training.ema.named_tensors().values() if training.ema else ()
    return are_finite(training.accelerator, [*training.components.unet.parameters(), *average])


def are_finite(accelerator: Accelerator, tensors: Iterable[torch.Tensor]) -> bool:
    """The same answer on all processes, which all have to ask: each may hold a part."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    are = torch.stack([part.isfinite().all().to(accelerator.device) for part in parts])
    return accelerator.reduce((~are).sum(), "sum").item() == 0


def finish_cached_epoch(training: Training, epoch: int) -> None:
    """What was met in an epoch is in the cache for the next one, on all processes; the VAE makes room."""
    assert training.cache is not None
    training.cache.flush()
    wait_for_all()
    training.cache.seal(epoch + 1)
    training.components.vae.to("cpu")


def is_validation_step(recipe: Recipe, progress: Progress, plan: MicroBatch) -> bool:
    """Every so many steps; or, as in diffusers' script, after the first epoch and then every so many."""
    if recipe.validation_steps:
        return progress.global_step % recipe.validation_steps == 0
    return plan.ends_epoch and plan.epoch % recipe.validation_epochs == 0


def was_validated(training: Training, step: int) -> bool:
    """Whether the validation that comes after the checkpoint of this step was finished before the run ended there."""
    recipe, path = training.recipe, training.tracker.path
    if recipe.validation_split or recipe.validation_clip_model:
        done = any(line["step"] == step and FIGURES.keys() & line.keys() for line in read_metrics(path))
    else:
        done = not recipe.validation_prompts or (path.parent / "samples" / f"step-{step:06d}.png").is_file()
    return broadcast(done)


def validate(training: Training, progress: Progress) -> None:
    """Validate on the main process while the others wait; broken off, if it is asked to end."""
    if training.validator.held_out is None and not training.recipe.validation_prompts:
        progress.awaits_validation = False
        return
    with training.evaluated_weights():
        if training.accelerator.is_main_process:
            vae = training.components.vae
            was_on = vae.device
            try:
                vae.to(training.accelerator.device)
                training.validator(training, progress.global_step)
                progress.awaits_validation = False
            except Stopped:
                pass  # the processes then stop together, at the step's end
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                logger.warning("The validation's pictures cannot be written (%s): training goes on.", error)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning(
                    "No memory for this validation: training goes on. %s", " ".join(str(error).split())[:200]
                )
            vae.to(was_on)
        wait_for_all()
