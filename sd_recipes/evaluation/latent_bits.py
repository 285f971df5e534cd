"""How many bits a model needs for pictures: its variational bound on held-out and training rows, on all processes.

With captions and without them, and for every model that is compared, a row has the same latent, timesteps and noise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sd_recipes.data.held_out import HELD_OUT_SEED, choose
from sd_recipes.errors import RecipeError
from sd_recipes.evaluation.bound import PILOT_IMAGES, Bound, choose_timesteps, conclude
from sd_recipes.evaluation.denoiser import Denoiser, SquaredErrors
from sd_recipes.evaluation.diffusion_process import VARIANCES, DiffusionProcess, NoBound
from sd_recipes.evaluation.encoded_rows import CAPTIONS, NO_CAPTIONS, WORDS, AboutRows, EncodedRows, encode_rows
from sd_recipes.evaluation.sample_errors import HELD_OUT
from sd_recipes.evaluation.timestep_sampling import TimestepSampling, knots
from sd_recipes.evaluation.validation import Validator
from sd_recipes.model.conditioning import unet_arguments
from sd_recipes.runtime.agreement import all_gather
from sd_recipes.runtime.signals import Stopped, stop_request

logger = logging.getLogger(__name__)

COUNTING = "while bits were counted; nothing was written"

Part = TypeVar("Part")


@dataclass(frozen=True, eq=False)
class SetBits:
    """Of one set of rows."""

    about: AboutRows
    errors: dict[str, SquaredErrors]  # with captions and without
    bounds: dict[str, dict[str, Bound]]  # likewise, of each variance


@dataclass(frozen=True, eq=False)
class LatentBits:
    """What the bound says of a model."""

    sets: dict[str, SetBits]  # of held-out rows and, where one of them can be used, of training rows
    variance: str  # the one that is quoted
    sampling: TimestepSampling | None  # of all rows' timesteps; None for all timesteps
    latent_shape: tuple[int, ...]  # (C, h, w)
    picture_size: tuple[int, int]  # (height, width)
    scaling_factor: float  # of the latents
    prediction_type: str
    process: DiffusionProcess

    def bound(self, which: str, captions: str = CAPTIONS) -> Bound:
        """That of the quoted variance."""
        return self.sets[which].bounds[captions][self.variance]


def process_of(validator: Validator) -> DiffusionProcess:
    """The model's process, of which there is a bound. Raises RecipeError for a model that has none."""
    with _in_one_line():
        process = DiffusionProcess(validator.components.scheduler)
        process.prediction(validator.objective.prediction_type)
        return process


@torch.no_grad()
def count_bits(
    validator: Validator, *, rows: int, timesteps: int | None, variance: str, before: LatentBits | None
) -> LatentBits | None:
    """The bound of the components' weights as they are, on at most `rows` rows of each set; the same on all processes.

    At so many `timesteps` a row, or all of them: at those of the bits `before`, if they fit. None, with a warning, if
    there is no memory for it, or no held-out row that can be used. Every process has to call it. Raises RecipeError
    for a model without a bound, latents or predictions that are not finite, and Stopped.
    """
    process = process_of(validator)
    own: dict[str, EncodedRows | None] = {}
    about: dict[str, AboutRows] = {}
    for which in validator.samples:
        found = _of_all_processes(validator, partial(_encode_own, validator, which, rows, own))
        if found is None:
            return None
        if found:
            about[which] = AboutRows.joined(found)
    if HELD_OUT not in about:
        logger.warning("None of the held-out rows that --bound looks at can be used: their bits are left out.")
        return None

    sampling = before.sampling if before and len(before.process) == len(process) else None
    if timesteps is not None and sampling is None:
        first = about[HELD_OUT].numbers[:PILOT_IMAGES]
        pilot = _squared_errors(validator, process, own[HELD_OUT], CAPTIONS, "choosing timesteps", first=first)
        if pilot is None:
            return None
        with _in_one_line():
            sampling = choose_timesteps(pilot, process, variance, timesteps)
    sets = {}
    for which, of_set in about.items():
        errors = {}
        for kind in (CAPTIONS, NO_CAPTIONS):
            words = f"{WORDS[which]} {WORDS[kind]}"
            measured = _squared_errors(validator, process, own[which], kind, words, sampling=sampling)
            if measured is None:
                return None
            errors[kind] = measured
        with _in_one_line():
            bounds = {
                kind: {each: conclude(measured, process, each) for each in VARIANCES}
                for kind, measured in errors.items()
            }
        sets[which] = SetBits(of_set, errors, bounds)
    samples = validator.samples[HELD_OUT]
    return LatentBits(
        sets,
        variance,
        sampling,
        samples.builder.latent_shape(samples.size),
        samples.size,
        validator.components.vae.config.scaling_factor,
        validator.objective.prediction_type,
        process,
    )


