"""The training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import cache, partial
from typing import NoReturn

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from sd_recipes.checkpoints.best import BestWeights, list_best
from sd_recipes.checkpoints.format import list_checkpoints, resume_command, resume_hint, step_of
from sd_recipes.checkpoints.saver import BackgroundSaver, NotSaved
from sd_recipes.data.batches import Batch
from sd_recipes.data.latent_store import LatentStore
from sd_recipes.data.workers import room_for_workers
from sd_recipes.errors import one_line
from sd_recipes.evaluation.figures import Best
from sd_recipes.evaluation.watched_rows import write_hardest_rows
from sd_recipes.export.run_page import write_run_page
from sd_recipes.export.run_rows import SHOWN
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.agreement import StopAgreement, all_gather, begin_sum, broadcast, wait_for_all
from sd_recipes.runtime.console import say
from sd_recipes.runtime.cores import share_of_cores
from sd_recipes.runtime.fsdp import full_tensor
from sd_recipes.runtime.host_memory import OnItsWay
from sd_recipes.runtime.memory import another_phase, fragmented_gb, peak_memory_gb
from sd_recipes.runtime.out_of_memory import done_once, once_more, unchanged
from sd_recipes.runtime.signals import stop_request
from sd_recipes.runtime.trackers import PROFILE
from sd_recipes.training.build_parts import UNCERTAINTY
from sd_recipes.training.dropout import seed_dropout
from sd_recipes.training.finite import TrainingDiverged, has_finite_weights, is_not_finite
from sd_recipes.training.meter import MUCH_WAITING, Meter
from sd_recipes.training.optimizer_state import effective_rate
from sd_recipes.training.phases import Profiler, phase
from sd_recipes.training.recovery import Recovery, Undone, out_of_memory, shortage_explained
from sd_recipes.training.run import Model, Run
from sd_recipes.training.skipping import can_skip, skipped_unless
from sd_recipes.training.state import TrainState

logger = logging.getLogger(__name__)


def fit(run: Run, saver: BackgroundSaver, best_weights: BestWeights) -> None:
    """Train from where the state stands to the last step (Ho et al. 2020, algorithm 1), or to the one to stop early.

    Raises TrainingDiverged if loss or weights become NaN or infinite, or too many gradients in a row; Stopped, with
    everything saved, if any process was asked to end; NotSaved if saving failed then.
    """
    recipe, accelerator, state, validator, guard = run.recipe, run.accelerator, run.state, run.validator, run.guard
    progress = state.progress
    any_rank_stopping = StopAgreement(accelerator.num_processes)
    if progress.global_step >= run.num_steps:
        logger.info(
            "Nothing left to train: %d of %d steps are done. A larger %s continues; --overwrite starts over.",
            progress.global_step, run.num_steps, length_flag(recipe),
        )  # fmt: skip
    best = validator.best_so_far(run.tracker.path)
    if validator.is_due_at_start(progress, run.tracker.path):
        best = validate(run, best_weights)
    elif best and best.step == progress.global_step and recipe.keep_best and not is_kept(run, best):
        best_weights.keep(best.loss)  # a kill came before they were written
    if any_rank_stopping(wait=True):
        raise stop_request.stopped(f"at step {progress.global_step}, before another step")
    meter = Meter(accelerator.device, progress, remedy(recipe, run.batches.num_workers))
    recovery = Recovery(run)
    saved_step = progress.global_step
    steps_left = 0 if stops_early(run, best) else run.num_steps - progress.global_step
    is_postponed = False  # a checkpoint
    with (
        divergence_explained(run),
        shortage_explained(run),
        saver,
        best_weights,
        progress_bar(run) as bar,
        profiler_of(run) as profiler,
        closing(run.batches(progress.samples_seen, steps_left, progress.stream_state)) as steps,
    ):
        for micro_batches in meter.waits(steps):
            with meter.paused():
                profiler.step(progress.global_step)
            plan = micro_batches[-1].plan

            # Gradients of the whole step, however it is split into micro-batches
            for batch in micro_batches:
                run.data.bad_rows.add(batch.bad, progress.samples_seen)
            if progress.global_step == recipe.text_encoder_steps:  # from here on it is frozen
                run.model.exchange.settle_anew()
            gradient = recovery.gradient(
                micro_batches, lambda parts: backward(parts, run.model, run.store, accelerator)
            )
            if isinstance(gradient, str):
                give_up(run, meter, saver, gradient, is_saved=saved_step == progress.global_step)
            loss, usable = gradient

            # Update: weights, schedule, averages
            with phase("optimizer"):
                meter.grad_norm = update(state, accelerator, recipe.max_grad_norm, usable)
            progress.global_step += 1
            progress.samples_seen, progress.stream_state = plan.samples_seen, plan.stream_state
            bar.update(1)
            is_done = progress.global_step == run.num_steps

            # Note what it came to
            if usable and is_not_finite(meter.grad_norm, loss, accelerator):
                guard.skipped(meter.grad_norm, ends_run=is_done)
                meter.add_none()
            elif usable:
                guard.counted()
                meter.add(loss, usable)
            else:
                state.quiet_loss.forget()
                meter.add_none()

            # Log
            is_logged = progress.global_step % recipe.logging_steps == 0 or progress.global_step == 1 or is_done
            if is_logged:
                with phase("log"):
                    log(run, meter, bar)

            # Save, then validate: what can fail comes after what must not be lost
            is_validated = is_done or validator.is_due(progress, plan)
            # Not among steps that are skipped: the weights may be why, and a checkpoint should be from before that.
            is_due = saver.is_due(is_logged=is_logged) or is_postponed
            is_postponed = is_due and progress.skipped_in_a_row > 0 and not is_done
            is_saved = is_due and not is_postponed
            progress.awaits_validation = is_validated
            if is_saved:
                save(run, meter, saver)
                saved_step = progress.global_step
            else:
                saver.allocate_buffers()
                if state.quiet_loss.is_full:
                    guard.look()
            if run.store and plan.ends_epoch:
                is_full = run.data.has_all_rows(run.store.whole_epochs(plan.epoch))
                run.store.end_epoch(plan.epoch, is_full=is_full)
                if is_full or not recipe.has_class_pictures:  # of which the next step may have new ones
                    run.model.encoder.rest()
            if is_validated:
                with meter.paused():
                    best = validate(run, best_weights)
                if not is_done and not progress.skipped_in_a_row and stops_early(run, best):
                    if not is_logged:
                        log(run, meter, bar)
                    if not is_saved:
                        save(run, meter, saver)
                    break

            # Stop, if any process was asked to
            if any_rank_stopping(wait=is_validated):
                if not is_saved:
                    save(run, meter, saver)
                stop(run, saver)
        profiler.close(progress.global_step)


def backward(
    micro_batches: Sequence[Batch], model: Model, store: LatentStore | None, accelerator: Accelerator
) -> tuple[torch.Tensor, float]:
    """Add the gradient of a whole step to the parameters.

    Returns this process's share of the loss, on the device, and which part of the step's samples could be used, the
    same on all processes. Gradient and loss are sums over those samples, divided by the global batch's size. Class
    pictures come on top, with their weight, such that once divided by that part they are a mean over usable ones too;
    in a step without any usable sample they are all there is, and the part is theirs.

    accelerate divides by the accumulation steps, and FSDP averages over processes. Multiplied by both and divided by
    the global batch's size, the gradient is the mean over its samples, even for an epoch's last batch, whose
    micro-batches are fewer and uneven.
    """
    own_usable, own_rows = count_rows(micro_batches, is_class=False)
    counts = cache(begin_sum(own_usable, own_rows, *count_rows(micro_batches, is_class=True)))
    total = torch.zeros((), device=accelerator.device)
    scale = accelerator.gradient_accumulation_steps * (accelerator.num_processes if accelerator.is_fsdp2 else 1)
    if model.dropout_seed is not None:
        seed_dropout(model.dropout_seed, micro_batches[0].plan.samples_seen, accelerator.process_index)
    for batch in micro_batches:
        with phase("encode"):
            states = model.encode_text(batch.input_ids)
            batch = batch.to(accelerator.device)
            latents = model.encoder.sample(batch.all_moments(model.encoder.encode, store), batch.posterior_noise)
            conditioning = model.family.conditioning(states, batch)
        accelerator.sync_gradients = model.exchange.is_last = batch.plan.is_last
        with phase("forward"):
            losses = model.losses(latents, conditioning, batch)
            loss = (batch.weights * losses).sum() / batch.plan.global_batch_size
            if batch.plan.is_class:  # by now the other processes have counted theirs
                samples, class_pictures = usable_parts(counts())
                loss = loss * (samples / class_pictures if samples and class_pictures else 1.0)
        with phase("backward"):
            if not model.steps_in_backward:
                accelerator.backward(loss * scale)
            elif own_usable:  # all rows of the step; their gradient has to be the mean, since it is used at once
                accelerator.backward(loss * (batch.plan.global_batch_size / own_usable))
        total += loss.detach()
    samples, class_pictures = usable_parts(counts())
    return total, samples or class_pictures


def count_rows(micro_batches: Sequence[Batch], *, is_class: bool) -> tuple[int, int]:
    """How many of this process's samples, or class pictures, of a step can be used, and how many there are."""
    own = [batch for batch in micro_batches if batch.plan.weight and batch.plan.is_class == is_class]
    return sum(int(batch.weights.count_nonzero()) for batch in own), sum(len(batch.weights) for batch in own)


