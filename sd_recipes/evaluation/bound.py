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

from sd_recipes.evaluation.denoiser import Denoiser
from sd_recipes.evaluation.diffusion_process import VARIANCES, DiffusionProcess
from sd_recipes.evaluation.timestep_sampling import TimestepSampling, knots, smooth

PILOT_IMAGES = 16
# One counter of the generator per purpose: a pilot's noise is not that of the estimate whose timesteps it chooses.
ALL_TIMESTEPS, SAMPLED_TIMESTEPS, CHOICE, PILOT = range(1, 5)


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
    dimensions: int  # D of an image's latent
    sampling: TimestepSampling | None  # pass it on as `timesteps` to evaluate another network at the same ones

    @property
    def bits_per_image(self) -> Terms:
        """The mean bound in bits per image: D times that per dimension."""
        return Terms(
            *(self.dimensions * each for each in (self.prior, self.denoising, self.reconstruction, self.total))
        )

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
        timesteps = pilot(denoiser, variance, int(timesteps))
    if timesteps is None:
        squared_errors, fitted_to = at_all_timesteps(denoiser, num_samples)
    elif isinstance(timesteps, TimestepSampling):
        squared_errors, fitted_to = at_sampled_timesteps(denoiser, timesteps, num_samples)
    else:
        raise ValueError(
            f"timesteps is a {type(timesteps).__name__}: give how many, None for all, or a bound's sampling"
        )

    constants, slopes = process.terms(variance, fitted_to)
    prior = process.prior(denoiser.latents.cpu().double().square().flatten(1).mean(dim=1).numpy())
    transitions = constants + slopes * squared_errors.mean(axis=1)
    terms = np.column_stack([prior, transitions[:, ::-1]]) / math.log(2)
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
        dimensions=latents[0].numel(),
        sampling=timesteps,
    )


def pilot(denoiser: Denoiser, variance: str, evaluations: int) -> TimestepSampling:
    """Sampling in proportion to slope · m_t, from a few timesteps of a few images. Raises ValueError for none."""
    num_timesteps = len(denoiser.process)
    uniform = TimestepSampling.uniform(num_timesteps, evaluations)
    tried = knots(num_timesteps)
    timesteps = np.broadcast_to(tried, (min(len(denoiser.latents), PILOT_IMAGES), 1, len(tried)))
    squared_errors = smooth(timesteps, denoiser.squared_errors(timesteps, PILOT), num_timesteps)
    _, slopes = denoiser.process.terms(variance, squared_errors)
    return uniform.proportional_to(slopes * squared_errors)


def at_all_timesteps(denoiser: Denoiser, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """m_t of each image and sample, (N, num_samples, T), and their mean, (T,), to fit a variance to."""
    shape = (len(denoiser.latents), num_samples, len(denoiser.process))
    squared_errors = denoiser.squared_errors(np.broadcast_to(np.arange(shape[-1]), shape), ALL_TIMESTEPS)
    return squared_errors, squared_errors.mean(axis=(0, 1))


def at_sampled_timesteps(
    denoiser: Denoiser, sampling: TimestepSampling, num_samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased estimates of what `at_all_timesteps` gives, 0 where nothing was drawn; and a smooth mean, (T,).

    Raises ValueError for a sampling of another number of timesteps.
    """
    shape = (len(denoiser.latents), num_samples, len(denoiser.process))
    if len(sampling.probabilities) != shape[-1]:
        raise ValueError(
            f"timesteps were chosen among {len(sampling.probabilities)}, but the scheduler has {shape[-1]}: give a "
            "number, and they are chosen anew"
        )
    timesteps = np.array(
        [
            [sampling.draw(denoiser.generator(image, sample, 0, CHOICE).random()) for sample in range(num_samples)]
            for image in range(len(denoiser.latents))
        ]
    )
    evaluated = denoiser.squared_errors(timesteps, SAMPLED_TIMESTEPS, antithetic=True)
    squared_errors = np.zeros(shape)
    images, samples = np.arange(shape[0])[:, None, None], np.arange(num_samples)[:, None]
    np.add.at(squared_errors, (images, samples, timesteps), sampling.weights[timesteps] * evaluated)
    return squared_errors, smooth(timesteps, evaluated, shape[-1])


def standard_errors(values: np.ndarray, axis: int) -> np.ndarray:
    """Of the mean over an axis; NaN where that has a single entry, which says nothing of the spread."""
    size = values.shape[axis]
    if size < 2:
        return np.full_like(values.mean(axis=axis), np.nan)
    return values.std(axis=axis, ddof=1) / math.sqrt(size)
