"""The noise that latents are mixed with in training: white, or with more of what is coarse."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sd_recipes.data.draws import Draws
from sd_recipes.recipe import ObjectiveConfig


def offset_noise(noise: np.ndarray, drawn: Draws, config: ObjectiveConfig) -> np.ndarray:
    """Plus noise that is constant over each channel, so that brightness is learned too (Guttenberg 2023)."""
    return noise + config.noise_offset * drawn.offset_noise


def pyramid_noise(noise: np.ndarray, drawn: Draws, config: ObjectiveConfig) -> np.ndarray:
    """Plus ever coarser and weaker noise (Whitaker 2023, multi-resolution noise), of variance 1 together.

    Level i is discount^i times white noise at a resolution between two and four times below level i - 1, enlarged by
    linear interpolation; the last one is a single value. The variance is that over all draws, averaged over the latent:
    a sample's own would take from it the very part that all its values share.
    """
    total, variance = noise, 1.0
    shape = noise.shape
    for level in range(1, config.multires_noise_iterations + 1):
        if shape[1:] == (1, 1):
            break
        coarse = drawn.coarse_noise(level, shape)
        shape, scale = coarse.shape, config.multires_noise_discount**level
        rows, columns = (enlargement(size, few) for size, few in zip(noise.shape[1:], shape[1:], strict=True))
        total = total + scale * (rows @ coarse @ columns.T)
        variance += scale**2 * np.square(rows).sum(axis=1).mean() * np.square(columns).sum(axis=1).mean()
    return (total / np.sqrt(variance)).astype(np.float32)


def enlargement(size: int, few: int) -> np.ndarray:
    """(size, few) matrix that interpolates `few` values linearly; pixels are areas, and the ends are repeated."""
    places = ((np.arange(size) + 0.5) * few / size - 0.5).clip(0, few - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(few)))


# By the setting that turns it on, in the order in which they are applied.
NOISES: dict[str, Callable[[np.ndarray, Draws, ObjectiveConfig], np.ndarray]] = {
    "multires_noise_iterations": pyramid_noise,
    "noise_offset": offset_noise,
}


def training_noise(drawn: Draws, config: ObjectiveConfig) -> np.ndarray:
    """(C, h, w) float32 noise of one sample."""
    noise = drawn.noise
    for name, function in NOISES.items():
        if getattr(config, name):
            noise = function(noise, drawn, config)
    return noise