def usable_parts(counts: list[int]) -> tuple[float, float]:
    """Which part of a step's samples, and of its class pictures, can be used, from what `count_rows` gives of both."""
    num_usable, num_samples, num_usable_class, num_class = counts
    return num_usable / num_samples, num_usable_class / max(num_class, 1)


def update(state: TrainState, accelerator: Accelerator, max_grad_norm: float, usable: float = 1.0) -> float:
    """Clip the gradients, step, and average; returns the gradient's norm before clipping.

    The gradients become the mean over the `usable` part of the rows. Without any there is no gradient, and momentum and
    weight decay alone must not move the weights: nothing is done, and the norm is NaN.

    A step that the loss scaler skipped, or that had no usable row, advances neither schedule nor averages. Where memory
    runs out before something is changed, that is done once more; otherwise the error is raised. The host waits here for
    the norm, which is the same on all processes. If it is not finite nothing is changed, so that the weights stay
    finite: a loss scaler sees to that; or the optimizer's kernel, and the device has the step to do while the host
    waits; or else the host, which waits first. With --fused_backward_pass the backward pass has stepped already, and
    has left out the gradients that are not finite.
    """
    if usable == 0:
        state.optimizer.zero_grad()
        return math.nan
    if usable < 1 and not state.fused_backward:
        for parameter in state.parameters.values():
            if parameter.grad is not None:
                parameter.grad.div_(usable)
    parameters = list(state.parameters.values())
    again = done_once if accelerator.is_fsdp2 else once_more  # FSDP's processes wait for each other within these
    is_undone = Undone(state.optimizer)  # noted while the device still computes
    is_unclipped = unchanged(lambda: [each.grad for each in parameters if each.grad is not None])
    clip = partial(accelerator.clip_grad_norm_, parameters, max_grad_norm or math.inf)
    norm = state.fused_backward.grad_norm() if state.fused_backward else again("clipping", clip, is_unclipped)
    norm = full_tensor(norm)
    norm_for_host = OnItsWay(norm)
    step = partial(again, "the optimizer", state.optimizer.step, is_undone)
    has_stepped = state.fused_backward is not None
    # FSDP's parameters are DTensors, beside which a kernel takes no plain tensor.
    is_plain = not (has_stepped or accelerator.scaler or accelerator.is_fsdp2)
    if is_plain and can_skip(state.optimizer):
        with skipped_unless(norm.isfinite(), state.optimizer):
            step()
        has_stepped = True
    grad_norm = norm_for_host.value()
    if accelerator.scaler is None and not math.isfinite(grad_norm):
        state.optimizer.zero_grad()
        if state.timestep_errors:
            state.timestep_errors.forget()
        return grad_norm
    if not has_stepped:
        step()
    state.optimizer.zero_grad()
    if state.timestep_errors:
        state.timestep_errors.step(accelerator.reduce)
    if not accelerator.optimizer_step_was_skipped:
        state.schedule.step()
        with phase("average"):
            state.update_averages()
    return grad_norm


