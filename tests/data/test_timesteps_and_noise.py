"""How timesteps and noise are distributed, against their densities and spectra."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sd_recipes.data.draws import draw
from sd_recipes.data.noise import training_noise
from sd_recipes.data.timesteps import check_timesteps, timestep_at
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import ObjectiveConfig


def test_logit_normal_timesteps_have_that_distribution_in_strata() -> None:
    config = ObjectiveConfig(timestep_sampling="logit_normal", logit_mean=-0.5, logit_std=0.8, min_timestep=100)
    us = (np.arange(20_000) + 0.5) / 20_000
    timesteps = np.array([timestep_at(u, 1000, config) for u in us])
    assert (np.diff(timesteps) >= 0).all(), "strata stay strata"
    assert timesteps.min() == 100

    # The density itself, summed up numerically, and cut off below 0.1.
    x = (np.arange(100_000) + 0.5) / 100_000
    density = np.exp(-((np.log(x / (1 - x)) + 0.5) ** 2) / (2 * 0.8**2)) / (x * (1 - x)) * (x >= 0.1)
    share_below = np.concatenate([[0], np.cumsum(density) / density.sum()])[::100]  # of t / T below 0, 1 / T, …, 1
    found = np.searchsorted(timesteps, np.arange(1001)) / len(timesteps)
    assert np.abs(found - share_below).max() < 1e-3


def test_a_range_of_timesteps_is_uniform_and_leaves_all_other_draws_alone() -> None:
    config = ObjectiveConfig(min_timestep=200, max_timestep=700)
    size = {"global_batch_size": 5, "latent_shape": (4, 8, 8), "num_train_timesteps": 1000}
    drawn = [draw(1, position, stratum=position % 5, objective=config, **size) for position in range(2000)]
    timesteps = np.array([each.timestep for each in drawn])
    assert (timesteps.reshape(-1, 5) // 100 == np.arange(2, 7)).all()
    assert [timestep_at(u, 1000, config) for u in (0.0, np.nextafter(1, 0))] == [200, 699]
    assert np.bincount(timesteps - 200).max() < 15, "4 on average"
    plain = draw(1, 7, stratum=2, **size)
    for name in ("timestep_u", "flip_u", "crop_u", "caption_u", "dropout_u"):
        assert getattr(plain, name) == getattr(drawn[7], name)
    np.testing.assert_array_equal(plain.noise, drawn[7].noise)
    # As before there were ranges, to the last bit of a double.
    assert plain.timestep == int((2 + np.float64(plain.timestep_u * 5 - 2)) / 5 * 1000)


@pytest.mark.parametrize(
    ("settings_given", "words"),
    [
        ({"max_timestep": 1001}, "--max_timestep 1001 is over the model's 1000 timesteps: lower it"),
        ({"min_timestep": 1000}, "--min_timestep 1000 is over the model's last one, 999: lower it"),
        (
            {"timestep_sampling": "logit_normal", "logit_mean": 30.0, "max_timestep": 800},
            "draws next to no timestep from 0 to 799",
        ),
    ],
)
def test_timesteps_that_the_model_has_not_are_refused(settings_given: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check_timesteps(1000, ObjectiveConfig(**settings_given))
    check_timesteps(1000, ObjectiveConfig(max_timestep=1000, timestep_sampling="logit_normal", logit_mean=30.0))


SIZE = {"stratum": 0, "global_batch_size": 1, "latent_shape": (4, 16, 24), "num_train_timesteps": 1000}


def noises(number: int, **settings: Any) -> np.ndarray:
    config = ObjectiveConfig(**settings)
    return np.stack([training_noise(draw(3, position, **SIZE), config) for position in range(number)])


def test_pyramid_noise_has_variance_1_and_more_of_what_is_coarse() -> None:
    noise = noises(1500, multires_noise_iterations=6, multires_noise_discount=0.6)
    white = noises(1500)
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.01
    assert noise.var() == pytest.approx(1, abs=0.02)
    power, flat = (np.square(np.abs(np.fft.fft2(each, norm="ortho"))).mean(axis=(0, 1)) for each in (noise, white))
    assert flat == pytest.approx(np.ones_like(flat), abs=0.15)
    # What the coarser levels add lies at low frequencies; at high ones is what the division left of the white noise.
    assert power[0, 0] > 4 * flat[0, 0]
    coarse, fine = power[:2, :2].mean(), power[6:10, 9:15].mean()
    assert coarse > 3
    assert 0.5 < fine < 0.9
    assert power[0, 0] > power[1, 1] > power[3, 3] > power[8, 12]

    # One sample by the definition, with linear interpolation written out.
    def enlarged(values: np.ndarray, size: int) -> np.ndarray:
        few = len(values)
        out = []
        for pixel in range(size):
            place = min(max((pixel + 0.5) * few / size - 0.5, 0), few - 1)
            low = int(place)
            high = min(low + 1, few - 1)
            out.append((1 - place + low) * values[low] + (place - low) * values[high])
        return np.array(out)

    drawn = draw(3, 11, **SIZE)
    total, variance, shape, scale = drawn.noise.astype(np.float64), 1.0, SIZE["latent_shape"], 1.0
    for level in range(1, 7):
        if shape[1] == shape[2] == 1:
            break
        coarse_noise = drawn.coarse_noise(level, shape)
        for many, few in zip(shape[1:], coarse_noise.shape[1:], strict=True):
            assert max(1, many // 4) <= few <= max(1, many // 2)
        shape, scale = coarse_noise.shape, scale * 0.6
        rows = enlarged(np.eye(shape[1]), 16)
        columns = enlarged(np.eye(shape[2]), 24)
        total = total + scale * np.einsum("ij,cjk,lk->cil", rows, coarse_noise, columns)
        variance += scale**2 * (np.einsum("ij,lk->ilkj", rows, columns) ** 2).sum(axis=(2, 3)).mean()
    np.testing.assert_allclose(noise[11], total / np.sqrt(variance), rtol=1e-4, atol=1e-5)


def test_offset_and_pyramid_go_together_and_leave_the_white_noise_alone() -> None:
    white, offset, both, pyramid = (
        noises(3, noise_offset=scale, multires_noise_iterations=levels)
        for scale, levels in ((0, 0), (0.1, 0), (0.1, 4), (0, 4))
    )
    np.testing.assert_array_equal(white[1], draw(3, 1, **SIZE).noise)
    np.testing.assert_allclose((offset - white).std(axis=(2, 3)), 0, atol=1e-6)
    assert (offset - white)[:, :, 0, 0].std() > 0.03
    np.testing.assert_allclose(both - pyramid, offset - white, atol=1e-6)
    tiny = draw(3, 1, **{**SIZE, "latent_shape": (4, 1, 1)})
    np.testing.assert_array_equal(training_noise(tiny, ObjectiveConfig(multires_noise_iterations=3)), tiny.noise)


@pytest.mark.parametrize(
    ("strategy", "favoured"),
    [
        ({"timestep_bias_strategy": "earlier", "timestep_bias_portion": 0.2}, range(200)),
        ({"timestep_bias_strategy": "later"}, range(750, 1000)),
        ({"timestep_bias_strategy": "range", "timestep_bias_begin": 300, "timestep_bias_end": 500}, range(300, 500)),
    ],
)
def test_biased_timesteps_are_as_frequent_as_diffusers_weights_say(strategy: dict, favoured: range) -> None:
    config = ObjectiveConfig(**strategy, timestep_bias_multiplier=3.0, min_timestep=100)
    weights = np.array([3.0 if timestep in favoured else 1.0 for timestep in range(1000)])
    weights[:100] = 0
    drawn = [timestep_at((number + 0.5) / 10_000, 1000, config) for number in range(10_000)]
    counts = np.bincount(drawn, minlength=1000)
    np.testing.assert_allclose(counts, 10_000 * weights / weights.sum(), atol=1.01)
    assert drawn == sorted(drawn)


def test_a_range_beyond_the_models_timesteps_is_refused() -> None:
    with pytest.raises(RecipeError, match="--timestep_bias_end 1000 is over the model's 500 timesteps: lower it"):
        check_timesteps(500, ObjectiveConfig(timestep_bias_strategy="range"))
