"""pixel_values to moments to latents.

Split into a deterministic half, which can be kept for later epochs, and a half that depends on a draw.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0  # bounds of diffusers' DiagonalGaussianDistribution


def to_pixel_values(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 (B, 3, H, W) in 0-255 to `dtype` in -1..1."""
    return pixels.to(dtype) / 127.5 - 1


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
