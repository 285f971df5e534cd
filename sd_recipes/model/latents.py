"""Pixels to moments to latents.

Split into a deterministic half, which can be kept for later epochs, and a random half.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL

logger = logging.getLogger(__name__)

MAX_PIXELS, MAX_PIXELS_ON_CPU = 2**20, 2**15  # see `most_pixels`: four images of 512², eight of 64²
TRIAL_SIDE = 256  # pixels of the picture on which float16 is tried
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


@torch.no_grad()
def bearable_dtype(vae: AutoencoderKL, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float32 for a VAE whose activations overflow in float16: found by one picture there and back."""
    if dtype != torch.float16:
        return dtype
    trial = copy.deepcopy(vae).to(device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, TRIAL_SIDE, TRIAL_SIDE), generator=generator, dtype=torch.uint8)
    pixels[..., : TRIAL_SIDE // 2] = 255  # half of it noise, half of it white
    moments = encode_pixels(trial, to_pixel_values(pixels.to(device), dtype))
    decoded = trial.decode(moments.chunk(2, dim=1)[0].to(dtype)).sample
    if moments.isfinite().all() and decoded.isfinite().all():
        return dtype
    logger.warning(
        "This VAE's values overflow in fp16, as SDXL's first ones do: it runs in float32, which takes more time and "
        "memory. Use --mixed_precision bf16, or a VAE that was mended, such as --vae madebyollin/sdxl-vae-fp16-fix."
    )
    return torch.float32


def decode_without_autocast(vae: AutoencoderKL) -> None:
    """Let it decode in its own type, wherever it is called from: autocast would round what overflows."""
    decode = vae.decode

    def decode_in_own_type(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), *args, **kwargs)

    vae.decode = decode_in_own_type


def most_pixels(device_type: str) -> int:
    """How many pixels the VAE encodes at once on a kind of device.

    On a GPU because of a large batch the activations would take more memory than the rest of a step; on a CPU, where
    they are to fit into its caches, fewer are faster (docs/performance.md).
    """
    return MAX_PIXELS_ON_CPU if device_type == "cpu" else MAX_PIXELS


def images_at_once(most: int, pixels: int) -> int:
    """How many images of so many pixels are encoded at once, of `most_pixels`: one at least."""
    return max(1, most // pixels)


class LatentEncoder:
    """The VAE as a run uses it. It alone moves the VAE between devices: off the GPU while moments come from a store."""

    def __init__(self, vae: AutoencoderKL, device: torch.device, dtype: torch.dtype) -> None:
        self.vae, self.device, self.dtype = vae, device, dtype
        self.most_pixels = most_pixels(device.type)
        self.vae.to(device, dtype=dtype)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (U, 3, H, W) on the run's device to moments (U, 2C, H/f, W/f), float32; `most_pixels` at once."""
        if self.vae.device.type != self.device.type:  # looking costs less than moving what is there already
            self.vae.to(self.device)
        parts = pixels.split(images_at_once(self.most_pixels, pixels.shape[2] * pixels.shape[3]))
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
