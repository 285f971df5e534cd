"""Samplers: which fit, that they arrive where the predictions point, and that scores are drawn as the ε they mean."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler, SchedulerMixin

from sd_recipes.errors import RecipeError
from sd_recipes.model.samplers import check_it_draws, drawing_sampler
from sd_recipes.recipe import OTHER_SAMPLER_NAMES, SAMPLERS_BY_NAME, sampler_class_name

SCHEDULE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Where Stable Diffusion's own configuration of PNDM is silent, classes have defaults of their own.
BARE = {"_class_name": "PNDMScheduler", **SCHEDULE, "skip_prk_steps": True, "steps_offset": 1}
PREDICTS_NO_SAMPLE = {"pndm", "euler_a", "dpm2", "dpm2_a"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
BEGINS_WITH_PURE_NOISE = {"ddim", "ddpm", "euler", "euler_a", "dpmsolver++", "unipc"}


def own(prediction_type: str = "epsilon", **changes: Any) -> SchedulerMixin:
    """A pipeline's own sampler."""
    return DDIMScheduler(**SCHEDULE, clip_sample=False, steps_offset=1, prediction_type=prediction_type, **changes)


def draw(
    sampler: SchedulerMixin, predict: Callable[[torch.Tensor, float], torch.Tensor], steps: int, step_seed: int = 0
) -> torch.Tensor:
    """What a pipeline draws, (1, 4, 4, 4), with a network `predict` of noisy latents and timestep, float64."""
    takes_generator = "generator" in inspect.signature(sampler.step).parameters
    options = {"generator": torch.Generator().manual_seed(step_seed)} if takes_generator else {}
    sampler.set_timesteps(steps)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latents = noise * sampler.init_noise_sigma
    for timestep in sampler.timesteps:
        prediction = predict(sampler.scale_model_input(latents, timestep), float(timestep))
        latents = sampler.step(prediction, timestep, latents, **options, return_dict=False)[0]
    return latents


