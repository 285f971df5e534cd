"""The denoising loss: noisy latents, target, weight, and one loss value per image.

`TARGETS` and `MIN_SNR_WEIGHTS` hold what depends on the prediction type; a `DenoisingLoss` takes its entries once, when
it is created.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sd_recipes.model.conditioning import Conditioning
from sd_recipes.recipe import ObjectiveConfig


class NoiseSchedule:
    """x_t = α_t x_0 + σ_t ε for t = 0 … T - 1 (Ho et al. 2020, eq. 4), as (T,) float32 tables on a device."""

    def __init__(self, scheduler: DDPMScheduler, device: torch.device) -> None:
        # In float64 until the square roots are taken: near t = 0 a float32 difference loses half its digits.
        alphas_cumprod = scheduler.alphas_cumprod.double()
        self.signal = alphas_cumprod.sqrt().float().to(device)  # α_t
        self.sigma = (1 - alphas_cumprod).sqrt().float().to(device)  # σ_t
        self.snr = (alphas_cumprod / (1 - alphas_cumprod)).float().to(device)  # α_t² / σ_t²

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of x_0 and ε, all (B, C, h, w), at timesteps (B,)."""
        return at(self.signal, timesteps) * latents + at(self.sigma, timesteps) * noise

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = α_t ε - σ_t x_0 (Salimans & Ho 2022, appendix D), (B, C, h, w)."""
        return at(self.signal, timesteps) * noise - at(self.sigma, timesteps) * latents


# What the UNet has to predict, (B, C, h, w), from x_0, ε and t: ε (Ho et al. 2020, eq. 14), x_0, or v.
Target = Callable[[NoiseSchedule, Tensor, Tensor, Tensor], Tensor]
TARGETS: dict[str, Target] = {
    "epsilon": lambda schedule, latents, noise, timesteps: noise,
    "sample": lambda schedule, latents, noise, timesteps: latents,
    "v_prediction": NoiseSchedule.velocity,
}

# Weight of a timestep, from its SNR and γ, so that every prediction type has the loss of x_0 weighted by min(SNR, γ)
# (Hang et al. 2023, section 3.4).
MIN_SNR_WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "epsilon": lambda snr, gamma: (gamma / snr).clamp(max=1),  # min(SNR, γ) / SNR, also where the SNR is 0
    "sample": lambda snr, gamma: snr.clamp(max=gamma),
    "v_prediction": lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1),
}


class DenoisingLoss:
    """‖target - prediction‖² of a UNet, averaged over an image's latent, weighted by timestep."""

    def __init__(self, scheduler: DDPMScheduler, config: ObjectiveConfig, device: torch.device) -> None:
        self.prediction_type: str = config.prediction_type or scheduler.config.prediction_type
        self.schedule = NoiseSchedule(scheduler, device)
        self.target = TARGETS[self.prediction_type]
        self.weights = torch.ones_like(self.schedule.snr)  # (T,)
        if config.snr_gamma is not None:
            self.weights = MIN_SNR_WEIGHTS[self.prediction_type](self.schedule.snr, config.snr_gamma)
        self.rectify = Dream(self.schedule, config.dream_detail_preservation) if config.dream_training else None

    def __call__(
        self,
        unet: Any,
        latents: Tensor,
        conditioning: Conditioning,
        timesteps: Tensor,
        noise: Tensor,
        input_noise: Tensor | None = None,
    ) -> Tensor:
        """(B,) loss of each image, float32.

        `input_noise` differs from `noise` under input perturbation (Ning et al. 2023, algorithm 1): the UNet sees the
        perturbed noise and has to predict the other.
        """
        noisy_latents = self.schedule.add_noise(latents, noise if input_noise is None else input_noise, timesteps)
        target = self.target(self.schedule, latents, noise, timesteps)
        if self.rectify is not None:
            noisy_latents, target = self.rectify(unet, noisy_latents, target, conditioning, timesteps)
        prediction = unet(noisy_latents, timesteps, **conditioning, return_dict=False)[0]
        squared_error = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
        return self.weights[timesteps] * squared_error


class Dream:
    """DREAM (Zhou et al. 2023, algorithm 2): move input and target along the UNet's own error, by σ_t^p."""

    def __init__(self, schedule: NoiseSchedule, detail_preservation: float) -> None:
        self.sigma, self.detail_preservation = schedule.sigma, detail_preservation

    @torch.no_grad()
    def __call__(
        self, unet: Any, noisy_latents: Tensor, target: Tensor, conditioning: Conditioning, timesteps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The rectified noisy latents and target, (B, C, h, w) each."""
        sigma = at(self.sigma, timesteps)
        prediction = unet(noisy_latents, timesteps, **conditioning, return_dict=False)[0].float()
        error = sigma**self.detail_preservation * (target - prediction)
        return noisy_latents + sigma * error, target + error


def at(table: Tensor, timesteps: Tensor) -> Tensor:
    """Entries of a (T,) table, (B, 1, 1, 1) so that they scale (B, C, h, w)."""
    return table[timesteps][:, None, None, None]
