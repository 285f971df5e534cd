"""DDPM's process as a variational bound sees it: schedule and variances in float64, and the terms in nats.

With ᾱ_0 = 1, β_t = 1 - ᾱ_t / ᾱ_{t-1} and a mean μ_θ that stands for a prediction x̂_0 of x_0 (Ho et al. 2020):

    q(x_{t-1} | x_t, x_0) = N(μ̃_t, β̃_t I),  β̃_t = (1 - ᾱ_{t-1}) / (1 - ᾱ_t) β_t                   (eq. 6, 7)
    p_θ(x_{t-1} | x_t) = N(μ_θ, σ_t² I),  μ̃_t - μ_θ = a_t (x_0 - x̂_0),  a_t = √ᾱ_{t-1} β_t / (1 - ᾱ_t)   (eq. 1, 7)

Both are Gaussians, so that with m_t = ‖x_0 - x̂_0‖² / D, per dimension,

    L_{t-1} = KL(q ‖ p_θ) = ½ [ln σ_t²/β̃_t + β̃_t/σ_t² - 1] + a_t² / (2 σ_t²) m_t                       (eq. 8)

The same in errors of ε, since x_0 - x̂_0 = -√(1 - ᾱ_t) / √ᾱ_t (ε - ε_θ) (eq. 9 to 12): w_t m_t = w_t^ε m_t^ε with

    fixed_small, σ_t² = β̃_t:  w_t = a_t² / (2 β̃_t) = ½ (ᾱ_{t-1} / (1 - ᾱ_{t-1}) - ᾱ_t / (1 - ᾱ_t)),
                              w_t^ε = β_t / (2 (1 - β_t) (1 - ᾱ_{t-1})),  L_{t-1} = w_t m_t
    fixed_large, σ_t² = β_t:  w_t = a_t² / (2 β_t),  w_t^ε = β_t / (2 (1 - β_t) (1 - ᾱ_t)),
                              L_{t-1} = w_t m_t + ½ [r - 1 - ln r],  r = β̃_t / β_t
    fitted:                   dL_{t-1} / dσ_t² = 0 at σ_t² = β̃_t + a_t² m_t, where L_{t-1} = ½ ln(1 + 2 w_t m_t)
                              with fixed_small's w_t: the least that a variance can give (Bao et al. 2022)

x_0's errors are used, not ε's, because they stay finite at zero terminal SNR, where w_t^ε does not. At t = 1, a_1 = 1
and L_0 = -ln p_θ(x_0 | x_1) is that of a density, ½ ln(2π σ_1²) + m_1 / (2 σ_1²), since latents are not discrete as in
eq. 13. As β̃_1 = 0, fixed_small takes β̃_2 there (Nichol & Dhariwal 2021); fitted takes m_1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sd_recipes.model.predictions import OF_NOISE_ALONE, PREDICTIONS, error_of_latents

VARIANCES = ("fixed_large", "fixed_small", "fitted")


class NoBound(ValueError):
    """This network, these latents or this schedule have no bound; the message says why, and the way out."""


class DiffusionProcess:
    """Tables of a scheduler, (T,) float64 for t = 1 … T in DDPM's counting: diffusers' timestep t - 1 is the index.

    Raises NoBound if the scheduler is none of DDPM's kind.
    """

    def __init__(self, scheduler: Any) -> None:
        self.alphas_cumprod = alphas_cumprod_of(scheduler)  # ᾱ_t
        before = np.concatenate([[1.0], self.alphas_cumprod[:-1]])  # ᾱ_{t-1}
        self.signal = np.sqrt(self.alphas_cumprod)
        self.sigma = np.sqrt(1 - self.alphas_cumprod)
        self.betas = (before - self.alphas_cumprod) / before
        self.posterior_variances = (1 - before) / (1 - self.alphas_cumprod) * self.betas  # β̃_t
        self.gains = np.sqrt(before) * self.betas / (1 - self.alphas_cumprod)  # a_t

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def prediction(self, prediction_type: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(c, d, k), (T,) each: what a network predicts is c x_0 + d ε, and its error times k is that of x̂_0.

        Raises NoBound for a prediction that the bound cannot be had of.
        """
        if prediction_type not in PREDICTIONS:
            raise NoBound(f"prediction_type {prediction_type!r} is not known: give {', '.join(PREDICTIONS)}")
        if prediction_type in OF_NOISE_ALONE and self.alphas_cumprod[-1] == 0:
            raise NoBound(
                f"the schedule ends at zero SNR, where {prediction_type!r} says nothing of the latents: give a network "
                "with prediction_type 'v_prediction' or 'sample', or a scheduler with rescale_betas_zero_snr=False"
            )
        in_latents, in_noise = PREDICTIONS[prediction_type](self.signal, self.sigma)
        zeros = np.zeros(len(self))
        return zeros + in_latents, zeros + in_noise, error_of_latents(prediction_type, self.signal, self.sigma)

    def prior(self, mean_squares: np.ndarray) -> np.ndarray:
        """L_T = KL(q(x_T | x_0) ‖ N(0, I)) in nats per dimension (Ho et al. 2020, eq. 4 and 5).

        From the mean of x_0² over dimensions, of any shape.
        """
        last = self.alphas_cumprod[-1]
        return 0.5 * (last * (mean_squares - 1) - np.log1p(-last))

    def variances(self, variance: str, squared_errors: np.ndarray) -> np.ndarray:
        """σ_t² of one of `VARIANCES`, (T,); a fitted one from errors m_t of x̂_0, (T,).

        Raises NoBound if there is none, since m_1 is 0.
        """
        if variance == "fixed_large":
            return self.betas
        if variance == "fixed_small":
            return np.concatenate([self.posterior_variances[1:2], self.posterior_variances[1:]])
        if squared_errors[0] == 0:
            raise NoBound("predict is exact at timestep 0, where no variance above 0 fits: give variance='fixed_large'")
        return self.posterior_variances + self.gains**2 * squared_errors

    def terms(self, variance: str, squared_errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Constants and slopes, (T,) each: L_{t-1} = constant + slope · m_t in nats per dimension (eq. 8).

        `squared_errors`, (T,), is what a fitted variance is fitted to. Raises NoBound as `variances`.
        """
        variances = self.variances(variance, squared_errors)
        ratios = variances[1:] / self.posterior_variances[1:]
        divergences = 0.5 * (np.log(ratios) + 1 / ratios - 1)
        constants = np.concatenate([[0.5 * np.log(2 * np.pi * variances[0])], divergences])
        return constants, self.gains**2 / (2 * variances)


def alphas_cumprod_of(scheduler: Any) -> np.ndarray:
    """ᾱ_t, (T,) float64. Raises NoBound if they are not those of a process that gets noisier at every step."""
    values = getattr(scheduler, "alphas_cumprod", None)
    if values is None:
        raise NoBound(
            f"{type(scheduler).__name__} has no alphas_cumprod, so it is none of DDPM's kind: "
            "give the DDPMScheduler that the network was trained with"
        )
    alphas_cumprod = torch.as_tensor(values).detach().cpu().double().numpy()
    if alphas_cumprod.ndim != 1 or len(alphas_cumprod) < 2:
        raise NoBound(f"alphas_cumprod has shape {alphas_cumprod.shape}: give a scheduler with two timesteps or more")
    trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", len(alphas_cumprod))
    if trained != len(alphas_cumprod):
        raise NoBound(
            f"the scheduler has {len(alphas_cumprod)} alphas_cumprod but num_train_timesteps={trained}: make it anew "
            "with the length that the network was trained with"
        )
    # Written so that NaN fails too.
    falls = np.diff(alphas_cumprod, prepend=1.0) < 0
    if not falls.all():
        raise NoBound(
            f"alphas_cumprod does not fall at timestep {int(np.argmin(falls))}, where no noise is added: "
            "give a schedule whose betas are above 0, in float32"
        )
    if alphas_cumprod[-1] < 0:
        raise NoBound(f"alphas_cumprod ends at {alphas_cumprod[-1]:g}: give a schedule whose betas are at most 1")
    return alphas_cumprod
