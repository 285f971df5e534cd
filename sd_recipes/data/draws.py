"""(seed, position) to a sample's random draws.

Drawn from a counter-based generator (Philox, Salmon et al. 2011) keyed by the seed and the sample's
position in the run, so that they do not depend on the process, micro-batch, worker or device that
handles the sample, and a resumed run needs no generator state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# One counter per purpose: a setting that needs one more draw leaves all the others unchanged.
CHOICES, NOISE, POSTERIOR, OFFSET, PERTURBATION, TAGS = range(1, 7)


@dataclass(frozen=True)
class Draws:
    """The random draws of one sample; noises are standard normal, float32."""

    seed: int
    position: int
    timestep: int
    flip_u: float
    crop_u: tuple[float, float]
    caption_u: float
    dropout_u: float
    noise: np.ndarray  # (C, h, w)
    posterior_noise: np.ndarray  # (C, h, w): which latent of the VAE's posterior
    offset_noise: np.ndarray  # (C, 1, 1)
    perturbation_noise: np.ndarray | None  # (C, h, w), drawn only where it is needed

    def tag_keys(self, num_tags: int) -> np.ndarray:
        """One sort key in [0, 1) per tag, (num_tags,); drawn on demand, since most captions need none."""
        return generator(self.seed, self.position, TAGS).random(num_tags)


def generator(seed: int, number: int, purpose: int, part: int = 0) -> np.random.Generator:
    """A generator that depends only on its arguments."""
    key = np.array([seed, number], dtype=np.uint64)
    counter = np.array([0, 0, part, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def draw(
    seed: int,
    position: int,
    *,
    stratum: int,
    global_batch_size: int,
    latent_shape: tuple[int, int, int],
    num_train_timesteps: int,
    perturbed: bool = False,
) -> Draws:
    """All draws of the sample at `position`, with latents of `latent_shape` (C, h, w).

    The timestep is uniform over 0 … num_train_timesteps - 1, stratified: the sample draws from slice
    number `stratum` of `global_batch_size` equal slices (variance reduction, as in Kingma et al. 2021,
    appendix I.1).
    """
    u = generator(seed, position, CHOICES).random(6)

    def normal(purpose: int, shape: tuple[int, ...]) -> np.ndarray:
        return generator(seed, position, purpose).standard_normal(shape, dtype=np.float32)

    return Draws(
        seed=seed,
        position=position,
        timestep=min(int((stratum + u[0]) / global_batch_size * num_train_timesteps), num_train_timesteps - 1),
        flip_u=u[1],
        crop_u=(u[2], u[3]),
        caption_u=u[4],
        dropout_u=u[5],
        noise=normal(NOISE, latent_shape),
        posterior_noise=normal(POSTERIOR, latent_shape),
        offset_noise=normal(OFFSET, (latent_shape[0], 1, 1)),
        perturbation_noise=normal(PERTURBATION, latent_shape) if perturbed else None,
    )
