"""Rows, images, captions, order and draws become batches, ahead of the loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from transformers import CLIPTokenizer

from sd_recipes.data.captions import CaptionError, choose_caption, tokenize
from sd_recipes.data.draws import Draws, draw
from sd_recipes.data.images import ImageError, fit_image, open_image
from sd_recipes.data.order import MicroBatch, Order, share
from sd_recipes.recipe import DataConfig, RecipeError

RECIPE_ERROR = f"{RecipeError.__module__}.{RecipeError.__qualname__}"
READ_AHEAD = 2  # micro-batches, of the reading thread and of each worker process


@dataclass(frozen=True)
class Batch:
    """A micro-batch with everything the training step needs: the step is a function of it and the weights."""

    pixel_values: torch.Tensor  # (B, 3, H, W) uint8
    input_ids: torch.Tensor  # (B, L) int64
    timesteps: torch.Tensor  # (B,) int64
    noise: torch.Tensor  # (B, C, h, w) float32, the noise offset included
    input_noise: torch.Tensor  # (B, C, h, w) float32: the noise, with the input perturbation on top
    posterior_noise: torch.Tensor  # (B, C, h, w) float32
    plan: MicroBatch

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, copied without waiting for it."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by the loader: copies from pinned memory need not wait."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped: dict[str, Any] = {
            name: function(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()
        }
        return Batch(**mapped)


class BatchBuilder(torch.utils.data.Dataset):
    """Builds the batch of a MicroBatch; runs in the loader's workers.

    latent_shape is (C, h, w). Raises RecipeError naming the row whose image or caption is unusable.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        tokenizer: CLIPTokenizer,
        config: DataConfig,
        *,
        seed: int,
        latent_shape: tuple[int, int, int],
        num_train_timesteps: int,
        noise_offset: float = 0.0,
        input_perturbation: float = 0.0,
    ) -> None:
        self.rows = rows
        # Its own: a fast tokenizer keeps padding and truncation as state, and this one is used from another thread
        # than the pipeline's, which would meet "Already borrowed" (huggingface/transformers#47085).
        self.tokenizer = copy.deepcopy(tokenizer)
        self.config = config
        self.seed = seed
        self.latent_shape = latent_shape
        self.num_train_timesteps = num_train_timesteps
        self.noise_offset = noise_offset
        self.input_perturbation = input_perturbation

    def __getitem__(self, plan: MicroBatch) -> Batch:
        drawn = [
            draw(
                self.seed,
                int(position),
                stratum=int(stratum),
                global_batch_size=plan.global_batch_size,
                latent_shape=self.latent_shape,
                num_train_timesteps=self.num_train_timesteps,
                perturbed=bool(self.input_perturbation),
            )
            for position, stratum in zip(plan.positions, plan.strata, strict=True)
        ]
        columns = self.rows[plan.rows.tolist()]
        pixels, captions = [], []
        for number, row in enumerate(plan.rows):
            try:
                pixels.append(self._pixels(columns[self.config.image_column][number], drawn[number]))
                captions.append(self._caption(columns[self.config.caption_column][number], drawn[number]))
            except (ImageError, CaptionError) as error:
                raise RecipeError(f"row {row} of the data set: {error}") from error
        noise = np.stack([sample.noise for sample in drawn])  # (B, C, h, w)
        if self.noise_offset:
            noise += self.noise_offset * np.stack([sample.offset_noise for sample in drawn])
        input_noise = noise
        if self.input_perturbation:
            perturbation = [s.perturbation_noise for s in drawn if s.perturbation_noise is not None]
            input_noise = noise + self.input_perturbation * np.stack(perturbation)
        return Batch(
            pixel_values=torch.from_numpy(np.stack(pixels)),
            input_ids=tokenize(self.tokenizer, captions),
            timesteps=torch.tensor([sample.timestep for sample in drawn]),
            noise=torch.from_numpy(noise),
            input_noise=torch.from_numpy(input_noise),
            posterior_noise=torch.from_numpy(np.stack([sample.posterior_noise for sample in drawn])),
            plan=plan,
        )

    def _pixels(self, encoded: dict[str, Any], drawn: Draws) -> np.ndarray:
        config = self.config
        return fit_image(
            open_image(encoded, at_least=config.resolution),
            config.resolution,
            interpolation=config.image_interpolation_mode,
            crop_u=(0.5, 0.5) if config.center_crop else drawn.crop_u,
            flip=config.random_flip and drawn.flip_u < 0.5,
        )

    def _caption(self, value: Any, drawn: Draws) -> str:
        caption = choose_caption(value, drawn.caption_u)
        return "" if drawn.dropout_u < self.config.caption_dropout else caption


class TrainingBatches:
    """This process's micro-batches from a position on, built ahead by workers or, without any, by a thread.

    Not sharded again by accelerate: the share of each process is part of the order.
    """

    def __init__(
        self,
        builder: BatchBuilder,
        order: Order,
        *,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self.builder = builder
        self.order = order
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory

    def plans_from(self, samples_seen: int) -> Iterator[MicroBatch]:
        for batch in self.order.batches_from(samples_seen):
            yield from share(batch, rank=self.rank, world_size=self.world_size, micro_batch_size=self.micro_batch_size)

    def __call__(self, samples_seen: int, num_steps: int) -> Iterator[Batch]:
        """The batches of the next `num_steps` global batches."""
        plans = self._plans_of_steps(samples_seen, num_steps)
        if self.num_workers == 0:
            yield from self._read_ahead(plans)
            return
        loader = torch.utils.data.DataLoader(
            self.builder,
            sampler=plans,  # read by the main process only
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=READ_AHEAD,
            pin_memory=self.pin_memory,
        )
        try:
            yield from loader
        except RecipeError as error:
            # The loader puts a worker's traceback into the message; its last line is ours.
            raise RecipeError(str(error).rstrip().splitlines()[-1].removeprefix(f"{RECIPE_ERROR}: ")) from None

    def _plans_of_steps(self, samples_seen: int, num_steps: int) -> Iterator[MicroBatch]:
        for plan in self.plans_from(samples_seen):
            if num_steps <= 0:
                return
            yield plan
            num_steps -= plan.is_last

    def _read_ahead(self, plans: Iterator[MicroBatch]) -> Iterator[Batch]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as reader:
            waiting: list[Future[Batch]] = [reader.submit(self._build, plan) for plan in islice(plans, READ_AHEAD)]
            while waiting:
                batch = waiting.pop(0).result()
                waiting += [reader.submit(self._build, plan) for plan in islice(plans, 1)]
                yield batch

    def _build(self, plan: MicroBatch) -> Batch:
        batch = self.builder[plan]
        return batch.pin_memory() if self.pin_memory else batch
