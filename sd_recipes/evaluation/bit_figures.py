"""What `LatentBits` say, as figures that JSON holds: values with their standard errors, curves, and shares."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sd_recipes.evaluation.bound import Bound, standard_errors
from sd_recipes.evaluation.encoded_rows import CAPTIONS, NO_CAPTIONS, AboutRows
from sd_recipes.evaluation.figures import NUM_BINS
from sd_recipes.evaluation.latent_bits import LatentBits
from sd_recipes.evaluation.sample_errors import HELD_OUT, TRAIN
from sd_recipes.recipe import ObjectiveConfig
from sd_recipes.training.objective import LOSS_OVER_X0, WEIGHTS

CURVE_POINTS = 60
MIN_SNR_GAMMA = 5.0  # that of the paper

Figure = dict[str, float | None]  # a value, and its standard error where there is more than one image


def bit_figures(bits: LatentBits, before: LatentBits | None) -> dict[str, Any]:
    """The figures by name, in bits per dimension where they do not say otherwise.

    `before` is the first model that is compared, of which `change` is the difference of held-out rows, where both have
    the same latents.
    """
    figures: dict[str, Any] = {
        "space": {
            "latents": list(bits.latent_shape),
            "dimensions": math.prod(bits.latent_shape),
            "scaling_factor": bits.scaling_factor,
            "pixel_values": _num_pixel_values(bits),
        },
        "prediction_type": bits.prediction_type,
        "variance": bits.variance,
        "num_train_timesteps": len(bits.process),
        "timesteps": bits.sampling.evaluations if bits.sampling else "all",
        **{which: _of_set(bits, which) for which in bits.sets},
        "contributions": contributions(bits),
    }
    if TRAIN in bits.sets:
        figures["gap"] = _gap(bits.bound(HELD_OUT), bits.bound(TRAIN))
    if before is not None and before is not bits and have_same_latents(bits, before):
        figures["change"] = _figure(*bits.bound(HELD_OUT).difference(before.bound(HELD_OUT)))
    return figures


def _of_set(bits: LatentBits, which: str) -> dict[str, Any]:
    of_set = bits.sets[which]
    told, error = bits.bound(which, NO_CAPTIONS).difference(bits.bound(which))
    dimensions = math.prod(bits.latent_shape)
    return {
        "rows": len(of_set.about.numbers),
        CAPTIONS: _of_bound(bits, which, CAPTIONS),
        NO_CAPTIONS: _of_bound(bits, which, NO_CAPTIONS),
        "told_by_captions": _figure(told, error),
        "told_by_captions_per_picture": _figure(told * dimensions, error * dimensions),
    }


def _of_bound(bits: LatentBits, which: str, kind: str) -> dict[str, Any]:
    bound = bits.bound(which, kind)
    error = bound.standard_error
    denoising = bound.images.denoising.sum(axis=1)
    undone = float(bound.total - math.log2(bits.scaling_factor))
    rates, distortions = bound.rate_distortion
    shown = _spread_over_rates(rates)
    found: dict[str, Any] = {
        "prior": _figure(bound.prior, error.prior),
        "denoising": _mean(denoising),
        "reconstruction": _figure(bound.reconstruction, error.reconstruction),
        "total": _figure(bound.total, error.total),
        "scaling_undone": _figure(undone, error.total),
        "by_variance": {
            name: _figure(each.total, each.standard_error.total) for name, each in bits.sets[which].bounds[kind].items()
        },
    }
    found["rate_distortion"] = {"bits": rates[shown].tolist(), "rmse": distortions[shown].tolist()}
    of_pixels = pixel_bits(bits, bound, bits.sets[which].about)
    if of_pixels is not None:
        found["pixels"] = _mean(of_pixels)
    return found


def pixel_bits(bits: LatentBits, bound: Bound, about: AboutRows) -> np.ndarray | None:
    """(N,): each picture's bits per pixel value, all channels counted (Vahdat et al. 2021, section 3).

        -log p(x) ≤ [bound on -log p(z)] - H(q(z | x)) - log p(x | z)

    z is the latent before it is scaled. p(x | z) is a Gaussian around the decoded picture, in gray levels, with one
    variance for all pictures and pixels, which is fitted to them. Values that are whole numbers are dequantized
    uniformly (Theis et al. 2016, section 3.1), which adds 1/12 to their squared errors: so the density's bits bound
    those of the 256 gray levels. None if a row has no pixels.
    """
    errors = about.decoding_errors + 1 / 12
    if not np.isfinite(errors).all():
        return None
    variance = errors.mean()
    decoding = (0.5 * np.log(2 * np.pi * variance) + errors / (2 * variance)) / math.log(2)
    of_latents = bound.dimensions * (bound.images.total - math.log2(bits.scaling_factor))
    return (of_latents - about.entropies) / _num_pixel_values(bits) + decoding


def _num_pixel_values(bits: LatentBits) -> int:
    return 3 * math.prod(bits.picture_size)


def contributions(bits: LatentBits) -> dict[str, list[float]]:
    """By weight, the share of each tenth of the timesteps, the least noise first, in the held-out loss with captions.

    `bound` is L_1 … L_{T-1}; L_0, a density, may be below 0. `simple` is the mean squared error of what the network
    predicts, and `min_snr` that error with the weight of min-SNR for γ = 5.
    """
    bound = bits.bound(HELD_OUT)
    snr = torch.from_numpy(bits.process.alphas_cumprod / (1 - bits.process.alphas_cumprod))
    of_prediction = LOSS_OVER_X0[bits.prediction_type](snr).numpy()
    of_min_snr = WEIGHTS["snr_gamma"](snr, MIN_SNR_GAMMA, ObjectiveConfig()).numpy()
    losses = {
        "bound": np.append(0, bound.denoising[::-1]),
        "simple": of_prediction * bound.squared_errors,
        "min_snr": of_min_snr * bound.squared_errors,
    }
    tenths = np.arange(len(snr)) * NUM_BINS // len(snr)
    return {
        name: (np.bincount(tenths, each, minlength=NUM_BINS) / each.sum()).tolist() for name, each in losses.items()
    }


def have_same_latents(one: LatentBits, other: LatentBits) -> bool:
    """Whether two models' bits are of the same rows' same latents, at the same timesteps and noise."""
    first, second = (each.sets[HELD_OUT].errors[CAPTIONS] for each in (one, other))
    return (
        np.array_equal(first.image_numbers, second.image_numbers)
        and np.array_equal(first.timesteps, second.timesteps)
        and bool(np.allclose(first.mean_squares, second.mean_squares, rtol=1e-6))
    )


def error_table(bits: LatentBits) -> pa.Table:
    """All that was measured: the squared error of x̂_0, per dimension, of each row at its timesteps.

    `weight` makes sums over a row's errors estimates of sums over all timesteps.
    """
    tables = []
    for which, of_set in bits.sets.items():
        for kind, errors in of_set.errors.items():
            timesteps = errors.timesteps.reshape(-1)
            weights = errors.sampling.weights[timesteps] if errors.sampling else np.ones(len(timesteps))
            tables.append(
                pa.table(
                    {
                        "set": pa.array([which] * len(timesteps)),
                        "captions": pa.array([kind == CAPTIONS] * len(timesteps)),
                        "row": pa.array(np.repeat(errors.image_numbers, errors.timesteps[0].size).astype(np.int32)),
                        "timestep": pa.array(timesteps.astype(np.int32)),
                        "squared_error": errors.values.reshape(-1),
                        "weight": weights,
                    }
                )
            )
    return pa.concat_tables(tables)


def _spread_over_rates(rates: np.ndarray) -> np.ndarray:
    """Places of a curve's points, evenly along its rates, which mostly come at the last of the timesteps."""
    wanted = np.linspace(rates[0], rates[-1], CURVE_POINTS)
    return np.unique(np.append(np.searchsorted(rates, wanted).clip(max=len(rates) - 1), [0, len(rates) - 1]))


def _gap(held_out: Bound, trained: Bound) -> Figure:
    """How many bits more held-out rows take than training rows, whose errors are independent."""
    errors = held_out.standard_error.total, trained.standard_error.total
    return _figure(held_out.total - trained.total, math.hypot(*errors))


def _mean(values: np.ndarray) -> Figure:
    return _figure(values.mean(), standard_errors(values, axis=0))


def _figure(value: Any, error: Any) -> Figure:
    return {"value": float(value), "error": float(error) if math.isfinite(error) else None}