def sigma_of(timestep: float) -> float:
    """σ_t, between timesteps too: as Euler's sampler takes it, linearly in σ_t / α_t."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    ratios = np.sqrt(1 / np.cumprod(1 - betas) - 1)
    ratio = np.interp(timestep, np.arange(1000), ratios)
    return ratio / np.sqrt(1 + ratio**2)


def network(noisy: torch.Tensor, timestep: float) -> torch.Tensor:
    """An ε for every input: that of white latents, and something that is not linear in them."""
    return sigma_of(timestep) * noisy + 0.1 * torch.sin(noisy + timestep / 300)


def test_the_table_holds_all_that_fit_a_schedule_of_betas() -> None:
    """EDM's has no betas, and the SDE's draws noise that no generator fixes, by a library that is not installed."""
    fit = {each.__name__ for each in DDPMScheduler(**SCHEDULE).compatibles}
    assert fit == set(SAMPLERS_BY_NAME.values()) | {"EDMEulerScheduler", "DPMSolverSDEScheduler"}


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("ddim", "DDIMScheduler"),
        ("Euler a", "EulerAncestralDiscreteScheduler"),
        ("DPM++ 2M", "DPMSolverMultistepScheduler"),
        ("PLMS", "PNDMScheduler"),
        ("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
        ("unipcmultistepscheduler", "UniPCMultistepScheduler"),
    ],
)
def test_names_people_know_them_by(name: str, class_name: str) -> None:
    assert sampler_class_name(name) == class_name
    assert type(drawing_sampler(own(), name)).__name__ == class_name


@pytest.mark.parametrize("name", SAMPLERS_BY_NAME)
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_scores_are_drawn_as_the_noise_that_they_mean(name: str, steps: int) -> None:
    expected = draw(drawing_sampler(own(), name), network, steps)
    sampler = drawing_sampler(own("score"), name)
    assert sampler.config.prediction_type == "epsilon"
    found = draw(sampler, lambda noisy, timestep: -network(noisy, timestep) / sigma_of(timestep), steps)
    assert expected.std() > 0.02
    # ᾱ is float32 in the schedulers: near t = 0, σ_t² has four digits.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["euler", "heun", "lms", "dpm2"])
def test_between_timesteps_a_score_is_that_of_the_noise_which_the_sampler_has_there(name: str) -> None:
    """The exact score of a picture that is the only one, at the sampler's own σ: it is drawn without an error."""
    picture = torch.full((1, 4, 4, 4), 0.5, dtype=torch.float64)
    sampler = drawing_sampler(own("score", timestep_spacing="linspace"), name)
    seen = []

    def predict(noisy: torch.Tensor, timestep: float) -> torch.Tensor:
        seen.append(timestep)
        at = 0 if len(seen) == 1 else sampler.step_index
        ratio = float((sampler.sigmas_interpol if name == "dpm2" and len(seen) % 2 == 0 else sampler.sigmas)[at])
        signal, sigma = (1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5
        return (signal * picture - noisy) / sigma**2

    found = draw(sampler, predict, 7)
    assert any(timestep % 1 for timestep in seen)
    torch.testing.assert_close(found, picture, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", SAMPLERS_BY_NAME)
def test_another_class_samples_what_was_trained_and_clips_no_latents(name: str) -> None:
    """A picture far out of [-1, 1], of a pipeline whose configuration says nothing of clipping."""
    picture = torch.full((1, 4, 4, 4), 6.0, dtype=torch.float64)
    sampler = PNDMScheduler.from_config(BARE, prediction_type="v_prediction")

    def predict(noisy: torch.Tensor, timestep: float) -> torch.Tensor:
        sigma = sigma_of(timestep)
        signal = (1 - sigma**2) ** 0.5
        return signal * (noisy - signal * picture) / sigma - sigma * picture

    found = draw(drawing_sampler(sampler, name), predict, 20)
    torch.testing.assert_close(found, picture, rtol=0, atol=0.2)


def test_what_was_set_after_a_sampler_was_made_is_kept() -> None:
    sampler = PNDMScheduler.from_config(BARE)
    sampler.register_to_config(prediction_type="v_prediction")
    assert drawing_sampler(sampler, "euler").config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", SAMPLERS_BY_NAME)
def test_zero_terminal_snr_needs_a_sampler_that_knows_of_it(name: str) -> None:
    sampler = DDIMScheduler(**SCHEDULE, clip_sample=False, **ZERO_SNR)
    if name in BEGINS_WITH_PURE_NOISE:
        drawing = drawing_sampler(sampler, name)
        assert drawing.alphas_cumprod[-1] < 1e-6
        check_it_draws(drawing, 10, name)
        return
    words = f"^--validation_sampler {name}: .* cannot begin with pure noise.*: give one of ddim, .*unipc, or drop it$"
    with pytest.raises(RecipeError, match=words.replace("+", r"\+")):
        drawing_sampler(sampler, name)


@pytest.mark.parametrize("name", SAMPLERS_BY_NAME)
def test_a_sampler_that_does_not_know_the_prediction_is_refused_before_it_draws(name: str) -> None:
    for prediction_type in ("epsilon", "v_prediction", "score"):
        check_it_draws(drawing_sampler(own(prediction_type), name), 5, name)
    sampler = drawing_sampler(own("sample"), name)
    if name not in PREDICTS_NO_SAMPLE:
        check_it_draws(sampler, 5, name)
        return
    words = (
        f"--validation_sampler {name}: .*Scheduler cannot draw from predictions of sample in 5 steps .* as euler, or"
    )
    with pytest.raises(RecipeError, match=words):
        check_it_draws(sampler, 5, name)


def test_a_number_of_steps_that_a_sampler_cannot_take_is_refused_and_the_generators_are_left_alone() -> None:
    """diffusers' DDIM begins at timestep 1000 of 0 … 999 then, since its timesteps are moved by one."""
    with pytest.raises(RecipeError, match=r"the model's scheduler: DDIMScheduler cannot draw .* in 1000 steps \(index"):
        check_it_draws(drawing_sampler(own()), 1000, None)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    check_it_draws(drawing_sampler(own(), "ddpm"), 10, "ddpm")
    check_it_draws(drawing_sampler(own(), "euler"), 1000, "euler")  # which the message names
    assert torch.equal(torch.get_rng_state(), state)


def test_the_documentations_table_is_that_of_the_code() -> None:
    lines = (ROOT / "docs" / "pictures.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "Scheduler` |" in line]
    names = [re.findall(r"`(.+?)`", row[0]) for row in cells]
    assert {name: row[1].strip("`") for row, each in zip(cells, names, strict=True) for name in each} == (
        SAMPLERS_BY_NAME | OTHER_SAMPLER_NAMES
    )
    first = [each[0] for each in names]
    assert {name for name, row in zip(first, cells, strict=True) if "`sample`" in row[3]} == PREDICTS_NO_SAMPLE
    unfit = {name for name, row in zip(first, cells, strict=True) if "zero terminal SNR" in row[3]}
    assert unfit == set(first) - BEGINS_WITH_PURE_NOISE
    adds_noise = {name for name, row in zip(first, cells, strict=True) if row[2] == "yes"}
    drawn = {
        name: [draw(drawing_sampler(own(), name), network, 5, step_seed) for step_seed in (1, 2)] for name in first
    }
    assert adds_noise == {name for name in first if not torch.equal(*drawn[name])}


def test_stock_samplers_refuse_scores() -> None:
    """So nobody draws wrong pictures from an exported pipeline without noticing."""
    for class_name in SAMPLERS_BY_NAME.values():
        sampler = getattr(diffusers, class_name).from_config(own("score").config)
        assert sampler.config.prediction_type == "score"
        with pytest.raises((ValueError, NotImplementedError), match="score"):
            draw(sampler, network, 5)