def log(run: Run, meter: Meter, bar: tqdm) -> None:
    """Log the figures since the last log. Only here and for a checkpoint does the host wait for the device's losses."""
    progress = run.state.progress
    loss, bad_rows = sum_up(run, meter)
    figures = {**meter.close(loss, progress), "lr": float(run.state.schedule.get_last_lr()[0])}
    if run.model.utilisation:
        images_at_once = 2 if run.recipe.has_class_pictures else 1  # one beside each
        figures |= run.model.utilisation.figures(images_at_once * figures["images_per_second"])
    if (found := effective_rate(run.state.optimizer)) is not None:
        figures["effective_lr"] = found
    if (quiet_loss := run.state.quiet_loss.close()) is not None:
        figures["quiet_loss"] = quiet_loss
    if run.data.num_rows:
        figures["epoch"] = progress.samples_seen / run.data.num_rows
    figures["memory_gb"] = peak_memory_gb(run.accelerator.device)
    if run.planned_memory is not None and progress.global_step > 1:  # the optimizer has its state from the second on
        planned, run.planned_memory = run.planned_memory / 1e9, None
        # Of convolutions in float32 without TF32, which cuDNN gives up where there is no room for them.
        takes_workspaces = run.accelerator.device.type == "cuda" and run.accelerator.mixed_precision == "no"
        logger.info(
            "Memory: planned %.1f GB, measured %.1f GB%s.", planned, figures["memory_gb"],
            ", which has the workspaces that cuDNN takes in float32 where there is room; they are not planned"
            if takes_workspaces and figures["memory_gb"] > planned else "",
        )  # fmt: skip
    if progress.micro_batch is not None:
        figures["micro_batch"] = progress.micro_batch
    if (held := fragmented_gb(run.accelerator.device)) is not None:
        figures["memory_held_gb"] = held
        meter.warn_of_fragmentation(held, figures["memory_gb"])
    if bad_rows:
        figures["bad_rows"] = bad_rows
    run.tracker.log(figures, progress.global_step)
    loss_in_words = f"loss {figures['train_loss']:.4f}" if "train_loss" in figures else "no loss"
    rate = figures.get("effective_lr", figures["lr"])
    words = [loss_in_words, f"lr {rate:.2e}", f"{figures['images_per_second']:.1f} images/s"]
    if "mfu" in figures:
        words.append(f"{100 * figures['mfu']:.0f} % of the device")
    if figures["data_wait"] > MUCH_WAITING:
        words.append(f"{100 * figures['data_wait']:.0f} % waiting for data")
    bar.set_postfix_str(", ".join(words))


