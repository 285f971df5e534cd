"""(seed, position) to a sample's random draws.

Drawn from a counter-based generator (Philox, Salmon et al. 2011) keyed by the seed and the sample's
position in the run, so that they do not depend on the process, micro-batch, worker or device that
handles the sample, and a resumed run needs no generator state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sd_recipes.data.timesteps import timestep_at
from sd_recipes.recipe import ObjectiveConfig

PLAIN = ObjectiveConfig()  # of what is no training, such as the held-out loss

# One counter per purpose: a setting that needs one more draw leaves all the others unchanged.
CHOICES, NOISE, POSTERIOR, OFFSET, PERTURBATION, TAGS, COARSE, DROPOUT, TAG_DROPOUT, WILDCARDS = range(1, 11)


@dataclass(frozen=True)
class Draws:
    """The random draws of one sample; noises are standard normal, float32."""

    seed: int
    position: int
    timestep: int
    timestep_u: float  # in [0, 1): the share of all timesteps that lie below it, stratified
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

    def tag_dropout_us(self, num_tags: int) -> np.ndarray:
        """One number in [0, 1) per tag, (num_tags,), by which it is left out; drawn on demand, like the keys."""
        return generator(self.seed, self.position, TAG_DROPOUT).random(num_tags)

    def wildcard_us(self) -> Iterator[float]:
        """Numbers in [0, 1), one for each wildcard in the order in which they end; drawn on demand, like the keys."""
        draws = generator(self.seed, self.position, WILDCARDS)
        while True:
            yield draws.random()

    def coarse_noise(self, level: int, shape: tuple[int, ...]) -> np.ndarray:
        """Noise for a level of the pyramid whose level above has `shape` (C, h, w): sides 2 to 4 times shorter, from 1.

        Drawn on demand, like the tags' keys.
        """
        draws = generator(self.seed, self.position, COARSE, part=level)
        factor = draws.uniform(2, 4)
        channels, *sides = shape
        return draws.standard_normal((channels, *(max(1, int(side / factor)) for side in sides)), dtype=np.float32)


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
    objective: ObjectiveConfig = PLAIN,
) -> Draws:
    """All draws of the sample at `position`, with latents of `latent_shape` (C, h, w).

    The timestep is one of 0 … num_train_timesteps - 1, distributed as `objective` says, and stratified: the
    sample draws from slice number `stratum` of `global_batch_size` equally probable slices (variance
    reduction, as in Kingma et al. 2021, appendix I.1).
    """
    u = generator(seed, position, CHOICES).random(6)
    timestep_u = (stratum + u[0]) / global_batch_size

    def normal(purpose: int, shape: tuple[int, ...]) -> np.ndarray:
        return generator(seed, position, purpose).standard_normal(shape, dtype=np.float32)

    return Draws(
        seed=seed,
        position=position,
        timestep=timestep_at(timestep_u, num_train_timesteps, objective),
        timestep_u=timestep_u,
        flip_u=u[1],
        crop_u=(u[2], u[3]),
        caption_u=u[4],
        dropout_u=u[5],
        noise=normal(NOISE, latent_shape),
        posterior_noise=normal(POSTERIOR, latent_shape),
        offset_noise=normal(OFFSET, (latent_shape[0], 1, 1)),
        perturbation_noise=normal(PERTURBATION, latent_shape) if objective.input_perturbation else None,
    )
