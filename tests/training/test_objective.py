"""The loss against an independent computation in float64, written from the papers."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_dream_and_update_latents
from pydantic import ValidationError
from training_runs import losses, train

from sd_recipes.recipe import ObjectiveConfig
from sd_recipes.training.objective import LOSSES, DenoisingLoss

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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "score"])
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
            "score": -eps[number] / np.sqrt(1 - a),
        }[prediction_type]
        snr = a / (1 - a)
        weight = 1 - a if prediction_type == "score" else 1.0  # λ = σ_t²
        if snr_gamma:
            over_x0 = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1, "score": snr}[prediction_type]
            weight *= min(snr, snr_gamma) / over_x0
        expected = weight * np.mean((target - prediction) ** 2)
        # The scheduler holds ᾱ in float32, so that 1 - ᾱ near t = 0 has four digits.
        np.testing.assert_allclose(losses[number].item(), expected, rtol=1e-4)


def test_a_perfect_prediction_has_no_loss(tensors: dict[str, torch.Tensor]) -> None:
    for prediction_type in ("epsilon", "v_prediction", "sample", "score"):
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


@pytest.mark.parametrize(
    "settings_given",
    [
        {},
        {"snr_gamma": 5.0},
        {"debiased_estimation_loss": True},
        {"loss_type": "huber", "huber_schedule": "constant"},
        {"loss_type": "smooth_l1"},
    ],
    ids=str,
)
def test_a_score_has_the_loss_of_the_noise_that_it_means(
    tensors: dict[str, torch.Tensor], settings_given: dict[str, Any]
) -> None:
    """Denoising score matching with λ = σ_t² (Song & Ermon 2019) is the loss of ε, whatever is made of errors."""
    sigma = torch.from_numpy(np.sqrt(1 - alpha_bar())).float()[TIMESTEPS, None, None, None]

    def predict_score(*inputs: Any, **options: Any) -> tuple:
        return (-fake_unet(*inputs, **options)[0] / sigma,)

    inputs = (tensors["latents"], conditioning(tensors), TIMESTEPS, tensors["noise"])
    of_noise, of_score = (
        DenoisingLoss(
            scheduler(), ObjectiveConfig(prediction_type=prediction_type, **settings_given), torch.device("cpu")
        )(unet, *inputs)
        for prediction_type, unet in (("epsilon", fake_unet), ("score", predict_score))
    )
    torch.testing.assert_close(of_score, of_noise, rtol=1e-3, atol=0)


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


WEIGHTINGS: dict[str, tuple[dict[str, Any], Callable[[float], float]]] = {
    # What each paper multiplies the loss of ε by.
    "plain": ({}, lambda snr: 1),
    "min-SNR": ({"snr_gamma": 5.0}, lambda snr: min(5 / snr, 1)),
    "soft min-SNR": ({"soft_snr_gamma": 5.0}, lambda snr: 1 / (snr / 5 + 1)),
    "debiased": ({"debiased_estimation_loss": True}, lambda snr: snr**-0.5),
    "P2": ({"p2_gamma": 0.5, "p2_k": 2.0}, lambda snr: (2 + snr) ** -0.5),
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "score"])
@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name != "plain"])
def test_a_weighting_is_that_of_the_noise_which_the_prediction_implies(
    tensors: dict[str, torch.Tensor], weighting: str, prediction_type: str
) -> None:
    """The ε̂ that a sampler would take from the prediction, its squared error, and the paper's weight, in float64."""
    settings, weight = WEIGHTINGS[weighting]
    config = ObjectiveConfig(prediction_type=prediction_type, **settings)
    loss = DenoisingLoss(scheduler(), config, torch.device("cpu"))
    found = loss(fake_unet, tensors["latents"], conditioning(tensors), TIMESTEPS, tensors["noise"])
    x0, eps, states = (tensors[name].double().numpy() for name in ("latents", "noise", "states"))
    for number, t in enumerate(TIMESTEPS.tolist()):
        a = alpha_bar()[t]
        noisy = np.sqrt(a) * x0[number] + np.sqrt(1 - a) * eps[number]
        prediction = 0.3 * noisy + 0.001 * t + states.mean()
        implied = {
            "epsilon": prediction,
            "sample": (noisy - np.sqrt(a) * prediction) / np.sqrt(1 - a),
            "v_prediction": np.sqrt(1 - a) * noisy + np.sqrt(a) * prediction,
            "score": -np.sqrt(1 - a) * prediction,
        }[prediction_type]
        expected = weight(a / (1 - a)) * np.mean((eps[number] - implied) ** 2)
        np.testing.assert_allclose(found[number].item(), expected, rtol=1e-4)


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_pseudo_huber_has_its_values_and_its_gradient(
    tensors: dict[str, torch.Tensor], loss_type: str, schedule: str
) -> None:
    """In float64, as the paper and diffusers' example write it, with the c of the image's timestep."""
    config = ObjectiveConfig(loss_type=loss_type, huber_c=0.2, huber_schedule=schedule, snr_gamma=5.0)
    loss = DenoisingLoss(scheduler(), config, torch.device("cpu"))
    prediction = tensors["input_noise"].clone().requires_grad_()
    losses = loss(lambda *_, **__: (prediction,), tensors["latents"], {}, TIMESTEPS, tensors["noise"])
    losses.sum().backward()
    assert prediction.grad is not None
    for number, t in enumerate(TIMESTEPS.tolist()):
        a = alpha_bar()[t]
        c = {
            "constant": 0.2,
            "exponential": np.exp(np.log(0.2) * t / 1000),
            "snr": 0.8 / (1 + np.sqrt((1 - a) / a)) ** 2 + 0.2,
        }[schedule]
        difference = (prediction[number].detach() - tensors["noise"][number]).double().numpy()
        weight = min(5 / (a / (1 - a)), 1) * 2 * (c if loss_type == "huber" else 1)
        root = np.sqrt(difference**2 + c**2)
        np.testing.assert_allclose(losses[number].item(), weight * np.mean(root - c), rtol=1e-4)
        np.testing.assert_allclose(
            prediction.grad[number].numpy(), weight * difference / root / difference.size, rtol=2e-4, atol=1e-9
        )


