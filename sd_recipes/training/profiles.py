"""Averages by their length: power-function profiles, and one profile as a sum of others.

From Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C.

**Profile.** The average of the weights θ after t updates is ∫ p(τ) θ(τ) dτ over 0 < τ ≤ t, with

    p(τ) = (γ + 1) τ^γ / t^(γ + 1).

Its shape is the same at all t: τ/t has a beta distribution, with mean (γ + 1) / (γ + 2) and standard deviation

    length = √((γ + 1) / (γ + 3)) / (γ + 2),

the relative width (σ_rel in the paper). It falls from 0.2887 = 1/√12 for γ = 0, the plain mean, towards 0.

**Update.** Where θ is θ_k for k - 1 < τ ≤ k, the integral is a sum with the weights (k/t)^(γ + 1) - ((k-1)/t)^(γ + 1),
and

    average(t) = β average(t - 1) + (1 - β) θ_t,    β(t) = (1 - 1/t)^(γ + 1)

makes exactly this sum: from t - 1 to t all earlier weights shrink by ((t-1)/t)^(γ + 1), and the new one is 1 - β(t).
Since β(1) = 0, nothing is left of the weights before the first update.

**diffusers' warm-up** is γ = 8, of length √(9/11)/10 = 0.0905. Its decay is 0 at the first update and n/(n + 9) at
update n > 1, so that θ_k, k > 1, has the weight (9/(k + 9)) ∏ n/(n + 9), n = k+1 … t, which telescopes to

    9 (k+1)(k+2) … (k+8) / ((t+1)(t+2) … (t+9)).

The product in the numerator is that of (k + 9/2)² - j²/4 for j = 1, 3, 5, 7, or s^8 (1 - 21/s² + …) with s = k + 9/2.
In the profile, the middle of θ_k's interval is τ = k - 1/2. So diffusers' average is the one of γ = 8 on a clock that
is 5 updates ahead: with s = n + 5, the logarithms of n/(n + 9) and of β(s) are both -9/s - 9/(2s²) + O(1/s³), and the
decays differ by 60/s³ + O(1/s⁴). On its own clock, n/(n + 9) and β(n) differ by 45/n² + O(1/n³).

**Sum of others.** Profiles that end at different t are not multiples of each other, so a few averages that were kept at
several t span profiles of other lengths. The coefficients c minimize ∫ (Σ c_i p_i - p)² dτ: linear equations with the
inner products of profiles, which have a closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def gamma_of(length: float) -> float:
    """The exponent γ > 0 of the profile of a relative width 0 < `length` < 1/√12.

    With x = γ + 2 and r = length⁻², the width's formula is x³ + x² - r x + r = 0, which has three real roots for these
    lengths; γ is that of the largest (Viète's trigonometric formula).
    """
    r = length**-2
    # x = y - 1/3 gives y³ + p y + q = 0.
    p, q = -(r + 1 / 3), 2 / 27 + 4 * r / 3
    y = 2 * math.sqrt(-p / 3) * math.cos(math.acos(3 * q / (2 * p) * math.sqrt(-3 / p)) / 3)
    return y - 1 / 3 - 2


def length_of(gamma: float) -> float:
    """The relative width of the profile with the exponent `gamma` ≥ 0."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def decay_at(update: int, gamma: float) -> float:
    """β of an update, counted from 1: the fraction that stays of the average before it."""
    return (1 - 1 / update) ** (gamma + 1)


def diffusers_decay_at(update: int, most: float) -> float:
    """diffusers' decay of an update, counted from 1, which does not exceed `most`."""
    return 0.0 if update == 1 else min(most, update / (9 + update))


@dataclass(frozen=True)
class Profile:
    """How an average weighs the weights of a run: the exponent, and the number of updates behind it."""

    gamma: float
    updates: int


@dataclass(frozen=True)
class Combination:
    """A profile as a sum of others."""

    coefficients: np.ndarray  # (number of others,) float64; their sum is 1
    error: float  # √(∫ (sum - profile)² / ∫ profile²)


def inner_products(one: Sequence[Profile], other: Sequence[Profile]) -> np.ndarray:
    """(len(one), len(other)): ∫ p q dτ of every two profiles, over the times at which both are not 0.

    That is (γ_p + 1)(γ_q + 1) / (γ_p + γ_q + 1) · (s/t)^γ / t, where the profile that ends later, at t, has the
    exponent γ, and the other one ends at s.
    """
    gamma_p, end_p = (np.array([[getattr(each, name)] for each in one], float) for name in ("gamma", "updates"))
    gamma_q, end_q = (np.array([[getattr(each, name) for each in other]], float) for name in ("gamma", "updates"))
    later = np.maximum(end_p, end_q)
    gamma = np.where(end_p > end_q, gamma_p, gamma_q)
    scale = (gamma_p + 1) * (gamma_q + 1) / (gamma_p + gamma_q + 1)
    return scale * (np.minimum(end_p, end_q) / later) ** gamma / later


def combine(stored: Sequence[Profile], wanted: Profile) -> Combination:
    """The sum of `stored` profiles, with coefficients that sum to 1, that is nearest to `wanted`.

    Without that condition the weights would shrink by what the sum lacks, and they are far larger than their movement,
    which is all that profiles differ in. The equations are solved for profiles of norm 1. Of many, neighbours are
    nearly equal: two profiles at each of 1,000 ends have the condition number 1e10, which float64 bears.
    """
    products = inner_products(stored, stored)
    norms = np.sqrt(np.diag(products))
    with_wanted = inner_products(stored, [wanted])[:, 0]
    right = np.stack([with_wanted / norms, 1 / norms], axis=1)
    # The second column is the direction in which the sum of coefficients changes at the least cost (Lagrange).
    nearest, direction = np.linalg.lstsq(products / np.outer(norms, norms), right, rcond=None)[0].T / norms
    coefficients = nearest + direction * (1 - nearest.sum()) / direction.sum()
    norm = inner_products([wanted], [wanted])[0, 0]
    distance = coefficients @ products @ coefficients - 2 * coefficients @ with_wanted + norm
    return Combination(coefficients, math.sqrt(max(0.0, distance) / norm))