def _encode_own(
    validator: Validator, which: str, number: int, own: dict[str, EncodedRows | None], at_once: int
) -> AboutRows | None:
    """Encode this process's share of a set's rows into `own`."""
    samples = validator.samples[which]
    assert samples.builder.rows is not None
    with validator.encoder.on_device():
        own[which] = encode_rows(validator, which, choose(samples.builder.rows, number).numbers[samples.own], at_once)
    encoded = own[which]
    return encoded.about if encoded else None


def _squared_errors(
    validator: Validator,
    process: DiffusionProcess,
    encoded: EncodedRows | None,
    kind: str,
    what: str,
    *,
    sampling: TimestepSampling | None = None,
    first: np.ndarray | None = None,
) -> SquaredErrors | None:
    """All processes' errors; of the rows whose numbers come `first`, those of a pilot. None if memory runs out."""

    def measure(at_once: int) -> SquaredErrors | None:
        places = np.arange(len(encoded.latents) if encoded else 0)
        if encoded and first is not None:
            places = np.flatnonzero(np.isin(encoded.about.numbers, first))
        if encoded is None or not len(places):
            return None
        evaluations = len(process) if sampling is None else sampling.evaluations
        total = len(places) * (evaluations if first is None else len(knots(len(process))))
        visible = validator.accelerator.is_local_main_process
        with (
            validator.evaluating(),
            tqdm(total=total, desc=f"Bits: {what}", unit="sample", leave=False, disable=not visible) as bar,
            _in_one_line(),
        ):
            denoiser = Denoiser(
                partial(_predict, validator, bar),
                encoded.latents[places],
                process,
                validator.objective.prediction_type,
                seed=HELD_OUT_SEED,
                batch_size=at_once,
                conditioning={name: each[places] for name, each in encoded.conditioning[kind].items()},
                image_numbers=encoded.about.numbers[places].tolist(),
            )
            if first is not None:
                return denoiser.at_few_timesteps(len(places))
            if sampling is None:
                return denoiser.at_all_timesteps(1)
            return denoiser.at_sampled_timesteps(sampling, 1)

    parts = _of_all_processes(validator, measure)
    return SquaredErrors.joined(parts) if parts else None


def _predict(validator: Validator, bar: tqdm, noisy_latents: Tensor, timesteps: Tensor, **conditioning: Any) -> Tensor:
    stop_request.check(COUNTING)
    with validator.accelerator.autocast():
        prediction: Tensor = validator.components.unet(
            noisy_latents, timesteps, **unet_arguments(conditioning), return_dict=False
        )[0]
    if not prediction.isfinite().all():
        rounded = validator.accelerator.mixed_precision != "no"
        way_out = "evaluate with --mixed_precision no" if rounded else "its weights are broken: evaluate earlier ones"
        raise RecipeError(f"--bound: the UNet's predictions are not finite: {way_out}")
    bar.update(len(noisy_latents))
    return prediction


def _of_all_processes(validator: Validator, work: Callable[[int], Part | None]) -> list[Part] | None:
    """Every process's part, where it has one; None if one had no memory for it. Raises Stopped, on all of them."""
    own, stopped = None, False
    try:
        own = validator.samples_at_once.attempt(work)
    except Stopped:
        stopped = True
    shares = all_gather((own, validator.samples_at_once.number > 0, stopped))
    if any(stopped for _, _, stopped in shares):
        raise stop_request.stopped(COUNTING)
    if not all(has_memory for _, has_memory, _ in shares):
        logger.warning("No memory for --bound: bits are left out.")
        return None
    return [part for part, _, _ in shares if part is not None]


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except NoBound as error:
        raise RecipeError(f"--bound: {error}") from error