def test_pseudo_huber_keeps_small_errors_that_a_difference_would_lose() -> None:
    error, c = torch.tensor([1e-5, -1e-5, 0.0, 1e3]), torch.tensor(0.1)
    torch.testing.assert_close(LOSSES["huber"](error, c), torch.tensor([1e-10, 1e-10, 0.0, 2 * 0.1 * (1e3 - 0.1)]))


@pytest.mark.parametrize(
    ("settings_given", "words"),
    [
        ({"snr_gamma": 5, "p2_gamma": 1}, "--snr_gamma and --p2_gamma all say how timesteps are weighted: keep one"),
        ({"learned_uncertainty": True, "debiased_estimation_loss": True}, "keep one"),
        ({"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "use --prediction_type v_prediction"),
        ({"dream_training": True, "prediction_type": "sample"}, "--dream_training is defined for the prediction type"),
        ({"timesteps_by_error": True, "timestep_sampling": "logit_normal"}, "both say which timesteps are drawn"),
        ({"timesteps_by_error": True, "learned_uncertainty": True}, "has nothing to go by: drop one"),
        ({"min_timestep": 500, "max_timestep": 500}, "leaves no timestep before --max_timestep 500"),
        ({"p2_k": 2}, "--p2_k 2.0 is not read without --p2_gamma 1: add it, or drop --p2_k"),
        ({"huber_c": 0.2}, "--huber_c 0.2 is not read without --loss_type huber"),
        ({"huber_schedule": "constant"}, "--huber_schedule constant is not read without --loss_type huber"),
        ({"logit_mean": 1}, "is not read without --timestep_sampling logit_normal"),
        ({"timestep_bias_multiplier": 2}, "is not read without --timestep_bias_strategy later"),
        (
            {"timestep_bias_strategy": "later", "timestep_sampling": "logit_normal"},
            "both say which timesteps are drawn",
        ),
        ({"timestep_bias_strategy": "range", "timestep_bias_begin": 1000}, "leaves no timestep before"),
        ({"timestep_bias_strategy": "range", "timestep_bias_portion": 0.5}, "is not read without"),
        ({"multires_noise_discount": 0.5}, "is not read without --multires_noise_iterations 6"),
        ({"timestep_sampling": "logit_normal", "logit_mean": float("nan")}, "finite number"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings_given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ObjectiveConfig(**settings_given)
