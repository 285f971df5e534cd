"""The denoising loss: noisy latents, target, error, weight, and one loss value per image.

The tables hold what a setting chooses between, one function each; a `DenoisingLoss` takes its entries once, when it is
created.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sd_recipes.model.conditioning import Conditioning, unet_arguments
from sd_recipes.model.predictions import PREDICTIONS
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

    def predicted(self, prediction_type: str, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """A prediction's true value of x_0 and ε, (B, C, h, w)."""
        in_latents, in_noise = PREDICTIONS[prediction_type](at(self.signal, timesteps), at(self.sigma, timesteps))
        return in_latents * latents + in_noise * noise


# What the UNet has to predict, (B, C, h, w), from x_0, ε and t: ε (Ho et al. 2020, eq. 14), x_0, v (Salimans & Ho 2022,
# appendix D), or the score (Song & Ermon 2019, section 4.2).
Target = Callable[[NoiseSchedule, Tensor, Tensor, Tensor], Tensor]
TARGETS: dict[str, Target] = {
    "epsilon": lambda schedule, latents, noise, timesteps: noise,
    "sample": lambda schedule, latents, noise, timesteps: latents,
    "v_prediction": lambda schedule, *sample: schedule.predicted("v_prediction", *sample),
    "score": lambda schedule, *sample: schedule.predicted("score", *sample),
}

# What the error is multiplied by at every timestep, (T,), before its loss is taken. The score's by σ_t, so that its
# square has the weight λ = σ_t² of denoising score matching (Song & Ermon 2019, eq. 6): ‖σ_t s + ε‖², the loss of ε.
ERROR_SCALES: dict[str, Callable[[NoiseSchedule], Tensor]] = {
    **dict.fromkeys(("epsilon", "sample", "v_prediction"), lambda schedule: torch.ones_like(schedule.sigma)),
    "score": lambda schedule: schedule.sigma,
}

# The weight of x_0's loss at every timestep, (T,), from the SNRs, the value of the setting that asks for it, and all
# settings. x_0's, since it means the same whatever the UNet predicts; what a paper divides ε's loss by, x_0's has over
# the SNR.
Weight = Callable[[Tensor, float, ObjectiveConfig], Tensor]
WEIGHTS: dict[str, Weight] = {
    # Min-SNR: min(SNR, γ) (Hang et al. 2023, section 3.4).
    "snr_gamma": lambda snr, gamma, config: snr.clamp(max=gamma),
    # Its soft form: 1 / (1 / SNR + 1 / γ) (Crowson et al. 2024, soft min-SNR).
    "soft_snr_gamma": lambda snr, gamma, config: snr * gamma / (snr + gamma),
    # Debiased estimation: ε's loss over the square root of the SNR (Yu et al. 2023).
    "debiased_estimation_loss": lambda snr, on, config: snr.sqrt(),
    # P2: ε's loss over (k + SNR)^γ (Choi et al. 2022, eq. 8).
    "p2_gamma": lambda snr, gamma, config: snr / (config.p2_k + snr) ** gamma,
}

# The loss of what the UNet predicts over that of the x_0 which follows from it, (T,), from the SNRs
# (Salimans & Ho 2022, section 4). The score's, with its scale, is ε's.
LOSS_OVER_X0: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": lambda snr: snr,
    "sample": torch.ones_like,
    "v_prediction": lambda snr: snr + 1,
    "score": lambda snr: snr,
}


def pseudo_huber(error: Tensor, c: Tensor) -> Tensor:
    """√(error² + c²) - c: half the square over c where the error is small, its size where it is large.

    Without the difference, in which a small error would be lost.
    """
    return error.square() / ((error.square() + c.square()).sqrt() + c)


# The loss of each value's error, (B, C, h, w), given c, which scales with it. Pseudo-Huber (Khrapov et al. 2024), in
# diffusers' two scales: the square where errors are small, or twice their size where they are large.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda error, c: error.square(),
    "huber": lambda error, c: 2 * c * pseudo_huber(error, c),
    "smooth_l1": lambda error, c: 2 * pseudo_huber(error, c),
}

# Huber's c at every timestep, (T,) (Khrapov et al. 2024): squares at the last denoising steps, which make the details,
# and robust at the first ones.
HUBER_SCHEDULES: dict[str, Callable[[NoiseSchedule, float], Tensor]] = {
    "constant": lambda schedule, c: torch.full_like(schedule.snr, c),
    "exponential": lambda schedule, c: (
        c ** (torch.arange(len(schedule.snr), device=schedule.snr.device) / len(schedule.snr))
    ),
    "snr": lambda schedule, c: (1 - c) / (1 + schedule.sigma / schedule.signal) ** 2 + c,
}


