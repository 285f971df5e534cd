"""What follows from a prediction, in float64, against the definitions of x_0, ε, v and the score."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from sd_recipes.model.predictions import PREDICTIONS, convert, error_of_latents

# From hardly any noise to hardly anything else: α_t of Stable Diffusion's first and last timestep, and between.
SIGNALS = [0.9996, 0.7, 0.0683]


def sample(signal: float) -> dict[str, torch.Tensor]:
    """All predictions of one noisy latent, each by its own definition, and that latent, float64."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 3, 3, generator=generator, dtype=torch.float64)
    sigma = (1 - signal**2) ** 0.5
    noisy = (signal * latents + sigma * noise).requires_grad_()
    (score,) = torch.autograd.grad(Normal(signal * latents, sigma).log_prob(noisy).sum(), noisy)
    velocity = signal * noise - sigma * latents
    return {
        "epsilon": noise, "sample": latents, "v_prediction": velocity, "score": score, "noisy": noisy.detach(),
    }  # fmt: skip


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize(("given", "wanted"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_every_prediction_follows_from_every_other(given: str, wanted: str, signal: float) -> None:
    of = sample(signal)
    found = convert(of[given], of["noisy"], given, wanted, signal, (1 - signal**2) ** 0.5)
    torch.testing.assert_close(found, of[wanted], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("given", PREDICTIONS)
def test_it_takes_arrays_of_numpy_and_one_timestep_for_each_latent(given: str) -> None:
    samples = [sample(signal) for signal in SIGNALS]
    of = {name: np.stack([each[name][0].numpy() for each in samples]) for name in samples[0]}
    signal = np.array(SIGNALS)[:, None, None, None]
    found = convert(of[given], of["noisy"], given, "sample", signal, np.sqrt(1 - signal**2))
    np.testing.assert_allclose(found, of["sample"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("given", PREDICTIONS)
def test_the_error_of_x_0_follows_from_that_of_a_prediction(given: str, signal: float) -> None:
    of, sigma = sample(signal), (1 - signal**2) ** 0.5
    error = torch.linspace(-0.1, 0.1, of[given].numel(), dtype=torch.float64).reshape_as(of[given])
    wrong = convert(of[given] + error, of["noisy"], given, "sample", signal, sigma)
    expected = error_of_latents(given, signal, sigma) * error
    torch.testing.assert_close(wrong - of["sample"], expected, rtol=1e-8, atol=1e-10)
