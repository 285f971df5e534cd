"""The variational bound on the negative log-likelihood of latents (Ho et al. 2020, eq. 5), in bits.

    -log p_θ(x_0) ≤ L_T + L_{T-1} + … + L_1 + L_0, in expectation over q(x_1 … x_T | x_0)

`diffusion_process.py` derives the terms: L_T has a closed form, and every other one is a constant plus a slope times
the expected squared error of the network's x̂_0. All that is estimated is those errors, from noise that depends on
nothing but (seed, image, timestep, draw). It is the bound of the network as it is: no clipping, no guidance. Of the
project, this file and the three that it imports know only each other, and the formulas of `model/predictions.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sd_recipes.evaluation.denoiser import Denoiser, SquaredErrors
from sd_recipes.evaluation.diffusion_process import VARIANCES, DiffusionProcess
from sd_recipes.evaluation.timestep_sampling import TimestepSampling

PILOT_IMAGES = 16


@dataclass(frozen=True, eq=False)
class Terms:
    """A bound's terms in bits, or their standard errors. Those of single images have one more axis, the first."""

    prior: np.ndarray  # L_T, ()
    denoising: np.ndarray  # L_{T-1}, …, L_1, (T-1,): of t = T … 2
    reconstruction: np.ndarray  # L_0
    total: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Terms:
        """From (…, T + 2): L_T, L_{T-1}, …, L_0, and what is said of their sum."""
        # [()]: a number where there is no other axis.
        return cls(values[..., 0][()], values[..., 1:-2], values[..., -2][()], values[..., -1][()])


@dataclass(frozen=True, eq=False)
class Bound(Terms):
    """The mean bound of the images, in bits per dimension."""

    images: Terms  # each image's own, (N,) and (N, T-1), in bits per dimension
    standard_error: Terms  # of the means over images, as a sample of more images; NaN for a single one
    # (N,): of each image's own total, from the timesteps and the noise that were drawn; NaN with num_samples=1.
    images_standard_error: np.ndarray
    squared_errors: np.ndarray  # (T,): m_t of t = 1 … T, the mean (x_0 - x̂_0)² that a variance is fitted to
    dimensions: int  # D of an image's latent
    sampling: TimestepSampling | None  # pass it on as `timesteps` to evaluate another network at the same ones

    @property
    def bits_per_image(self) -> Terms:
        """The mean bound in bits per image: D times that per dimension."""
        return Terms(
            *(self.dimensions * each for each in (self.prior, self.denoising, self.reconstruction, self.total))
        )

    @property
    def rate_distortion(self) -> tuple[np.ndarray, np.ndarray]:
        """Rate and distortion at t = T … 1, (T,) each (Ho et al. 2020, section 4.3 and fig. 5).

        The bits per dimension that it takes to send x_t, and the root mean squared error of the x̂_0 that x_t gives.
        """
        return self.prior + np.cumsum(np.append(0, self.denoising)), np.sqrt(self.squared_errors[::-1])

    def difference(self, other: Bound) -> tuple[float, float]:
        """How much higher this total is than another of the same images, and its standard error, in bits per dimension.

        With the same seed and `timesteps` both have met the same noise, most of which then cancels.
        Raises ValueError for another number of images.
        """
        if len(self.images.total) != len(other.images.total):
            raise ValueError(
                f"bounds of {len(self.images.total)} and of {len(other.images.total)} images cannot be compared one by "
                "one: evaluate both networks on the same latents"
            )
        differences = self.images.total - other.images.total
        return float(differences.mean()), float(standard_errors(differences, axis=0))