class DenoisingLoss:
    """The error of a UNet's prediction: its loss, averaged over an image's latent, weighted by timestep.

    `uncertainty` gives u(t), (B,), for timesteps: the loss is then e^-u times as large, plus u (see `Uncertainty`).
    """

    def __init__(
        self,
        scheduler: DDPMScheduler,
        config: ObjectiveConfig,
        device: torch.device,
        uncertainty: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.prediction_type: str = config.prediction_type or scheduler.config.prediction_type
        self.schedule = NoiseSchedule(scheduler, device)
        self.target = TARGETS[self.prediction_type]
        self.error_scale = ERROR_SCALES[self.prediction_type](self.schedule)  # (T,)
        self.loss = LOSSES[config.loss_type]
        self.huber_c = HUBER_SCHEDULES[config.huber_schedule](self.schedule, config.huber_c)  # (T,)
        self.weights = weights_of(self.schedule.snr, self.prediction_type, config)  # (T,)
        self.uncertainty = uncertainty
        self.rectify = Dream(self.schedule, config.dream_detail_preservation) if config.dream_training else None

    def __call__(
        self,
        unet: Any,
        latents: Tensor,
        conditioning: Conditioning,
        timesteps: Tensor,
        noise: Tensor,
        input_noise: Tensor | None = None,
        latent_weights: Tensor | None = None,
    ) -> Tensor:
        """(B,) loss of each image, float32: that of `undivided`, divided by a learned uncertainty."""
        noises = noise, input_noise
        return self.divided(self.undivided(unet, latents, conditioning, timesteps, *noises, latent_weights), timesteps)

    def undivided(
        self,
        unet: Any,
        latents: Tensor,
        conditioning: Conditioning,
        timesteps: Tensor,
        noise: Tensor,
        input_noise: Tensor | None = None,
        latent_weights: Tensor | None = None,
        teacher: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(B,) loss of each image before a learned uncertainty divides it, float32.

        `input_noise` differs from `noise` under input perturbation (Ning et al. 2023, algorithm 1): the UNet sees the
        perturbed noise and has to predict the other. The loss is the mean over an image's latent, weighted by
        `latent_weights`, (B, 1, h, w), where they are given. A `teacher` gives the target, (B, C, h, w),
        from noisy latents and timesteps.
        """
        noisy_latents = self.schedule.add_noise(latents, noise if input_noise is None else input_noise, timesteps)
        target = self.target(self.schedule, latents, noise, timesteps)
        if teacher is not None:
            target = teacher(noisy_latents, timesteps)
        elif self.rectify is not None:
            noisy_latents, target = self.rectify(unet, noisy_latents, target, conditioning, timesteps)
        prediction = unet(noisy_latents, timesteps, **unet_arguments(conditioning), return_dict=False)[0]
        error = at(self.error_scale, timesteps) * (prediction.float() - target.float())
        losses = self.loss(error, at(self.huber_c, timesteps))
        if latent_weights is not None:
            losses = latent_weights * losses
        return self.weights[timesteps] * losses.mean(dim=(1, 2, 3))

    def divided(self, losses: Tensor, timesteps: Tensor, *, is_learned_from: bool = True) -> Tensor:
        """(B,) losses at timesteps, divided by the learned uncertainty, if there is one.

        Those that are not learned from have the same values, and leave u without a gradient.
        """
        if self.uncertainty is None:
            return losses
        u = self.uncertainty(timesteps)
        if not is_learned_from:
            u = u.detach()
        return losses * (-u).exp() + u


def weights_of(snr: Tensor, prediction_type: str, config: ObjectiveConfig) -> Tensor:
    """The weight of every timestep, (T,), from their SNRs: 1, or by the one of `WEIGHTS` that is asked for."""
    for name, weight in WEIGHTS.items():
        if value := getattr(config, name):
            return weight(snr, value, config) / LOSS_OVER_X0[prediction_type](snr)
    return torch.ones_like(snr)


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
        prediction = unet(noisy_latents, timesteps, **unet_arguments(conditioning), return_dict=False)[0].float()
        error = sigma**self.detail_preservation * (target - prediction)
        return noisy_latents + sigma * error, target + error


def at(table: Tensor, timesteps: Tensor) -> Tensor:
    """Entries of a (T,) table, (B, 1, 1, 1) so that they scale (B, C, h, w)."""
    return table[timesteps][:, None, None, None]
