import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from sd_recipes.inspection.distribution import (
    LatentDistribution,
    Moments,
    PixelDistribution,
    diffuse,
    forward_kl,
    gaussian_from_histogram,
    kl_from_gaussian,
    stable_diffusion_alphas_cumprod,
)


def colours(num: int, seed: int = 0) -> np.ndarray:
    """Correlated colours, uint8 (num, 3)."""
    rng = np.random.default_rng(seed)
    values = rng.multivariate_normal([0.4, 0.5, 0.6], 0.01 * np.array([[2, 1, 1], [1, 2, 1.5], [1, 1.5, 2]]), num)
    return (255 * values).round().clip(0, 255).astype(np.uint8)


def test_moments_of_merged_parts_are_those_of_the_whole() -> None:
    values = np.random.default_rng(0).normal(1e6, 1.0, (1000, 3))  # a mean that a sum of squares would drown in
    whole, left, right = Moments(3), Moments(3), Moments(3)
    whole.update(values)
    for part in np.array_split(values[:300], 7):
        left.update(part)
    right.update(values[300:])
    left.merge(right)
    left.merge(Moments(3))
    for moments in (whole, left):
        assert moments.count == 1000
        np.testing.assert_allclose(moments.mean, values.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(moments.covariance, np.cov(values.T, bias=True), rtol=1e-6)


def test_pixels_are_counted_once_in_every_histogram_and_merge() -> None:
    pixels = colours(5000)
    whole, left, right = PixelDistribution(), PixelDistribution(), PixelDistribution()
    whole.update(pixels)
    left.update(pixels[:1234])
    right.update(pixels[1234:])
    left.merge(right)
    for name in ("marginals", "green_blue", "joint"):
        np.testing.assert_array_equal(getattr(left, name), getattr(whole, name))
    assert whole.joint.sum() == whole.green_blue.sum() == 5000
    np.testing.assert_array_equal(whole.marginals[2], np.bincount(pixels[:, 2], minlength=256))
    np.testing.assert_array_equal(whole.joint.sum(axis=(0, 1)), whole.marginals[2].reshape(32, 8).sum(axis=1))
    np.testing.assert_array_equal(whole.green_blue.sum(axis=1), whole.marginals[1].reshape(64, 4).sum(axis=1))
    np.testing.assert_allclose(whole.moments.covariance, np.cov((pixels / 255).T, bias=True), rtol=1e-10)
    x = pixels / 127.5 - 1
    assert whole.mean_square == pytest.approx(np.mean(x**2))


def test_kl_from_a_gaussian_matches_known_densities() -> None:
    # Of a uniform density on [0, 1] it is ½ log(2πe / 12), whatever the number of bins.
    for bins in (1, 10, 256):
        assert kl_from_gaussian(np.ones(bins), 1 / bins) == pytest.approx(0.5 * math.log(2 * math.pi * math.e / 12))
    # Independent channels add up.
    left, right = np.array([3, 1, 2]), np.array([1, 5, 1])
    assert kl_from_gaussian(np.outer(left, right), 0.1) == pytest.approx(
        kl_from_gaussian(left, 0.1) + kl_from_gaussian(right, 0.1)
    )
    # The integral itself, on a fine grid.
    counts = np.array([5, 0, 1, 7, 2])
    mean, covariance = gaussian_from_histogram(counts, 0.2, 0.0)
    x = (np.arange(50_000) + 0.5) / 50_000
    p = np.repeat(counts / counts.sum() / 0.2, 10_000)
    log_q = -0.5 * (x - mean[0]) ** 2 / covariance[0, 0] - 0.5 * np.log(2 * np.pi * covariance[0, 0])
    integral = np.mean(p * (np.log(np.where(p > 0, p, 1)) - log_q))
    assert kl_from_gaussian(counts, 0.2) == pytest.approx(integral, rel=1e-6)


def test_gaussian_pixels_are_nearer_to_their_gaussian_than_two_colours_are() -> None:
    gaussian, two, gray = PixelDistribution(), PixelDistribution(), PixelDistribution()
    gaussian.update(colours(200_000))
    two.update(np.where(np.random.default_rng(0).random((10_000, 1)) < 0.5, 20, 230).astype(np.uint8).repeat(3, 1))
    gray.update(colours(10_000)[:, :1].repeat(3, 1))
    near, far = gaussian.kl_from_gaussians(), two.kl_from_gaussians()
    assert near["red"] < 0.01
    assert near["green_blue"] < 0.02
    assert near["red_green_blue"] < 0.1
    assert all(far[name] > near[name] + 1 for name in near)
    assert all(math.isfinite(kl) and kl >= 0 for kl in gray.kl_from_gaussians().values())


def test_latents_give_the_scaling_factor_and_count_what_lies_beyond_the_grid() -> None:
    rng = np.random.default_rng(0)
    latents = rng.normal([[[1.0]], [[-2.0]]], 4.0, (20, 2, 16, 16))
    seen = LatentDistribution()
    for picture in latents:
        seen.update(picture)
    assert seen.deviation == pytest.approx(latents.std())
    assert seen.mean_square == pytest.approx(np.mean(latents**2))
    assert seen.histograms.sum(axis=1).tolist() == [20 * 256] * 2
    assert max(seen.kl_from_gaussians()) < 0.05
    assert seen.num_outside == 0
    seen.update(np.full((2, 1, 1), 1000.0))
    assert seen.num_outside == 2


def test_the_schedule_is_stable_diffusions() -> None:
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    np.testing.assert_allclose(stable_diffusion_alphas_cumprod(), scheduler.alphas_cumprod.numpy(), rtol=1e-4)


@pytest.mark.parametrize("alpha_bar", [0.999, 0.5, 0.005])
def test_forward_kl_is_the_divergence_of_the_two_gaussians(alpha_bar: float) -> None:
    x_0 = torch.linspace(-1, 1, 12, dtype=torch.float64)
    q = torch.distributions.Normal(alpha_bar**0.5 * x_0, (1 - alpha_bar) ** 0.5)
    prior = torch.distributions.Normal(torch.zeros_like(x_0), 1.0)
    expected = torch.distributions.kl_divergence(q, prior).mean().item()
    assert forward_kl((x_0**2).mean().item(), alpha_bar) == pytest.approx(expected)


def test_diffused_unit_variance_stays_unit_variance() -> None:
    rng = np.random.default_rng(0)
    x_t = diffuse(rng.normal(size=100_000), 0.3, rng.normal(size=100_000))
    assert x_t.std() == pytest.approx(1, abs=0.01)
