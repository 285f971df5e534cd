"""The loss against an independent computation in float64, written from the papers."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_dream_and_update_latents
from training_runs import losses, train

from sd_recipes.recipe import ObjectiveConfig
from sd_recipes.training.objective import DenoisingLoss

SHAPE = (5, 4, 8, 8)
TIMESTEPS = torch.tensor([0, 10, 400, 700, 999])


def scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def alpha_bar() -> np.ndarray:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    return np.cumprod(1 - betas)


def fake_unet(
    noisy_latents: torch.Tensor, timesteps: torch.Tensor, encoder_hidden_states: torch.Tensor, return_dict: bool
) -> tuple:
    return (0.3 * noisy_latents + 0.001 * timesteps[:, None, None, None] + encoder_hidden_states.mean(),)


def conditioning(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": tensors["states"]}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("latents", "noise", "input_noise")
    values = {name: torch.randn(SHAPE, generator=generator) for name in names}
    return {**values, "states": torch.randn(5, 3, 2, generator=generator)}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("perturbed", [False, True])
def test_loss_equals_an_independent_computation(
    tensors: dict[str, torch.Tensor], prediction_type: str, snr_gamma: float | None, perturbed: bool
) -> None:
    config = ObjectiveConfig(prediction_type=prediction_type, snr_gamma=snr_gamma)
    loss = DenoisingLoss(scheduler(), config, torch.device("cpu"))
    input_noise = tensors["input_noise"] if perturbed else None
    losses = loss(fake_unet, tensors["latents"], conditioning(tensors), TIMESTEPS, tensors["noise"], input_noise)
    assert losses.shape == (5,)

    x0, eps, states = (tensors[name].double().numpy() for name in ("latents", "noise", "states"))
    seen_noise = tensors["input_noise"].double().numpy() if perturbed else eps
    for number, t in enumerate(TIMESTEPS.tolist()):
        a = alpha_bar()[t]
        noisy = np.sqrt(a) * x0[number] + np.sqrt(1 - a) * seen_noise[number]
        prediction = 0.3 * noisy + 0.001 * t + states.mean()
        target = {
            "epsilon": eps[number],
            "sample": x0[number],
            "v_prediction": np.sqrt(a) * eps[number] - np.sqrt(1 - a) * x0[number],
        }[prediction_type]
        snr = a / (1 - a)
        weight = 1.0
        if snr_gamma:
            weight = min(snr, snr_gamma) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
        expected = weight * np.mean((target - prediction) ** 2)
        # The scheduler holds ᾱ in float32, so that 1 - ᾱ near t = 0 has four digits.
        np.testing.assert_allclose(losses[number].item(), expected, rtol=1e-4)


def test_a_perfect_prediction_has_no_loss(tensors: dict[str, torch.Tensor]) -> None:
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        loss = DenoisingLoss(scheduler(), ObjectiveConfig(prediction_type=prediction_type), torch.device("cpu"))
        perfect = loss.target(loss.schedule, tensors["latents"], tensors["noise"], TIMESTEPS)
        losses = loss(
            lambda *_, perfect=perfect, **__: (perfect,),
            tensors["latents"],
            conditioning(tensors),
            TIMESTEPS,
            tensors["noise"],
        )
        assert losses.abs().max() == 0


def test_dream_moves_input_and_target_along_the_error(tensors: dict[str, torch.Tensor]) -> None:
    """Zhou et al. 2023, algorithm 2, in float64."""
    config = ObjectiveConfig(prediction_type="epsilon", dream_training=True, dream_detail_preservation=0.5)
    loss = DenoisingLoss(scheduler(), config, torch.device("cpu"))
    losses = loss(fake_unet, tensors["latents"], conditioning(tensors), TIMESTEPS, tensors["noise"])
    x0, eps, states = (tensors[name].double().numpy() for name in ("latents", "noise", "states"))
    for number, t in enumerate(TIMESTEPS.tolist()):
        a = alpha_bar()[t]
        sigma = np.sqrt(1 - a)

        def predict(noisy: np.ndarray, t: int = t) -> np.ndarray:
            return 0.3 * noisy + 0.001 * t + states.mean()

        noisy = np.sqrt(a) * x0[number] + sigma * eps[number]
        error = sigma**0.5 * (eps[number] - predict(noisy))
        expected = np.mean((eps[number] + error - predict(noisy + sigma * error)) ** 2)
        # The scheduler holds ᾱ in float32, so that 1 - ᾱ near t = 0 has four digits.
        np.testing.assert_allclose(losses[number].item(), expected, rtol=1e-4)


@pytest.mark.parametrize("exponent", [0, 1.5])
def test_defect_also_dream_with_input_perturbation_means_what_it_does_in_diffusers_script(
    settings: dict[str, Any], tensors: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture, exponent: float
) -> None:
    """There the input has the perturbed noise, and error and target the other; a run with both trains, and says so."""
    both = {"dream_training": True, "input_perturbation": 0.1, "dream_detail_preservation": exponent}
    training = train(settings | both, max_train_steps=1)
    assert np.isfinite(losses(training)).all()
    assert "--dream_training rectifies along the error of a prediction from the perturbed noise" in caplog.text

    latents, noise, input_noise, states = (tensors[name] for name in ("latents", "noise", "input_noise", "states"))
    loss = DenoisingLoss(scheduler(), training.recipe, torch.device("cpu"))
    found = loss(fake_unet, latents, conditioning(tensors), TIMESTEPS, noise, input_noise)

    class Unet:
        def __call__(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> Any:
            return SimpleNamespace(sample=fake_unet(noisy_latents, timesteps, states, return_dict=False)[0])

    noisy_latents = scheduler().add_noise(latents, input_noise, TIMESTEPS)
    noisy_latents, target = compute_dream_and_update_latents(
        Unet(), scheduler(), TIMESTEPS, noise, noisy_latents, noise, states, exponent
    )
    prediction = fake_unet(noisy_latents, TIMESTEPS, states, return_dict=False)[0]
    expected = (prediction - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_scheduler_decides_where_the_recipe_is_silent() -> None:
    spoken = DDPMScheduler(prediction_type="v_prediction")
    assert DenoisingLoss(spoken, ObjectiveConfig(), torch.device("cpu")).prediction_type == "v_prediction"