def sum_up(run: Run, meter: Meter) -> tuple[float, int]:
    """Sum of the losses since the last log and number of bad rows so far, over all processes; looks for incidents.

    Raises TrainingDiverged, so that no checkpoint holds NaN, and TooManyBadRows.
    """
    accelerator, progress, bad_rows = run.accelerator, run.state.progress, run.data.bad_rows
    run.guard.look()
    sums = torch.stack([meter.loss, torch.full_like(meter.loss, len(bad_rows))])
    loss, bad = accelerator.reduce(sums, "sum").tolist()
    if not math.isfinite(loss):
        raise TrainingDiverged(f"the loss is {loss} by step {progress.global_step}")
    if bad and accelerator.num_processes > 1:  # several may have met the same row, in another epoch
        bad = len({name for names in all_gather(list(bad_rows.reasons)) for name in names})
    bad_rows.check(int(bad), progress.samples_seen)
    return loss, int(bad)


def save(run: Run, meter: Meter, saver: BackgroundSaver) -> None:
    """Write a checkpoint, after what it relies on: finite numbers, the latent store, and the curve up to here.

    Raises TrainingDiverged.
    """
    progress = run.state.progress
    was_logged = meter.steps_from == progress.global_step  # and summed up there, when the host waited
    progress.loss_sum = 0.0 if was_logged else sum_up(run, meter)[0]
    progress.logged_step, progress.steps_without_rows = meter.steps_from, meter.steps_without_rows
    if not has_finite_weights(run.state, run.accelerator):
        raise TrainingDiverged(f"the weights are not finite by step {progress.global_step}")
    if run.store:
        run.store.flush()
    run.tracker.flush()
    saver.save()


def stop(run: Run, saver: BackgroundSaver) -> None:
    """Leave once the checkpoint is written. Raises Stopped, or NotSaved."""
    saver.wait()
    stop_request.resume_command = resume_command(run.recipe)
    failure = broadcast(saver.failure)  # here all wait: a launcher ends the others when the first one leaves
    step = run.state.progress.global_step
    if failure:
        raise NotSaved(
            f"asked to stop, and step {step} could not be saved ({failure}): make room, and "
            f"{stop_request.resume_command} {resume_hint(run.recipe)}"
        )
    raise stop_request.stopped(f"saved at step {step}")


def give_up(run: Run, meter: Meter, saver: BackgroundSaver, words: str, *, is_saved: bool) -> NoReturn:
    """Leave, with a checkpoint, where memory is not enough for one image at once. Raises OutOfMemory.

    Every process has to call it.
    """
    if not is_saved:
        save(run, meter, saver)
    saver.wait()
    wait_for_all()  # here all wait: a launcher ends the others when the first one leaves
    raise out_of_memory(run, f"even one image at once ({words})")


