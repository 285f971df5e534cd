"""A training step that memory ran out in: done again with half as many images at once, on all processes.

The batch that is optimized stays as it is, and the step's result is that of a run which had taken so many at once from
this step on: to the bit, since whatever the failed attempt had noted is forgotten.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from sd_recipes.checkpoints.format import list_checkpoints, resume_command, resume_hint
from sd_recipes.data.batches import Batch
from sd_recipes.data.latent_store import LatentStore
from sd_recipes.errors import RunError, one_line
from sd_recipes.model.conditioning import CachedText
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.agreement import all_gather, begin_sum
from sd_recipes.runtime.out_of_memory import attempt, is_out_of_memory, times_changed
from sd_recipes.training.run import Run

logger = logging.getLogger(__name__)

STEPS_TO_GROW = 100  # in a row for which memory was enough: `--micro_batch auto` then tries twice as many images

Gradient = tuple[torch.Tensor, float]  # what `loop.backward` returns


class OutOfMemory(RunError):
    """Memory ran out, and the run cannot go on with less at once."""

    status = 8


class Recovery:
    """How many images every device takes at once, and steps that are done again with fewer of them.

    What was found stays until the end of the run, and is part of its checkpoints; `--micro_batch auto` tries more again
    later. All shapes of --aspect_ratio_buckets have about the same area, and so the same number.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.exchange, self.progress = run, run.model.exchange, run.state.progress
        self.most = run.recipe.images_at_once
        if run.checkpoint and run.checkpoint[1].settings.get("micro_batch") != run.recipe.micro_batch:
            self.progress.micro_batch = None  # somebody asks for another
        if self.progress.micro_batch is not None:
            logger.info(
                "At most %d images at once, as was found when memory ran out; --micro_batch auto tries more.",
                self.progress.micro_batch,
            )
        # What keeps for later steps what a step has encoded.
        self._kept = [each for each in (run.store, run.model.encode_text) if isinstance(each, LatentStore | CachedText)]
        self._steps_to_grow, self._num_steps = STEPS_TO_GROW, 0
        self._num_retries, self._had_retries = num_alloc_retries(run.accelerator.device), False

    @property
    def size(self) -> int:
        """How many images a device takes at once."""
        return min(self.most, self.progress.micro_batch or self.most)

    def gradient(self, batches: Sequence[Batch], backward: Callable[[list[Batch]], Gradient]) -> Gradient | str:
        """What `backward` returns of a step's batches, divided so that memory is enough for it on all processes.

        Where there is not enough even for one image at once, the error's words. Every process has to call it.
        """
        self._grow()
        gradient: Gradient | None
        while True:
            if self.run.state.fused_backward:  # weights move within the pass, which cannot be divided or done again
                whole = backward(list(batches))
                self._is_enough(is_ample=True)
                return whole
            parts = [part for batch in batches for part in batch.in_parts_of(self.size)]
            if self.run.accelerator.is_fsdp2:  # the others wait for this one within the passes
                gradient = backward(parts)
                self._is_enough(True)
                return gradient
            self.exchange.begin()
            gradient, words = attempt(partial(backward, parts))
            agreed = begin_sum(gradient is None, self._is_short())
            self.exchange.finish(failed=gradient is None)
            num_failed, num_short = agreed()
            if gradient is not None and not num_failed:
                if not self.exchange.is_set_up:
                    self.exchange.set_up()
                self._is_enough(num_short == 0)
                return gradient
            gradient = None
            self._forget()
            tried = all_gather((max(len(part.weights) for part in parts), words))
            largest = max(number for number, _ in tried)
            words = next(words for _, words in tried if words)
            if largest == 1:
                return words
            self._halve(largest, words, self.progress.global_step + 1)

    def _grow(self) -> None:
        """With `--micro_batch auto`, try twice as many images after enough steps without a lack of memory."""
        if self.run.recipe.micro_batch == "auto" and self.size < self.most and self._num_steps >= self._steps_to_grow:
            self._steps_to_grow *= 2  # in case that this is too many again
            self._take(2 * self.size)

    def _forget(self) -> None:
        """Undo what the passes of a step have added and noted, on this process."""
        state = self.run.state
        for parameter in state.parameters.values():
            parameter.grad = None
        state.quiet_loss.forget()
        if state.timestep_errors:
            state.timestep_errors.forget()
        for kept in self._kept:
            kept.forget()

    def _is_enough(self, is_ample: bool) -> None:
        """Memory was enough for a step; ample, unless the allocator of a device had to make room again."""
        for kept in self._kept:
            kept.keep()
        self._num_steps += 1
        if not is_ample and self.size > 1:
            words = "the device's allocator had to make room in two steps running"
            self._halve(self.size, words, self.progress.global_step + 2)

    def _halve(self, number: int, words: str, step: int) -> None:
        """Take half as many images at once from a step on; `words` say why there was no memory for `number`."""
        self._take(math.ceil(number / 2))
        logger.warning(
            "No memory for %d images at once (%s): %d at once from step %d on, in batches that stay as they are.",
            number, words, self.size, step,
        )  # fmt: skip
        self.run.tracker.record("out_of_memory", step, rows=[], micro_batch=self.size, error=words)

    def _take(self, number: int) -> None:
        self.progress.micro_batch = number if number < self.most else None
        self._num_steps, self._had_retries = 0, False

    def _is_short(self) -> bool:
        """Whether the device's allocator had to free memory and try again in this step and in the one before."""
        number = num_alloc_retries(self.run.accelerator.device)
        has_retries, self._num_retries = number > self._num_retries, number
        is_short, self._had_retries = has_retries and self._had_retries, has_retries
        return is_short


