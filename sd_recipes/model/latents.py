"""pixel_values to moments to latents.

Split into a deterministic half, which can be kept for later epochs, and a half that depends on a draw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL

if TYPE_CHECKING:
    from sd_recipes.data.batches import Batch
    from sd_recipes.data.latent_store import LatentCache

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0  # bounds of diffusers' DiagonalGaussianDistribution


def to_pixel_values(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 (B, 3, H, W) in 0-255 to `dtype` in -1..1.

    Scaled in float32 and rounded once: bfloat16's own quotients are up to half a gray level off.
    """
    return (pixels.float() / 127.5 - 1).to(dtype)


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixel_values: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) to moments (B, 2C, H/f, W/f): mean and log-variance of the VAE's posterior, float32."""
    return vae.encode(pixel_values).latent_dist.parameters.float()


def sample_latents(vae: AutoencoderKL, moments: torch.Tensor, posterior_noise: torch.Tensor) -> torch.Tensor:
    """Moments (B, 2C, h, w) and standard normal noise (B, C, h, w) to scaled latents (B, C, h, w).

    Rombach et al. 2021, appendix G: latents are scaled to about unit variance.
    """
    mean, logvar = moments.chunk(2, dim=1)
    latents = mean + torch.exp(0.5 * logvar.clamp(MIN_LOGVAR, MAX_LOGVAR)) * posterior_noise
    return latents * vae.config.scaling_factor


def batch_moments(
    vae: AutoencoderKL, batch: Batch, dtype: torch.dtype, cache: LatentCache | None = None
) -> torch.Tensor:
    """Moments (B, 2C, h, w) of a batch: those that came with it, and those of its pixels, which the cache keeps."""
    if len(batch.live) == len(batch.weights) and cache is None:
        return encode_pixels(vae, to_pixel_values(batch.pixel_values, dtype))
    batch_size, channels, height, width = batch.noise.shape
    moments = batch.moments
    if moments is None:
        moments = torch.zeros(batch_size, 2 * channels, height, width, device=batch.noise.device)
    if len(batch.live) == 0:
        return moments
    if vae.device != batch.noise.device:  # it was set free when the cache was full
        vae.to(batch.noise.device)
    pixel_values = to_pixel_values(batch.pixel_values, dtype)
    made = encode_pixels(vae, pixel_values)
    if cache is not None:
        made = cache.round(made)
        mirrored = cache.round(encode_pixels(vae, pixel_values.flip(-1))) if cache.keeps_flips else None
        if batch.plan.weight:  # otherwise another process trains on the row, and keeps it
            cache.put(batch.records, made, mirrored)
        if mirrored is not None:
            made = torch.where(batch.flip[batch.live][:, None, None, None], mirrored, made)
    moments[batch.live] = made
    return moments
