"""From a number in [0, 1) to a timestep, by the inverse of a distribution function: strata stay strata."""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from sd_recipes.errors import RecipeError
from sd_recipes.recipe import ObjectiveConfig

LEAST_SHARE = 1e-6  # of a distribution, in the timesteps that are trained: below it, its tails are rounding errors


def trained_timesteps(num_train_timesteps: int, config: ObjectiveConfig) -> range:
    """Of a model with so many, those that are trained."""
    end = num_train_timesteps if config.max_timestep is None else config.max_timestep
    return range(config.min_timestep, end)


def uniform(u: float, num_train_timesteps: int, config: ObjectiveConfig) -> int:
    """Every trained timestep as often."""
    trained = trained_timesteps(num_train_timesteps, config)
    return trained.start + int(u * len(trained))


def logit_normal(u: float, num_train_timesteps: int, config: ObjectiveConfig) -> int:
    """t / T is logit-normal (Esser et al. 2024, eq. 19), cut off to the trained timesteps."""
    trained = trained_timesteps(num_train_timesteps, config)
    start, end = _logit_normal_cdf(trained, num_train_timesteps, config)
    quantile = min(max(start + u * (end - start), np.finfo(float).tiny), 1 - np.finfo(float).epsneg)
    logit = NormalDist(config.logit_mean, config.logit_std).inv_cdf(quantile)
    return int(num_train_timesteps / (1 + np.exp(-logit)))


def biased(u: float, num_train_timesteps: int, config: ObjectiveConfig) -> int:
    """Uniform, but for some timesteps that are drawn more often, as diffusers' SDXL script has it."""
    trained, favoured = trained_timesteps(num_train_timesteps, config), favoured_timesteps(num_train_timesteps, config)
    shares = _shares_up_to(trained, favoured, config.timestep_bias_multiplier)
    return trained.start + int(np.searchsorted(shares, u, side="right"))


def favoured_timesteps(num_train_timesteps: int, config: ObjectiveConfig) -> range:
    """Of a model with so many, those that --timestep_bias_strategy names."""
    number = int(config.timestep_bias_portion * num_train_timesteps)
    return {
        "none": range(0),
        "earlier": range(number),
        "later": range(num_train_timesteps - number, num_train_timesteps),
        "range": range(config.timestep_bias_begin, config.timestep_bias_end),
    }[config.timestep_bias_strategy]


@functools.lru_cache
def _shares_up_to(trained: range, favoured: range, multiplier: float) -> np.ndarray:
    """For each trained timestep, the share of draws that lie below it or in it."""
    weights = np.array([multiplier if timestep in favoured else 1.0 for timestep in trained])
    return np.cumsum(weights) / weights.sum()


TIMESTEPS: dict[str, Callable[[float, int, ObjectiveConfig], int]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "biased": biased,
}


def timestep_at(u: float, num_train_timesteps: int, config: ObjectiveConfig) -> int:
    """The timestep below which a share u in [0, 1) of a run's timesteps lies."""
    trained = trained_timesteps(num_train_timesteps, config)
    distribution = config.timestep_sampling if config.timestep_bias_strategy == "none" else "biased"
    timestep = TIMESTEPS[distribution](u, num_train_timesteps, config)
    return min(max(timestep, trained.start), trained.stop - 1)  # rounding may lead out


def check_timesteps(num_train_timesteps: int, config: ObjectiveConfig) -> None:
    """Raises RecipeError if the model lacks some of the timesteps to train, or if these are never drawn."""
    trained = trained_timesteps(num_train_timesteps, config)
    if config.max_timestep is not None and config.max_timestep > num_train_timesteps:
        raise RecipeError(
            f"--max_timestep {config.max_timestep} is over the model's {num_train_timesteps} timesteps: lower it"
        )
    if not trained:
        raise RecipeError(
            f"--min_timestep {config.min_timestep} is over the model's last one, {num_train_timesteps - 1}: lower it"
        )
    if config.timestep_bias_strategy == "range" and config.timestep_bias_end > num_train_timesteps:
        raise RecipeError(
            f"--timestep_bias_end {config.timestep_bias_end} is over the model's {num_train_timesteps} timesteps: "
            "lower it"
        )
    if config.timestep_sampling == "logit_normal":
        start, end = _logit_normal_cdf(trained, num_train_timesteps, config)
        if end - start < LEAST_SHARE:
            raise RecipeError(
                f"--logit_mean {config.logit_mean} with --logit_std {config.logit_std} draws next to no timestep from "
                f"{trained.start} to {trained.stop - 1}: bring the mean nearer to 0, or raise the deviation"
            )


def _logit_normal_cdf(trained: range, num_train_timesteps: int, config: ObjectiveConfig) -> tuple[float, float]:
    """Shares of the whole distribution below the trained timesteps, and below their end."""

    def share_below(timestep: int) -> float:
        if timestep in (0, num_train_timesteps):
            return timestep / num_train_timesteps
        logit = np.log(timestep / (num_train_timesteps - timestep))
        return NormalDist(config.logit_mean, config.logit_std).cdf(logit)

    return share_below(trained.start), share_below(trained.stop)
