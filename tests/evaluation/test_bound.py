"""The variational bound against closed forms in float64, against diffusers' own sampler, and against the truth."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from test_rooms import graph
from tiny_models import UNET_CONFIG
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from sd_recipes.evaluation.bound import Bound, standard_errors, variational_bound
from sd_recipes.evaluation.diffusion_process import DiffusionProcess
from sd_recipes.evaluation.timestep_sampling import TimestepSampling

SCHEDULES = {
    "stable_diffusion": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "ddpm": {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
}
ENTROPY = 0.5 * math.log2(2 * math.pi * math.e)  # of N(0, 1), in bits
TYPES = ["epsilon", "v_prediction", "sample", "score"]
VARIANCES = ["fixed_large", "fixed_small", "fitted"]


def scheduler(schedule: str = "stable_diffusion", **settings: Any) -> DDPMScheduler:
    return DDPMScheduler(**SCHEDULES[schedule], **settings)


def closed_form(alphas_cumprod: np.ndarray, eigenvalues: np.ndarray, mean_square: float, variance: str) -> np.ndarray:
    """L_T, …, L_0 and their sum in bits per dimension, of latents N(µ, Σ) and the exact predictor of x_0.

    From the means and variances of Ho et al. 2020, eq. 7, as KL(N(μ̃, β̃) ‖ N(μ_θ, σ²)); `mean_square` is E[x_0²].
    """
    before = np.concatenate([[1.0], alphas_cumprod[:-1]])
    betas = 1 - alphas_cumprod / before
    posterior = betas * (1 - before) / (1 - alphas_cumprod)
    spread = np.mean(  # Var(x_0 | x_t)
        [each * (1 - alphas_cumprod) / (alphas_cumprod * each + 1 - alphas_cumprod) for each in eigenvalues], axis=0
    )
    distance = (np.sqrt(before) * betas / (1 - alphas_cumprod)) ** 2 * spread  # E(μ̃ - μ_θ)²
    sigmas = {
        "fixed_large": betas,
        "fixed_small": np.concatenate([posterior[1:2], posterior[1:]]),
        "fitted": posterior + distance,
    }[variance]
    divergence = 0.5 * (np.log(sigmas / np.maximum(posterior, 1e-300)) + (posterior + distance) / sigmas - 1)
    last = alphas_cumprod[-1]
    prior = 0.5 * (last * mean_square + (1 - last) - 1 - np.log(1 - last))
    reconstruction = 0.5 * np.log(2 * np.pi * sigmas[0]) + spread[0] / (2 * sigmas[0])
    terms = np.concatenate([[prior], divergence[:0:-1], [reconstruction]])
    return np.append(terms, terms.sum()) / math.log(2)


def values(bound: Bound) -> np.ndarray:
    return np.concatenate([[bound.prior], bound.denoising, [bound.reconstruction, bound.total]])


def as_type(prediction_type: str, x_0: Tensor, noisy: Tensor, alpha_bar: Tensor) -> Tensor:
    """The prediction that stands for this x̂_0 (Salimans & Ho 2022, appendix D), all in float64."""
    if prediction_type == "sample":
        return x_0
    if prediction_type == "v_prediction":
        return (alpha_bar.sqrt() * noisy - x_0) / (1 - alpha_bar).sqrt()
    epsilon = (noisy - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
    return epsilon if prediction_type == "epsilon" else -epsilon / (1 - alpha_bar).sqrt()


def with_expected_error(
    latents: Tensor, eigenvalues: np.ndarray, noise_scheduler: DDPMScheduler, prediction_type: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """A predictor of known latents whose error is the exact predictor's expected one, whatever the noise."""
    alphas_cumprod, variances = noise_scheduler.alphas_cumprod.double(), torch.from_numpy(eigenvalues)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        alpha_bar = alphas_cumprod[timesteps][:, None]
        spread = (variances * (1 - alpha_bar) / (alpha_bar * variances + 1 - alpha_bar)).mean(dim=1, keepdim=True)
        return as_type(prediction_type, latents.double() + spread.sqrt(), noisy.double(), alpha_bar).float()

    return predict