def validate(run: Run, best_weights: BestWeights) -> Best | None:
    """Validate, and keep the weights if they are the best so far; returns the best, None if nothing is held out.

    Every process has to call it.
    """
    with another_phase(run.accelerator.device) if run.validator.has_work else nullcontext():
        best = run.validator(run.state, run.tracker)
    if best and best.step == run.state.progress.global_step and run.recipe.keep_best:
        best_weights.keep(best.loss)
    show_uncertainty(run)
    show_page(run)
    return best


def is_kept(run: Run, best: Best) -> bool:
    """Whether the best weights are in the run's folder; the same on all processes, which all have to call it."""
    return broadcast(any(step_of(path) == best.step for path in list_best(run.output_dir)))


def stops_early(run: Run, best: Best | None) -> bool:
    """Whether --early_stopping ends the run here: so many validations have not been better than the best."""
    patience = run.recipe.early_stopping
    if best is None or patience is None or best.since < patience:
        return False
    logger.info(
        "Stopping early at step %d: the last %d validations were no better than that of step %d, whose held-out loss "
        "is %.4g. A larger --early_stopping goes on.",
        run.state.progress.global_step, best.since, best.step, best.loss,
    )  # fmt: skip
    return True


def show_uncertainty(run: Run) -> None:
    """Let the first process draw the learned uncertainty, if there is one."""
    part = run.state.parts.get(UNCERTAINTY)
    if part and part.export and run.accelerator.is_main_process:
        part.export(part.evaluated_tensors(), run.output_dir)


def show_page(run: Run) -> None:
    """Let the first process renew the run's page, after what it shows of the rows that were hard to learn."""
    if not run.accelerator.is_main_process:
        return
    row_losses = run.state.quiet_loss.row_losses
    try:
        if row_losses is not None and run.data.rows is not None:
            row_losses.save(run.output_dir, run.state.progress.global_step)
            write_hardest_rows(run.data.rows, row_losses.hardest(SHOWN), run.recipe, run.output_dir)
        write_run_page(run.output_dir)
    # Whatever it is: a page must not end a run. Its errors are of the disk, of odd files there, of Jinja and Pillow.
    except Exception as error:
        logger.warning(
            "The run's page cannot be written (%s: %s): training continues.", type(error).__name__, one_line(error)
        )


def profiler_of(run: Run) -> Profiler:
    """Of the first process, which tells what it found; the others profile nothing."""
    num_steps = run.recipe.profile_steps if run.accelerator.is_main_process else 0
    return Profiler(run.output_dir / PROFILE, num_steps, run.accelerator.device, say)


def progress_bar(run: Run) -> tqdm:
    return tqdm(
        total=run.num_steps,
        initial=run.state.progress.global_step,
        desc="Steps",
        disable=not run.accelerator.is_local_main_process,
    )


@contextmanager
def divergence_explained(run: Run) -> Iterator[None]:
    """Add to a divergence's message what to do about it, and from where the run can resume."""
    try:
        yield
    except TrainingDiverged as error:
        wait_for_all()  # until the first process has written what it was writing
        advice = "lower --learning_rate"
        if run.state.progress.skipped_in_a_row:
            advice += f", or see to the rows in {run.tracker.incidents.path}"
        if run.accelerator.mixed_precision == "fp16":
            advice += ", or use --mixed_precision bf16 or no"
        there_is = f"{run.recipe.output_dir} has no checkpoint"
        if list_checkpoints(run.output_dir):
            there_is = f"{resume_command(run.recipe)} then {resume_hint(run.recipe)}"
        raise TrainingDiverged(f"{error}: {advice}; {there_is}") from None


def length_flag(recipe: Recipe) -> str:
    """The flag that sets the length of a run."""
    return "--num_train_epochs" if recipe.max_train_steps is None else "--max_train_steps"


def remedy(recipe: Recipe, num_workers: int) -> str:
    """What to do about a loader of so many processes that is slower than the model."""
    remedies = []
    if num_workers < (possible := min(share_of_cores(), room_for_workers(recipe))):
        remedies.append(f"--dataloader_num_workers {possible}")
    if recipe.cache_latents == "off" and not recipe.streaming:
        fixed = "" if recipe.cropping != "random" else " --center_crop"
        remedies.append(f"--cache_latents disk{fixed}")
    return " or ".join(remedies) or "smaller image files, or a faster disk or network"
