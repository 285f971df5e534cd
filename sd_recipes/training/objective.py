"""The denoising loss: noisy latents, target, weight, and one loss value per image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler

from sd_recipes.recipe import ObjectiveConfig


class DenoisingLoss:
    """‖target - prediction‖² of a UNet, averaged over an image's latent, weighted by timestep.

    Prediction types (Ho et al. 2020, eq. 14; Salimans & Ho 2022, section 4 and appendix D), with
    x_t = α_t x_0 + σ_t ε: epsilon predicts ε, sample predicts x_0, v_prediction α_t ε - σ_t x_0.
    """

    def __init__(self, scheduler: DDPMScheduler, config: ObjectiveConfig, device: torch.device) -> None:
        self.prediction_type = config.prediction_type or scheduler.config.prediction_type
        self.config = config
        # In float64 until the square roots are taken: near t = 0 a float32 difference loses half its digits.
        alphas_cumprod = scheduler.alphas_cumprod.double()
        self.signal = alphas_cumprod.sqrt().float().to(device)  # (T,) α_t
        self.sigma = (1 - alphas_cumprod).sqrt().float().to(device)  # (T,) σ_t
        self.snr = (alphas_cumprod / (1 - alphas_cumprod)).float().to(device)  # (T,)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = α_t x_0 + σ_t ε (Ho et al. 2020, eq. 4), all (B, C, h, w)."""
        return _at(self.signal, timesteps) * latents + _at(self.sigma, timesteps) * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the UNet should predict, (B, C, h, w)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        return _at(self.signal, timesteps) * noise - _at(self.sigma, timesteps) * latents

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) weights: 1, or min-SNR-γ (Hang et al. 2023, section 3.4) for the prediction type."""
        snr = self.snr[timesteps]
        if self.config.snr_gamma is None:
            return torch.ones_like(snr)
        gamma = self.config.snr_gamma
        if self.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1)  # min(SNR, γ) / SNR, also where the SNR is 0
        clipped = snr.clamp(max=gamma)
        return clipped if self.prediction_type == "sample" else clipped / (snr + 1)

    def __call__(
        self,
        unet: Any,
        latents: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        input_noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B,) loss of each image, float32.

        `input_noise` differs from `noise` under input perturbation (Ning et al. 2023, algorithm 1):
        the UNet sees the perturbed one and is to predict the other.
        """
        noisy_latents = self.add_noise(latents, noise if input_noise is None else input_noise, timesteps)
        target = self.target(latents, noise, timesteps)
        if self.config.dream_training:
            noisy_latents, target = self._rectify(unet, noisy_latents, target, encoder_hidden_states, timesteps)
        prediction = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
        squared_error = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
        return self.weight(timesteps) * squared_error

    @torch.no_grad()
    def _rectify(
        self,
        unet: Any,
        noisy_latents: torch.Tensor,
        target: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """DREAM (Zhou et al. 2023, algorithm 2): move input and target along the UNet's own error, by σ_t^p."""
        sigma = _at(self.sigma, timesteps)
        prediction = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0].float()
        error = sigma**self.config.dream_detail_preservation * (target - prediction)
        return noisy_latents + sigma * error, target + error


def _at(table: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Entries of a (T,) table, (B, 1, 1, 1) so that they scale (B, C, h, w)."""
    return table[timesteps][:, None, None, None]
