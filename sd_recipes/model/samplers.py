"""Samplers of pictures: made of the one that a pipeline is exported with, and tried before a run begins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import wraps
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin

from sd_recipes.errors import RecipeError, one_line
from sd_recipes.model.predictions import convert
from sd_recipes.recipe import SAMPLERS_BY_NAME, sampler_class_name

# What a class's own defaults would do to latents where the configuration of another class is silent: DDIM and DDPM clip
# them to [-1, 1], which they exceed, and PNDM begins with Runge-Kutta steps, which Stable Diffusion leaves out.
FOR_LATENTS = {"clip_sample": False, "skip_prk_steps": True}


def of_class(sampler_class: type[SchedulerMixin], config: Mapping[str, Any], **changes: Any) -> SchedulerMixin:
    """A sampler of a class, made of the configuration of one of any class and of changes to it."""
    silent = {name: value for name, value in FOR_LATENTS.items() if name not in config}
    return sampler_class.from_config(config, **silent, **changes)


# How messages call the sampler and the number of its steps.
VALIDATION_FLAGS = ("--validation_sampler", "--validation_inference_steps")


def drawing_sampler(
    sampler: SchedulerMixin, name: str | None = None, flags: tuple[str, str] = VALIDATION_FLAGS
) -> SchedulerMixin:
    """A new sampler to draw with: of the class of `sampler`, a pipeline's own, or of the one that `name` stands for.

    Of scores diffusers cannot sample; this sampler turns them into ε, and its configuration says epsilon. So a pipeline
    that predicts them draws after `pipeline.scheduler = drawing_sampler(pipeline.scheduler)`. Raises RecipeError for a
    class that cannot draw by the noise schedule, and ValueError for a name that is not known.
    """
    config = sampler.config
    sampler_class = type(sampler) if name is None else getattr(diffusers, sampler_class_name(name))
    if config.get("rescale_betas_zero_snr") and not knows_zero_snr(sampler_class):
        known = [
            each for each, class_name in SAMPLERS_BY_NAME.items() if knows_zero_snr(getattr(diffusers, class_name))
        ]
        raise RecipeError(
            f"{flags[0]} {name}: {sampler_class.__name__} cannot begin with pure noise, as this model's "
            f"schedule does (rescale_betas_zero_snr): give one of {', '.join(known)}, or drop it"
        )
    predicts_score = config.prediction_type == "score"
    prediction_type = "epsilon" if predicts_score else config.prediction_type
    drawing = of_class(sampler_class, config, prediction_type=prediction_type)
    if predicts_score:
        take_scores(drawing)
    return drawing


def knows_zero_snr(sampler_class: type[SchedulerMixin]) -> bool:
    """Whether a class has the setting `rescale_betas_zero_snr`: another one would draw by a wrong schedule."""
    return "rescale_betas_zero_snr" in inspect.signature(sampler_class.__init__).parameters


def take_scores(sampler: Any) -> None:
    """Let the steps of a sampler of ε be given scores, guided or not: guidance is linear, and so is -σ_t s = ε.

    σ_t is that of the timestep which the UNet is called with. Between timesteps σ_t / α_t is interpolated linearly, as
    by the samplers that go there, whatever they scale their own latents by.
    """
    step = sampler.step
    alphas_cumprod = sampler.alphas_cumprod.double().numpy()
    ratios = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)

    @wraps(step)  # the pipeline asks for its parameters
    def step_of_score(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        ratio = float(np.interp(float(timestep), np.arange(len(ratios)), ratios))
        signal, sigma = (1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5
        # The latents say nothing of ε that the score does not: in which scale they are makes no difference.
        return step(convert(model_output, sample, "score", "epsilon", signal, sigma), timestep, sample, **options)

    sampler.step = step_of_score


def check_it_draws(
    sampler: SchedulerMixin, num_steps: int, name: str | None, flags: tuple[str, str] = VALIDATION_FLAGS
) -> None:
    """Take all steps on a single value, as a trial. Raises RecipeError if one fails, or if its result is not finite."""
    takes_generator = "generator" in inspect.signature(sampler.step).parameters
    options = {"generator": torch.Generator()} if takes_generator else {}
    try:
        sampler.set_timesteps(num_steps)
        sample = torch.ones(1, 1, 1, 1) * sampler.init_noise_sigma
        for timestep in sampler.timesteps:
            prediction = torch.zeros_like(sampler.scale_model_input(sample, timestep))
            sample = sampler.step(prediction, timestep, sample, **options, return_dict=False)[0]
        problem = None if sample.isfinite().all() else "the result is not finite"
    except Exception as error:  # diffusers raises whatever it raises
        problem = one_line(error)
    if problem:
        given = f"{flags[0]} {name}" if name else "the model's scheduler"
        raise RecipeError(
            f"{given}: {type(sampler).__name__} cannot draw from predictions of {sampler.config.prediction_type} in "
            f"{num_steps} steps ({problem}): give another {flags[0]}, such as euler, or fewer {flags[1]}"
        )
