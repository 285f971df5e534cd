"""What a network can predict of x_t = α_t x_0 + σ_t ε, and how one prediction follows exactly from another.

Each prediction p is c x_0 + d ε. Together with x_t it gives both (for v: Salimans & Ho 2022, section 4 and appendix D):

    x_0 = (d x_t - σ_t p) / D,   ε = (α_t p - c x_t) / D,   D = α_t d - σ_t c

so that an error of p times -σ_t / D is the error of x_0. The score is that of q(x_t | x_0), ∇ ln q = -ε / σ_t
(Song & Ermon 2019, section 4.2; Song et al. 2021, section 3.3). This file imports nothing of the project, and its
formulas hold for NumPy's arrays and torch's tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# (c, d) from α_t and σ_t, by diffusers' names, in which the score has none.
PREDICTIONS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "epsilon": lambda signal, sigma: (0, 1),
    "v_prediction": lambda signal, sigma: (-sigma, signal),
    "sample": lambda signal, sigma: (1, 0),
    "score": lambda signal, sigma: (0, -1 / sigma),
}
OF_NOISE_ALONE = ("epsilon", "score")  # where x_t is pure noise, they say nothing of x_0


def convert(prediction: Any, noisy_latents: Any, given: str, wanted: str, signal: Any, sigma: Any) -> Any:
    """The prediction `wanted` that follows from the prediction `given` and x_t, both (B, …), at α_t and σ_t.

    α_t and σ_t are numbers, or of a shape that scales (B, …). Not finite where α_t is 0 and ε or the score is given.
    """
    in_latents, in_noise = PREDICTIONS[given](signal, sigma)
    divisor = signal * in_noise - sigma * in_latents
    latents = (in_noise * noisy_latents - sigma * prediction) / divisor
    noise = (signal * prediction - in_latents * noisy_latents) / divisor
    in_latents, in_noise = PREDICTIONS[wanted](signal, sigma)
    return in_latents * latents + in_noise * noise


def error_of_latents(given: str, signal: Any, sigma: Any) -> Any:
    """What an error of the prediction `given` is to be multiplied by to be the error of the x_0 that it implies."""
    in_latents, in_noise = PREDICTIONS[given](signal, sigma)
    return -sigma / (signal * in_noise - sigma * in_latents)