def exact_predictor(noise_scheduler: DDPMScheduler, scale: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """E[ε | x_t] = √(1 - ᾱ_t) x_t of latents N(0, I), times `scale`."""
    sigma = (1 - noise_scheduler.alphas_cumprod.double()).sqrt().float()
    return lambda noisy, timesteps: scale * sigma[timesteps].reshape(-1, *[1] * (noisy.ndim - 1)) * noisy


def expected_totals(latents: Tensor, noise_scheduler: DDPMScheduler, scale: float = 1.0) -> np.ndarray:
    """(N,) expectation of each image's bound with `exact_predictor` and fixed_large, over the noise alone."""
    alphas_cumprod = noise_scheduler.alphas_cumprod.double().numpy()
    before = np.concatenate([[1.0], alphas_cumprod[:-1]])
    betas = 1 - alphas_cumprod / before
    squares = latents.double().square().flatten(1).mean(dim=1).numpy()
    sigma2 = 1 - alphas_cumprod
    # ε - c √(1 - ᾱ) x_t = (1 - c (1 - ᾱ)) ε - c √(1 - ᾱ) √ᾱ x_0
    errors = (1 - scale * sigma2) ** 2 + scale**2 * sigma2 * alphas_cumprod * squares[:, None]
    ratios = ((1 - before) / (1 - alphas_cumprod))[1:]
    weights = betas / (2 * (1 - betas) * (1 - alphas_cumprod))  # Ho et al. 2020, eq. 12 with σ² = β
    constants = 0.5 * (ratios - 1 - np.log(ratios)).sum() + 0.5 * np.log(2 * np.pi * betas[0])
    prior = 0.5 * (alphas_cumprod[-1] * squares - alphas_cumprod[-1] - np.log(1 - alphas_cumprod[-1]))
    return (prior + errors @ weights + constants) / math.log(2)


GOLDEN = [
    ("stable_diffusion", 1.0, "fixed_large", 2.0471),
    ("stable_diffusion", 1.0, "fixed_small", 2.6919),
    ("stable_diffusion", 1.0, "fitted", 2.0471),
    ("ddpm", 1.0, "fixed_large", 2.0471),
    ("ddpm", 1.0, "fixed_small", 2.8818),
    ("stable_diffusion", 0.5, "fixed_large", 1.0482),
    ("stable_diffusion", 0.5, "fixed_small", 1.6773),
    ("stable_diffusion", 0.5, "fitted", 1.0471),
]


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize(("schedule", "deviation", "variance", "figure"), GOLDEN)
def test_the_golden_figures(
    schedule: str, deviation: float, variance: str, figure: float, prediction_type: str
) -> None:
    noise_scheduler = scheduler(schedule)
    latents = deviation * torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    eigenvalues = np.full(4, deviation**2)
    bound = variational_bound(
        with_expected_error(latents, eigenvalues, noise_scheduler, prediction_type),
        latents, noise_scheduler, prediction_type=prediction_type, variance=variance, batch_size=250,
    )  # fmt: skip
    assert bound.total == pytest.approx(figure, abs=6e-5)
    if (schedule, deviation) == ("stable_diffusion", 1.0):
        assert bound.prior == pytest.approx(0.00337, abs=5e-6)
        if variance != "fixed_small":
            assert bound.total == pytest.approx(ENTROPY, abs=1e-5), "the true entropy"
    expected = closed_form(noise_scheduler.alphas_cumprod.double().numpy(), eigenvalues, deviation**2, variance)
    assert bound.denoising.shape == (999,)
    np.testing.assert_allclose(values(bound), expected, rtol=1e-4, atol=1e-9)
    assert bound.total == pytest.approx(bound.prior + bound.denoising.sum() + bound.reconstruction, abs=1e-12)


def test_the_weights_are_those_of_the_errors_of_epsilon_in_float64() -> None:
    """Ho et al. 2020, eq. 12, in extended precision from the same float32 ᾱ."""
    noise_scheduler = scheduler("ddpm")
    process = DiffusionProcess(noise_scheduler)
    alphas_cumprod = noise_scheduler.alphas_cumprod.numpy().astype(np.longdouble)
    before = np.concatenate([[np.longdouble(1)], alphas_cumprod[:-1]])
    betas = 1 - alphas_cumprod / before
    snr = alphas_cumprod / (1 - alphas_cumprod)
    _, large = process.terms("fixed_large", np.ones(1000))
    np.testing.assert_allclose(large / snr, betas / (2 * (1 - betas) * (1 - alphas_cumprod)), rtol=1e-11)
    _, small = process.terms("fixed_small", np.ones(1000))
    np.testing.assert_allclose(
        (small / snr)[1:], (betas / (2 * (1 - betas) * (1 - before).clip(1e-30)))[1:], rtol=1e-11
    )
    np.testing.assert_allclose(small[1:], 0.5 * (snr[:-1] - snr[1:]), rtol=1e-11)
    errors = np.linspace(0.001, 3, 1000)
    constants, fitted = process.terms("fitted", errors)
    np.testing.assert_allclose(
        (constants + fitted * errors)[1:], 0.5 * np.log1p(2 * small * errors)[1:], rtol=1e-10, atol=1e-15
    )


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_it_bounds_the_process_that_diffusers_samples_from(prediction_type: str, variance: str) -> None:
    """With the means and variances that DDPMScheduler.step has for the prediction, and for the truth."""
    settings = {"num_train_timesteps": 20, "prediction_type": prediction_type, "clip_sample": False}
    noise_scheduler = scheduler(**settings, variance_type=variance)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        prediction = torch.tanh(noisy) + 0.01 * timesteps.reshape(-1, 1, 1, 1)
        seen.update((int(t), (noisy[[i]].double(), prediction[[i]].double())) for i, t in enumerate(timesteps))
        return prediction

    bound = variational_bound(
        predict, latents, noise_scheduler, prediction_type=prediction_type, variance=variance, batch_size=7
    )
    assert sorted(seen) == list(range(20))

    def step(stepped: DDPMScheduler, prediction: Tensor, timestep: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return stepped.step(prediction, timestep, seen[timestep][0], generator=generator).prev_sample

    def deviation(stepped: DDPMScheduler, timestep: int) -> Tensor:
        """By how much two steps differ, for how much their noise does."""
        first, second = (
            torch.randn(latents.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in range(2)
        )
        steps = [step(stepped, seen[timestep][1], timestep, seed) for seed in range(2)]
        return ((steps[0] - steps[1]) / (first - second)).median()

    for timestep in range(1, 20):
        noisy, prediction = seen[timestep]
        truth = as_type(prediction_type, latents.double(), noisy, noise_scheduler.alphas_cumprod[timestep].double())
        # Both with the same noise, so that they are apart as their means are.
        means = [step(noise_scheduler, each, timestep) for each in (truth, prediction)]
        posterior = deviation(scheduler(**settings, variance_type="fixed_small"), timestep)
        divergence = kl_divergence(
            Normal(means[0], posterior), Normal(means[1], deviation(noise_scheduler, timestep))
        ).mean() / math.log(2)
        assert bound.denoising[19 - timestep] == pytest.approx(divergence.item(), rel=2e-4)
    last = noise_scheduler.betas[0].double().sqrt() if variance == "fixed_large" else deviation(noise_scheduler, 1)
    likelihood = Normal(step(noise_scheduler, seen[0][1], 0), last).log_prob(latents.double()).mean() / math.log(2)
    assert bound.reconstruction == pytest.approx(-likelihood.item(), rel=1e-3)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_zero_terminal_snr(prediction_type: str, variance: str) -> None:
    noise_scheduler = scheduler(rescale_betas_zero_snr=True)
    assert noise_scheduler.alphas_cumprod[-1] == 0
    latents, eigenvalues = torch.tensor([[1.0, -1.0]]), np.ones(2)
    predict = with_expected_error(latents, eigenvalues, noise_scheduler, prediction_type)
    bound = variational_bound(predict, latents, noise_scheduler, prediction_type=prediction_type, variance=variance)
    assert bound.prior == 0
    expected = closed_form(noise_scheduler.alphas_cumprod.double().numpy(), eigenvalues, 1.0, variance)
    np.testing.assert_allclose(values(bound), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("seed", range(5))
def test_it_is_never_below_the_true_negative_log_likelihood(seed: int, schedule: str) -> None:
    """Of Gaussians with any mean and covariance, on average over them; and fitted is never above the fixed ones."""
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((8, 8)) * np.geomspace(0.03, 3, 8)
    eigenvalues = np.linalg.eigvalsh(factor @ factor.T / 8)
    mean_square = eigenvalues.mean() + np.mean(rng.standard_normal(8) ** 2)
    truth = ENTROPY + 0.5 * np.log2(eigenvalues).mean()
    latents = math.sqrt(mean_square) * torch.tensor([[1.0, -1.0] * 4])
    noise_scheduler = scheduler(schedule)
    totals = {}
    for variance in VARIANCES:
        predict = with_expected_error(latents, eigenvalues, noise_scheduler, "epsilon")
        bound = variational_bound(
            predict, latents, noise_scheduler, prediction_type="epsilon", variance=variance, batch_size=250
        )
        alphas_cumprod = noise_scheduler.alphas_cumprod.double().numpy()
        expected = closed_form(alphas_cumprod, eigenvalues, mean_square, variance)
        np.testing.assert_allclose(values(bound)[:-1], expected[:-1], rtol=1e-3, atol=1e-9)
        assert bound.total == pytest.approx(expected[-1], abs=2e-5)
        totals[variance] = bound.total
    assert truth < totals["fitted"] <= min(totals["fixed_large"], totals["fixed_small"])


@pytest.mark.parametrize("variance", VARIANCES)
def test_correlated_latents_with_noise_as_it_comes(variance: str) -> None:
    """With the exact predictor of a Gaussian with mean and covariance, and nothing else known to it."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((64, 64)))
    eigenvalues, mean = np.geomspace(0.05, 4, 64), rng.standard_normal(64)
    drawn = mean + rng.standard_normal((48, 64)) * np.sqrt(eigenvalues) @ basis.T
    latents = torch.from_numpy(drawn).float().reshape(48, 4, 4, 4)
    noise_scheduler = scheduler(num_train_timesteps=200)
    alphas_cumprod = noise_scheduler.alphas_cumprod.double()

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        alpha_bar, flat = alphas_cumprod[timesteps][:, None], noisy.double().flatten(1)
        spectrum = torch.from_numpy(eigenvalues)
        gain = alpha_bar.sqrt() * spectrum / (alpha_bar * spectrum + 1 - alpha_bar)
        centred = flat - alpha_bar.sqrt() * torch.from_numpy(mean)
        x_0 = torch.from_numpy(mean) + (centred @ torch.from_numpy(basis) * gain) @ torch.from_numpy(basis).T
        return as_type("epsilon", x_0, flat, alpha_bar).float().reshape(noisy.shape)

    bound = variational_bound(
        predict, latents, noise_scheduler, prediction_type="epsilon", variance=variance, batch_size=512
    )
    expected = closed_form(alphas_cumprod.numpy(), eigenvalues, float(eigenvalues.mean() + (mean**2).mean()), variance)
    errors = values(bound) - expected
    spread = bound.standard_error
    z = errors / np.concatenate([[spread.prior], spread.denoising, [spread.reconstruction, spread.total]])
    assert abs(z[-1]) < 3
    assert spread.total < 0.05
    # Of 201 terms; a wrong one would be far out in all timesteps.
    assert np.mean(np.abs(z) < 2) > 0.9
    assert np.abs(z).max() < 5


@pytest.fixture(scope="module")
def normal_latents() -> Tensor:
    return torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def sampled_error(bound: Bound) -> np.ndarray:
    """(N,) standard error of one sample relative to what is sampled: slope · m_t, summed over t."""
    process = DiffusionProcess(scheduler())
    constants, _ = process.terms("fixed_large", np.ones(1000))
    sums = bound.images.total - bound.images.prior - constants.sum() / math.log(2)
    return bound.images_standard_error / sums


def test_64_timesteps_an_image_are_within_2_percent_where_uniform_ones_are_within_50(normal_latents: Tensor) -> None:
    noise_scheduler, num_samples = scheduler(), 60
    predict, settings = exact_predictor(noise_scheduler), {"prediction_type": "epsilon", "batch_size": 512}
    truth = expected_totals(normal_latents, noise_scheduler)
    found = {}
    for name, timesteps in (("pilot", 64), ("uniform", TimestepSampling.uniform(1000, 64))):
        bound = variational_bound(
            predict, normal_latents, noise_scheduler, num_samples=num_samples, timesteps=timesteps, **settings
        )
        z = (bound.images.total - truth) / bound.images_standard_error
        assert np.abs(z).max() < 4, "both are unbiased"
        found[name] = sampled_error(bound) * math.sqrt(num_samples)  # of a single sample of 64
    assert found["pilot"].max() < 0.02
    assert 0.3 < found["uniform"].mean() < 0.8


@pytest.mark.parametrize("variance", VARIANCES)
def test_sampled_timesteps_give_the_bound_of_all(normal_latents: Tensor, variance: str) -> None:
    noise_scheduler = scheduler()
    predict, settings = exact_predictor(noise_scheduler), {"prediction_type": "epsilon", "batch_size": 512}
    whole = variational_bound(predict, normal_latents, noise_scheduler, variance=variance, num_samples=4, **settings)
    sampled = variational_bound(
        predict, normal_latents, noise_scheduler, variance=variance, num_samples=20, timesteps=64, **settings
    )
    errors = sampled.images.total - whole.images.total
    # Rather the exact sum's noise than the sampled one's: 4 samples of 1000 against 20 of 64.
    spread = np.hypot(sampled.images_standard_error, whole.images_standard_error.mean())
    assert np.abs(errors / spread).max() < 4
    assert sampled.total == pytest.approx(whole.total, abs=0.03)
    assert sampled.denoising.sum() == pytest.approx(whole.denoising.sum(), abs=0.05)
    assert sampled.reconstruction == pytest.approx(whole.reconstruction, abs=0.03)


def test_neighbours_have_opposite_noise_and_all_others_noise_of_their_own(normal_latents: Tensor) -> None:
    """Also those of the pilot."""
    noise_scheduler = scheduler()
    met: list[Tensor] = []

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        signal = noise_scheduler.alphas_cumprod[timesteps].sqrt().reshape(-1, 1, 1, 1)
        met.append((noisy - signal * normal_latents[:1]) / (1 - signal**2).sqrt())
        return torch.zeros_like(noisy)

    variational_bound(
        predict, normal_latents[:1], noise_scheduler, prediction_type="epsilon", timesteps=15, num_samples=2
    )
    noise = torch.cat(met)[-30:].unflatten(0, (2, 15))
    torch.testing.assert_close(noise[:, 0:14:2], -noise[:, 1:14:2], atol=1e-3, rtol=0)
    separate = torch.cat([*met[:-1], noise[:, ::2].flatten(0, 1)])
    assert len(separate) > 40
    correlations = np.corrcoef(separate.flatten(1).numpy())
    assert np.abs(correlations[~np.eye(len(separate), dtype=bool)]).max() < 0.35
    assert separate.std().item() == pytest.approx(1, abs=0.02)


def test_networks_that_meet_the_same_noise_are_compared_far_more_exactly(normal_latents: Tensor) -> None:
    noise_scheduler, settings = scheduler(), {"prediction_type": "epsilon", "batch_size": 512}
    first = variational_bound(
        exact_predictor(noise_scheduler), normal_latents, noise_scheduler, timesteps=64, num_samples=4, **settings
    )
    worse = exact_predictor(noise_scheduler, scale=1.02)
    second = variational_bound(
        worse, normal_latents, noise_scheduler, timesteps=first.sampling, num_samples=4, **settings
    )
    truth = expected_totals(normal_latents, noise_scheduler, 1.02) - expected_totals(normal_latents, noise_scheduler)
    difference, standard_error = second.difference(first)
    assert difference == pytest.approx(truth.mean(), abs=4 * standard_error)
    assert difference > 3 * standard_error
    assert standard_error < second.standard_error.total / 20
    assert second.sampling is first.sampling
    with pytest.raises(ValueError, match="bounds of 8 and of 2 images cannot be compared one by one: evaluate both"):
        first.difference(variational_bound(worse, normal_latents[:2], noise_scheduler, timesteps=64, **settings))


@pytest.mark.parametrize("timesteps", [None, TimestepSampling.uniform(50, 6)])
def test_draws_belong_to_the_image(timesteps: TimestepSampling | None) -> None:
    """Not to the batch, to its place among the others, or to how they are divided."""
    noise_scheduler = scheduler(num_train_timesteps=50)
    latents = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))

    def bound(latents: Tensor, **settings: Any) -> Bound:
        settings = {"prediction_type": "v_prediction", "timesteps": timesteps, "num_samples": 2} | settings
        return variational_bound(lambda noisy, timesteps: noisy.tanh(), latents, noise_scheduler, **settings)

    whole = bound(latents)
    np.testing.assert_allclose(bound(latents, batch_size=5).images.total, whole.images.total, rtol=1e-6)
    np.testing.assert_allclose(bound(latents, batch_size=1000).images.total, whole.images.total, rtol=1e-6)
    order = [4, 0, 5]
    part = bound(latents[order], image_numbers=order)
    np.testing.assert_allclose(part.images.total, whole.images.total[order], rtol=1e-6)
    np.testing.assert_allclose(part.images.denoising, whole.images.denoising[order], rtol=1e-5, atol=1e-9)
    assert np.abs(bound(latents[order]).images.total / whole.images.total[order] - 1).min() > 1e-4
    tensor = bound(latents[order].requires_grad_(), image_numbers=torch.tensor(order))
    assert tensor.total == part.total
    assert np.abs(bound(latents, seed=1).images.total / whole.images.total - 1).min() > 1e-4


def test_conditioning_follows_the_images() -> None:
    latents = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    noise_scheduler = scheduler(num_train_timesteps=40)
    calls = []

    def predict(noisy: Tensor, timesteps: Tensor, *, answer: Tensor) -> Tensor:
        calls.append(len(noisy))
        assert noisy.dtype == torch.float32
        assert timesteps.dtype == torch.int64
        assert not torch.is_grad_enabled()
        return answer + 0.1

    for timesteps in (None, TimestepSampling.uniform(40, 7)):
        bound = variational_bound(
            predict, latents, noise_scheduler, prediction_type="sample", timesteps=timesteps, batch_size=16,
            conditioning={"answer": latents},
        )  # fmt: skip
        assert max(calls) == 16
        if timesteps is None:
            process = DiffusionProcess(noise_scheduler)
            constants, slopes = process.terms("fixed_large", np.ones(40))
            expected = (constants + 0.01 * slopes)[0] / math.log(2)
            np.testing.assert_allclose(bound.images.reconstruction, expected, rtol=1e-4)


def test_standard_errors_are_the_spread_of_repetitions() -> None:
    noise_scheduler = scheduler(num_train_timesteps=30)
    latents = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    predict = exact_predictor(noise_scheduler)
    settings = {"prediction_type": "epsilon", "batch_size": 4096}
    bound = variational_bound(predict, latents, noise_scheduler, num_samples=2, **settings)
    # Of one image: 100 times the same, with other noise.
    same = variational_bound(predict, latents[:1].repeat(100, 1), noise_scheduler, num_samples=10, **settings)
    assert np.median(same.images_standard_error) == pytest.approx(same.images.total.std(), rel=0.3)
    # Of the mean of 20 images, by parts of 20.
    parts = [
        variational_bound(predict, latents[start : start + 20], noise_scheduler, num_samples=2,
                          image_numbers=range(start, start + 20), **settings)
        for start in range(0, 400, 20)
    ]  # fmt: skip
    for name in ("prior", "reconstruction", "total"):
        estimates = np.array([getattr(part, name) for part in parts])
        assert estimates.mean() == pytest.approx(getattr(bound, name))
        claimed = np.mean([getattr(part.standard_error, name) for part in parts])
        assert claimed == pytest.approx(estimates.std(ddof=1), rel=0.4), name
    assert bound.standard_error.denoising.shape == (29,)
    assert standard_errors(np.array([1.0, 3.0]), axis=0) == 1
    alone = variational_bound(predict, latents[:1], noise_scheduler, **settings)
    assert np.isnan(alone.standard_error.total)
    assert np.isnan(alone.images_standard_error).tolist() == [True]


def test_bits_per_image_are_the_dimensions_times_as_many(normal_latents: Tensor) -> None:
    noise_scheduler = scheduler(num_train_timesteps=30)
    bound = variational_bound(
        exact_predictor(noise_scheduler), normal_latents, noise_scheduler, prediction_type="epsilon"
    )
    assert bound.dimensions == 256
    assert bound.bits_per_image.total == 256 * bound.total
    np.testing.assert_array_equal(bound.bits_per_image.denoising, 256 * bound.denoising)
    assert bound.images.total.mean() == pytest.approx(bound.total)
    assert bound.images.denoising.shape == (8, 29)


@pytest.mark.parametrize("evaluations", [1, 5, 64])
def test_systematic_sampling(evaluations: int) -> None:
    contributions = np.geomspace(1, 0.001, 100)
    sampling = TimestepSampling.uniform(100, evaluations).proportional_to(contributions)
    expected = evaluations * (0.9 * contributions / contributions.sum() + 0.1 / 100)
    us = (np.arange(4000) + 0.5) / 4000
    counts = np.stack([np.bincount(sampling.draw(u), minlength=100) for u in us])
    assert (counts.sum(axis=1) == evaluations).all()
    assert (np.abs(counts - expected) < 1).all()
    np.testing.assert_allclose(counts.mean(axis=0), expected, atol=2 / 4000)
    np.testing.assert_allclose(sampling.weights, 1 / expected)
    assert sampling.draw(np.nextafter(1, 0)).max() == 99
    assert sampling.proportional_to(np.zeros(100)) is sampling


def test_a_network_with_captions() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET_CONFIG).eval()
    latents, states = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 32)
    bound = variational_bound(
        lambda noisy, timesteps, **conditioning: unet(noisy, timesteps, **conditioning).sample,
        latents, scheduler(), prediction_type="v_prediction", variance="fitted", timesteps=16,
        conditioning={"encoder_hidden_states": states},
    )  # fmt: skip
    # It has learned nothing, and the v that it predicts is small: the latents' own spread is most of the error.
    assert ENTROPY < bound.total < ENTROPY + 1


def test_it_knows_no_other_part_of_the_project() -> None:
    arrows = graph()
    files = {f"evaluation.{name}" for name in ("bound", "denoiser", "diffusion_process", "timestep_sampling")}
    formulas = {"model.predictions"}
    assert set().union(*(arrows[name] for name in files)) <= files | formulas
    assert arrows["model.predictions"] == set()


LATENTS = torch.ones(2, 4)
BAD_INPUT = {
    "the schedule is that of flow matching": (
        {"scheduler": FlowMatchEulerDiscreteScheduler()},
        "FlowMatchEulerDiscreteScheduler has no alphas_cumprod, so it is none of DDPM's kind: give the DDPMScheduler",
    ),
    "alphas_cumprod of another length": (
        {"scheduler": SimpleNamespace(alphas_cumprod=torch.tensor([0.9, 0.5]), config=scheduler().config)},
        "the scheduler has 2 alphas_cumprod but num_train_timesteps=1000: make it anew",
    ),
    "one step": ({"scheduler": SimpleNamespace(alphas_cumprod=[0.5])}, "has shape (1,): give a scheduler with"),
    "noise that stays": (
        {"scheduler": DDPMScheduler(trained_betas=[0.1, 0.0, 0.1], num_train_timesteps=3)},
        "alphas_cumprod does not fall at timestep 1, where no noise is added: give a schedule whose betas are above 0",
    ),
    "NaN in the schedule": (
        {"scheduler": DDPMScheduler(trained_betas=[0.1, math.nan], num_train_timesteps=2)},
        "does not fall at timestep 1"),
    "betas above 1": (
        {"scheduler": DDPMScheduler(trained_betas=[0.1, 1.5], num_train_timesteps=2)},
        "ends at -0.45: give a schedule"),
    "epsilon at zero SNR": (
        {"scheduler": scheduler(rescale_betas_zero_snr=True)},
        "the schedule ends at zero SNR, where 'epsilon' says nothing of the latents: give a network with",
    ),
    "score at zero SNR": (
        {"scheduler": scheduler(rescale_betas_zero_snr=True), "prediction_type": "score"}, "where 'score' says nothing"
    ),
    "NaN latents": (
        {"latents": torch.tensor([[0.0, 1.0], [math.nan, 0.0], [0.0, math.inf]])},
        "latents[1] is not finite (2 of 3 are not): leave such images out",
    ),
    "latents beyond float32": (
        {"latents": torch.full((2, 4), 1e300, dtype=torch.float64)},
        "latents[0] is not finite (2 of 2 are not): leave such images out",
    ),
    "no latents": ({"latents": torch.zeros(0, 4, 8, 8)}, "latents are of shape (0, 4, 8, 8): give a tensor"),
    "a single number": ({"latents": torch.tensor(1.0)}, "latents are of shape (): give a tensor (N, C, h, w)"),
    "an array": ({"latents": np.ones((2, 4))}, "latents are a ndarray: give a tensor (N, C, h, w)"),
    "guidance left on": (
        {"predict": lambda noisy, timesteps: torch.cat([noisy, noisy])},
        "predict returned (64, 4) for latents (32, 4): let it return one prediction for each, without guidance",
    ),
    "a learned variance": (
        {"predict": lambda noisy, timesteps: torch.cat([noisy, noisy], dim=1)}, "without a learned variance"
    ),
    "a model's output": (
        {"predict": lambda noisy, timesteps: SimpleNamespace(sample=noisy)},
        "predict returned a SimpleNamespace: let it return the tensor in it",
    ),
    "an overflow": (
        {"predict": lambda noisy, timesteps: noisy / (timesteps != 3)[:, None]},
        "predict's result is not finite at timestep 3: run the network in float32",
    ),
    "an exact network": (
        {"predict": lambda noisy, timesteps: torch.ones_like(noisy), "prediction_type": "sample", "variance": "fitted"},
        "predict is exact at timestep 0, where no variance above 0 fits: give variance='fixed_large'",
    ),
    "prediction_type": ({"prediction_type": "flow"}, "prediction_type 'flow' is not known: give epsilon, v_prediction"),
    "variance": ({"variance": "learned"}, "variance 'learned' is not known: give fixed_large, fixed_small, fitted"),
    "no samples": ({"num_samples": 0}, "num_samples is 0: give 1 or more"),
    "no batch": ({"batch_size": 0}, "batch_size is 0: give 1 or more"),
    "a negative seed": ({"seed": -1}, "seed or image_numbers are out of range: give numbers from 0 to 2**64 - 1"),
    "too few numbers": ({"image_numbers": [1]}, "image_numbers has 1 entries for 2 latents: give one for each"),
    "too few captions": ({"conditioning": {"a": torch.ones(3)}}, "a has 3 entries for 2 latents: give one for each"),
    "no timesteps": ({"timesteps": 0}, "0 timesteps for each image: give 1 or more, or None for all"),
    "a list of timesteps": ({"timesteps": [1, 2]}, "timesteps is a list: give how many, None for all, or a bound's"),
    "another schedule's timesteps": (
        {"timesteps": TimestepSampling.uniform(50, 4)}, "timesteps were chosen among 50, but the scheduler has 1000"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "said"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_answered_in_one_line(settings: dict[str, Any], said: str) -> None:
    usual = {
        "predict": lambda noisy, timesteps: noisy, "latents": LATENTS, "scheduler": scheduler(),
        "prediction_type": "epsilon",
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        variational_bound(**usual | settings)
    assert "\n" not in str(caught.value)


def test_bad_probabilities_are_answered_in_one_line() -> None:
    for probabilities in (np.array([1.0, 0.0]), np.array([0.5, 0.6]), np.array([math.nan, 1.0])):
        with pytest.raises(ValueError, match="have to be above 0 and add up to 1: give other ones"):
            TimestepSampling(probabilities, 4)


def test_the_example_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "bound.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    exec(example, {})
    first, second = capsys.readouterr().out.splitlines()
    assert float(first.split()[0]) == pytest.approx(ENTROPY, abs=0.05)
    assert float(second.split()[0]) > 0
