"""How far a network's x̂_0 is from x_0, at given timesteps and with noise that belongs to the image."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sd_recipes.evaluation.diffusion_process import DiffusionProcess, NoBound
from sd_recipes.evaluation.timestep_sampling import TimestepSampling, knots, smooth

# One counter of the generator per purpose: a pilot's noise is not that of the estimate whose timesteps it chooses.
ALL_TIMESTEPS, SAMPLED_TIMESTEPS, CHOICE, PILOT = range(1, 5)


@dataclass(frozen=True, eq=False)
class SquaredErrors:
    """All that is measured of a network, from which its bound follows with any variance."""

    image_numbers: np.ndarray  # (N,), that of each image
    mean_squares: np.ndarray  # (N,): ‖x_0‖² / D
    timesteps: np.ndarray  # (N, num_samples, evaluations)
    values: np.ndarray  # ‖x_0 - x̂_0‖² / D at each of them
    dimensions: int  # D of an image's latent
    sampling: TimestepSampling | None  # by which the timesteps were drawn; None for all, or chosen ones

    @classmethod
    def joined(cls, parts: Sequence[SquaredErrors]) -> SquaredErrors:
        """Those of images that were dealt out, in the order of their numbers. There has to be a part."""
        order = np.argsort(np.concatenate([part.image_numbers for part in parts]), kind="stable")

        def column(name: str) -> np.ndarray:
            return np.concatenate([getattr(part, name) for part in parts])[order]

        return replace(
            parts[0],
            image_numbers=column("image_numbers"),
            mean_squares=column("mean_squares"),
            timesteps=column("timesteps"),
            values=column("values"),
        )

    def by_timestep(self, num_timesteps: int) -> np.ndarray:
        """(N, num_samples, T): m_t; or, of drawn timesteps, unbiased estimates, 0 where nothing was drawn."""
        if self.sampling is None:
            return self.values
        found = np.zeros((*self.values.shape[:2], num_timesteps))
        images, samples = np.arange(found.shape[0])[:, None, None], np.arange(found.shape[1])[:, None]
        np.add.at(found, (images, samples, self.timesteps), self.sampling.weights[self.timesteps] * self.values)
        return found

    def mean(self, num_timesteps: int) -> np.ndarray:
        """(T,): m_t over images and noise; of drawn or chosen timesteps, a smooth curve through them."""
        if self.values.shape[2] == num_timesteps and self.sampling is None:
            return self.values.mean(axis=(0, 1))
        return smooth(self.timesteps, self.values, num_timesteps)


class Denoiser:
    """A network, the latents that it is tried on, and what else it is told of each.

    Draws come from a counter-based generator (Philox, Salmon et al. 2011) keyed by the seed and the image's number, so
    that they do not depend on the batch, the process or the device. Raises ValueError as `variational_bound`.
    """

    def __init__(
        self,
        predict: Callable[..., Tensor],
        latents: Tensor,
        process: DiffusionProcess,
        prediction_type: str,
        *,
        seed: int,
        batch_size: int,
        conditioning: Mapping[str, Tensor] | None,
        image_numbers: Sequence[int] | None,
    ) -> None:
        self.predict, self.latents, self.process = predict, checked(latents), process
        self.conditioning = conditioning or {}
        self.seed = operator.index(seed)
        self.image_numbers = list(range(len(latents)) if image_numbers is None else map(operator.index, image_numbers))
        entries = {"image_numbers": len(self.image_numbers)} | {k: len(v) for k, v in self.conditioning.items()}
        for name, number in entries.items():
            if number != len(latents):
                raise ValueError(f"{name} has {number} entries for {len(latents)} latents: give one for each")
        if not all(0 <= each < 2**64 for each in (self.seed, *self.image_numbers)):
            raise ValueError("seed or image_numbers are out of range: give numbers from 0 to 2**64 - 1")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give 1 or more")
        self.batch_size = batch_size
        tables = (process.signal, process.sigma, *process.prediction(prediction_type))
        # Float32 like the network, now that all differences of ᾱ are taken.
        self.tables = [torch.from_numpy(table).float().to(latents.device) for table in tables]

    def generator(self, image: int, sample: int, number: int, purpose: int) -> np.random.Generator:
        """A generator that depends only on the seed, the number of the image in that place, and the other arguments."""
        key = np.array([self.seed, self.image_numbers[image]], dtype=np.uint64)
        counter = np.array([0, sample, number, purpose], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def at_all_timesteps(self, num_samples: int) -> SquaredErrors:
        """Of every image, `num_samples` times with other noise."""
        shape = (len(self.latents), num_samples, len(self.process))
        return self._measured(np.broadcast_to(np.arange(shape[-1]), shape), ALL_TIMESTEPS)

    def at_sampled_timesteps(self, sampling: TimestepSampling, num_samples: int) -> SquaredErrors:
        """Of every image, `num_samples` times at timesteps and with noise of its own.

        Raises ValueError for a sampling of another number of timesteps.
        """
        if len(sampling.probabilities) != len(self.process):
            raise ValueError(
                f"timesteps were chosen among {len(sampling.probabilities)}, but the scheduler has {len(self.process)}"
                ": give a number, and they are chosen anew"
            )
        timesteps = np.array(
            [
                [sampling.draw(self.generator(image, sample, 0, CHOICE).random()) for sample in range(num_samples)]
                for image in range(len(self.latents))
            ]
        )
        return self._measured(timesteps, SAMPLED_TIMESTEPS, sampling, antithetic=True)

    def at_few_timesteps(self, num_images: int) -> SquaredErrors:
        """Of the first images, at the `knots`: enough to choose timesteps by."""
        tried = knots(len(self.process))
        return self._measured(np.broadcast_to(tried, (min(len(self.latents), num_images), 1, len(tried))), PILOT)

    def _measured(
        self, timesteps: np.ndarray, purpose: int, sampling: TimestepSampling | None = None, antithetic: bool = False
    ) -> SquaredErrors:
        number = len(timesteps)
        return SquaredErrors(
            np.array(self.image_numbers[:number], dtype=np.uint64),
            self.latents[:number].cpu().double().square().flatten(1).mean(dim=1).numpy(),
            timesteps,
            self.squared_errors(timesteps, purpose, antithetic=antithetic),
            self.latents[0].numel(),
            sampling,
        )

    @torch.no_grad()
    def squared_errors(self, timesteps: np.ndarray, purpose: int, *, antithetic: bool = False) -> np.ndarray:
        """‖x_0 - x̂_0‖² / D at each of `timesteps`, (n, samples, evaluations) for the first n images; float64.

        Every evaluation has noise of its own; or, if `antithetic`, every second one the opposite of the one before.
        Raises NoBound if a prediction is not of the latents' shape, or not finite.
        """
        flat, errors = timesteps.reshape(-1), np.empty(timesteps.size)
        for start in range(0, len(flat), self.batch_size):
            part = np.arange(start, min(start + self.batch_size, len(flat)))
            images, samples, numbers = np.unravel_index(part, timesteps.shape)
            places = zip(images.tolist(), samples.tolist(), numbers.tolist(), strict=True)
            noise = np.stack([self._noise(*place, purpose, antithetic) for place in places])
            errors[part] = self._errors_of_batch(images, flat[part], noise)
        return errors.reshape(timesteps.shape)

    def _noise(self, image: int, sample: int, number: int, purpose: int, antithetic: bool) -> np.ndarray:
        """ε of one evaluation, of a latent's shape, float32."""
        generator = self.generator(image, sample, number // 2 if antithetic else number, purpose)
        noise = generator.standard_normal(tuple(self.latents.shape[1:]), dtype=np.float32)
        return -noise if antithetic and number % 2 else noise

    def _errors_of_batch(self, images: np.ndarray, timesteps: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """(B,) squared errors of images at timesteps, both (B,), with noise (B, …)."""
        rows, at, epsilon = (torch.from_numpy(each).to(self.latents.device) for each in (images, timesteps, noise))
        latents = self.latents[rows]
        shape = (-1, *[1] * (latents.ndim - 1))  # (B, 1, …), which scales (B, …)
        signal, sigma, in_latents, in_noise, factor = (table[at].reshape(shape) for table in self.tables)
        conditioning = {name: each[rows] for name, each in self.conditioning.items()}
        prediction = self.predict(signal * latents + sigma * epsilon, at, **conditioning)
        if not isinstance(prediction, Tensor):
            raise NoBound(f"predict returned a {type(prediction).__name__}: let it return the tensor in it")
        if prediction.shape != latents.shape:
            raise NoBound(
                f"predict returned {tuple(prediction.shape)} for latents {tuple(latents.shape)}: let it return one "
                "prediction for each, without guidance and without a learned variance"
            )
        errors = factor * (prediction.float() - (in_latents * latents + in_noise * epsilon))
        # Float64 on the host: Apple's GPUs lack it.
        squared = errors.square().flatten(1).mean(dim=1).cpu().double().numpy()
        if not np.isfinite(squared).all():
            timestep = timesteps[~np.isfinite(squared)][0]
            raise NoBound(f"predict's result is not finite at timestep {timestep}: run the network in float32")
        return squared


def checked(latents: Tensor) -> Tensor:
    """As float32. Raises NoBound if they are not (N, …), with something in them, and finite."""
    if not isinstance(latents, Tensor) or latents.ndim < 2 or not latents.numel():
        what = f"of shape {tuple(latents.shape)}" if isinstance(latents, Tensor) else f"a {type(latents).__name__}"
        raise NoBound(f"latents are {what}: give a tensor (N, C, h, w), with one image or more")
    latents = latents.detach().float()
    if bad := (~latents.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist():
        raise NoBound(f"latents[{bad[0]}] is not finite ({len(bad)} of {len(latents)} are not): leave such images out")
    return latents