def num_alloc_retries(device: torch.device) -> int:
    """How often CUDA's allocator has emptied its cache because memory was short."""
    return torch.cuda.memory_stats(device).get("num_alloc_retries", 0) if device.type == "cuda" else 0


class Undone:
    """Whether a step of an optimizer has changed nothing: it may then be done again.

    Versions of the weights do not tell it, since fused kernels do not count them; but any of these optimizers
    counts a parameter's steps, or changes its state, before it changes the parameter.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.before = optimizer, versions_of(optimizer)
        self.groups = [dict(group) for group in optimizer.param_groups]

    def __call__(self) -> bool:
        """Also removes the state of parameters that had none before, and what the groups have counted."""
        state = self.optimizer.state
        for group, before in zip(self.optimizer.param_groups, self.groups, strict=True):
            group.update(before)
        new = {parameter: state.pop(parameter) for parameter in list(state) if parameter not in self.before[1]}
        return versions_of(self.optimizer) == self.before and not any(each.get("step", 0) for each in new.values())


def versions_of(optimizer: Any) -> tuple[list[int], dict[torch.Tensor, list[Any]]]:
    """How often each weight was changed, and each tensor of its state; other values of the state as they are."""
    weights = [times_changed(each) for group in optimizer.param_groups for each in group["params"]]
    states = {
        parameter: [times_changed(each) if isinstance(each, torch.Tensor) else each for each in state.values()]
        for parameter, state in optimizer.state.items()
        if state  # a mere look at it may have left an empty one
    }
    return weights, states


def what_helps(recipe: Recipe) -> str:
    """Flags that need less memory, of those that are not set."""
    flags = []
    if not recipe.gradient_checkpointing:
        flags.append("--gradient_checkpointing")
    if recipe.mixed_precision == "no" and recipe.device != "cpu":
        flags.append("--mixed_precision bf16")
    if recipe.optimizer == "adamw":
        flags.append("--optimizer adamw8bit")
    if (recipe.use_ema or recipe.ema_snapshots) and not recipe.offload_ema:
        flags.append("--offload_ema")
    return " or ".join([*([", ".join(flags)] if flags else []), "a smaller --resolution"])


def out_of_memory(run: Run, where: str) -> OutOfMemory:
    """The error that ends a run, with what helps, and from where it can resume; `where` says what memory was for."""
    there_is = f"{run.recipe.output_dir} has no checkpoint"
    if list_checkpoints(run.output_dir):
        there_is = f"{resume_command(run.recipe)} then {resume_hint(run.recipe)}"
    return OutOfMemory(
        f"no memory for {where}: use {what_helps(run.recipe)}; `sd-recipes plan` says what each would save; {there_is}"
    )


@contextmanager
def shortage_explained(run: Run) -> Iterator[None]:
    """Say what to do where memory runs out and the step cannot be done again. Raises OutOfMemory."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        step = run.state.progress.global_step
        where = f"what follows step {step}, which cannot be done again ({one_line(error, 200)})"
        raise out_of_memory(run, where) from error
