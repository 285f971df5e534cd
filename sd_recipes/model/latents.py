"""Pixels to moments to latents.

Split into a deterministic half, which can be kept for later epochs, and a random half.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL

MAX_PIXELS = 2**20  # that the VAE encodes at once: four images of 512²
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
    mean, _ = moments.chunk(2, dim=1)
    latents = mean + torch.exp(0.5 * posterior_logvar(moments)) * posterior_noise
    return latents * vae.config.scaling_factor


def posterior_logvar(moments: torch.Tensor) -> torch.Tensor:
    """Moments (B, 2C, h, w) to the log-variance that latents are drawn with, before they are scaled, (B, C, h, w)."""
    _, logvar = moments.chunk(2, dim=1)
    return logvar.clamp(MIN_LOGVAR, MAX_LOGVAR)


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents (B, C, h, w) to gray levels 0 … 255, not rounded, (B, 3, H, W) float32."""
    pixel_values = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
    return (pixel_values.float().clamp(-1, 1) + 1) * 127.5


class LatentEncoder:
    """The VAE as a run uses it. It alone moves the VAE between devices: off the GPU while moments come from a store."""

    def __init__(self, vae: AutoencoderKL, device: torch.device, dtype: torch.dtype) -> None:
        self.vae, self.device, self.dtype = vae, device, dtype
        self.vae.to(device, dtype=dtype)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (U, 3, H, W) on the run's device to moments (U, 2C, H/f, W/f), float32.

        In parts of MAX_PIXELS: of a large batch the activations would take more memory than the rest of a step.
        """
        self.vae.to(self.device)
        parts = pixels.split(max(1, MAX_PIXELS // (pixels.shape[2] * pixels.shape[3])))
        return torch.cat([encode_pixels(self.vae, to_pixel_values(part, self.dtype)) for part in parts])

    def sample(self, moments: torch.Tensor, posterior_noise: torch.Tensor) -> torch.Tensor:
        """Scaled latents, as `sample_latents`."""
        return sample_latents(self.vae, moments, posterior_noise)

    def rest(self) -> None:
        """Make room on the device, until the VAE is needed again."""
        self.vae.to("cpu")

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within this context the VAE is on the run's device, for a pipeline that decodes; afterwards, where it was."""
        was_on = self.vae.device
        self.vae.to(self.device)
        try:
            yield
        finally:
            self.vae.to(was_on)