def variational_bound(
    predict: Callable[..., Tensor],
    latents: Tensor,
    scheduler: Any,
    *,
    prediction_type: str,
    variance: str = "fixed_large",
    timesteps: TimestepSampling | int | None = None,
    num_samples: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    conditioning: Mapping[str, Tensor] | None = None,
    image_numbers: Sequence[int] | None = None,
) -> Bound:
    """Bound the negative log-likelihood of latents, (N, …), under the reverse process of a network.

    `predict(noisy_latents, timesteps)` gets (B, …) float32 and (B,) int64, diffusers' timesteps 0 … T - 1, on the
    latents' device, with B at most `batch_size`, and returns (B, …). With `conditioning`, tensors (N, …), it also gets
    the rows of its images as keyword arguments. Of `scheduler`, the `alphas_cumprod` are used. `prediction_type` is
    epsilon, v_prediction, sample or score (-ε / √(1 - ᾱ_t)).

    `variance` is that of the reverse process: fixed_large (β_t), fixed_small (β̃_t, but β̃_2 in the last term), or
    fitted: for every timestep the one that suits these images best together. It is fitted to the draws that it is
    judged by, so that the bound is too low by about 1 / (N D num_samples) bits per dimension.

    `timesteps=None` evaluates all T, `num_samples` times with other noise. A number evaluates only as many an image,
    again `num_samples` times, without bias: more of those that add more to the bound, which a pilot finds out on up to
    32 timesteps of up to 16 images. The `sampling` of the result, given in place of the number, has another network
    meet the same (t, ε). `image_numbers` are what the images' draws belong to, 0 … N - 1 if left out: with its number,
    an image meets the same ones alone or in another place.

    Raises ValueError, in one line, for a scheduler that is none of DDPM's kind, for ε and score at zero terminal SNR,
    for latents and predictions that are not finite or of the wrong shape, and for settings that are out of range.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance {variance!r} is not known: give {', '.join(VARIANCES)}")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: give 1 or more")
    process = DiffusionProcess(scheduler)
    denoiser = Denoiser(
        predict, latents, process, prediction_type,
        seed=seed, batch_size=batch_size, conditioning=conditioning, image_numbers=image_numbers,
    )  # fmt: skip
    if isinstance(timesteps, int | np.integer):
        timesteps = choose_timesteps(denoiser.at_few_timesteps(PILOT_IMAGES), process, variance, int(timesteps))
    if timesteps is None:
        return conclude(denoiser.at_all_timesteps(num_samples), process, variance)
    if isinstance(timesteps, TimestepSampling):
        return conclude(denoiser.at_sampled_timesteps(timesteps, num_samples), process, variance)
    raise ValueError(f"timesteps is a {type(timesteps).__name__}: give how many, None for all, or a bound's sampling")


def choose_timesteps(
    pilot: SquaredErrors, process: DiffusionProcess, variance: str, evaluations: int
) -> TimestepSampling:
    """Sampling in proportion to slope · m_t, from a pilot's errors. Raises ValueError for none."""
    squared_errors = pilot.mean(len(process))
    _, slopes = process.terms(variance, squared_errors)
    return TimestepSampling.uniform(len(process), evaluations).proportional_to(slopes * squared_errors)


def conclude(errors: SquaredErrors, process: DiffusionProcess, variance: str) -> Bound:
    """The bound that follows from errors at all timesteps or at drawn ones. Raises NoBound if no variance fits."""
    fitted_to = errors.mean(len(process))
    constants, slopes = process.terms(variance, fitted_to)
    squared_errors = errors.by_timestep(len(process))
    transitions = constants + slopes * squared_errors.mean(axis=1)
    terms = np.column_stack([process.prior(errors.mean_squares), transitions[:, ::-1]]) / math.log(2)
    images = np.column_stack([terms, terms.sum(axis=1)])
    samples = squared_errors @ slopes / math.log(2)  # (N, num_samples): what differs between an image's samples
    mean = Terms.of(images.mean(axis=0))
    return Bound(
        mean.prior,
        mean.denoising,
        mean.reconstruction,
        mean.total,
        images=Terms.of(images),
        standard_error=Terms.of(standard_errors(images, axis=0)),
        images_standard_error=standard_errors(samples, axis=1),
        squared_errors=fitted_to,
        dimensions=errors.dimensions,
        sampling=errors.sampling,
    )


def standard_errors(values: np.ndarray, axis: int) -> np.ndarray:
    """Of the mean over an axis; NaN where that has a single entry, which says nothing of the spread."""
    size = values.shape[axis]
    if size < 2:
        return np.full_like(values.mean(axis=axis), np.nan)
    return values.std(axis=axis, ddof=1) / math.sqrt(size)
