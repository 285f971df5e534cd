"""Scores of drawn pictures against real ones, and which training pictures they are nearest to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sd_recipes.evaluation.bootstrap import Score
from sd_recipes.evaluation.feature_scores import (
    authpct,
    cmmd,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from sd_recipes.evaluation.neighbours import nearest

# Names in evaluation.json, and what people call them.
SCORES = {
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "KID",
    "cmmd": "CMMD",
    "precision": "precision",
    "recall": "recall",
    "authpct": "AuthPct",
}


@dataclass(frozen=True)
class Neighbours:
    """For each drawn picture, its nearest training picture."""

    numbers: np.ndarray  # (N,) of the training pictures
    ratios: np.ndarray  # (N,) how near, over how near that one's own nearest is: below 1 is a copy, by AuthPct


def score_features(
    drawn: np.ndarray, real: np.ndarray, training: np.ndarray
) -> tuple[dict[str, Score], dict[str, str]]:
    """Scores by name, of features (N, D) of drawn, held-out and training pictures; and why others are missing."""
    scores: dict[str, Score] = {}
    missing: dict[str, str] = {}
    against_real: dict[str, Callable[[np.ndarray, np.ndarray], Score]] = {
        "frechet_distance": frechet_distance, "kernel_distance": kernel_distance, "cmmd": cmmd,
    }  # fmt: skip
    for name, function in against_real.items():
        try:
            scores[name] = function(drawn, real)
        except ValueError as error:
            missing[name] = str(error)
    try:
        scores["precision"], scores["recall"] = precision_recall(drawn, real)
    except ValueError as error:
        missing["precision"] = missing["recall"] = str(error)
    try:
        scores["authpct"] = authpct(drawn, training)
    except ValueError as error:
        missing["authpct"] = str(error)
    return scores, missing


def nearest_training_pictures(drawn: np.ndarray, training: np.ndarray) -> Neighbours:
    """By features (N, D) and (M, D), M of 2 or more."""
    numbers, distances = nearest(drawn, training, 1)
    radii = nearest(training, training, 1)[1][:, 0]
    numbers = numbers[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.sqrt(distances[:, 0].clip(min=0) / radii[numbers])
    return Neighbours(numbers, np.nan_to_num(ratios, nan=0.0))


def as_json(scores: Mapping[str, Score]) -> dict[str, dict[str, float]]:
    return {name: {"value": each.value, "low": each.low, "high": each.high} for name, each in scores.items()}
