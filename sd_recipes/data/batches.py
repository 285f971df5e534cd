"""Rows, images, captions, order and draws become batches, ahead of the loop."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any

import datasets
import numpy as np
import torch

from sd_recipes.data.bad_rows import BadRow, row_name
from sd_recipes.data.captions import CaptionError, caption_columns, make_caption
from sd_recipes.data.columns import LATENT_MASK, SIZE_COLUMNS
from sd_recipes.data.draws import PLAIN, Draws, draw
from sd_recipes.data.images import ImageError, fit_image, open_with_size, place_crop
from sd_recipes.data.latent_store import END, SHARED_MEMORY, LatentStore, check_provenance, moments_of, row_key
from sd_recipes.data.masks import check_shows_white, fit_mask, hides_all, mask_of, mirrored, own_mask, weights_of_masks
from sd_recipes.data.noise import training_noise
from sd_recipes.data.order import MicroBatch
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import CaptionConfig, ObjectiveConfig, Recipe
from sd_recipes.runtime.cores import num_local_processes
from sd_recipes.runtime.host_memory import pinned_like
from sd_recipes.runtime.signals import outlive_signals

RECIPE_ERROR = f"{RecipeError.__module__}.{RecipeError.__qualname__}"
SMALL = 2**14  # bytes of a tensor that a worker sends through its pipe: sharing memory takes longer
READ_AHEAD = 2  # micro-batches, of the reading thread and of each worker process

Row = dict[str, Any]
Encode = Callable[[torch.Tensor], torch.Tensor]  # uint8 pixels (U, 3, H, W) to moments (U, 2C, h, w)
Plans = Callable[[int, dict[str, Any] | None], Iterator[MicroBatch]]  # from (samples seen, state of the stream) on


@dataclass(frozen=True)
class Batch:
    """A micro-batch with everything the training step needs: the step is a function of it and the weights.

    It has the pixels of each image or, where they are known already, its moments.
    """

    pixels: torch.Tensor  # (U, 3, H, W) uint8, of the rows in `to_encode`
    to_encode: torch.Tensor  # (U,) int64, ascending: the places in the batch whose moments are still to be made
    moments: torch.Tensor | None  # (B, 2C, h, w) float32 of the other rows; None if there are none
    flip: torch.Tensor  # (B,) bool: still to be mirrored, where the store keeps both
    input_ids: torch.Tensor  # (B, L) int64
    timesteps: torch.Tensor  # (B,) int64
    timestep_u: torch.Tensor  # (B,) float64 in [0, 1): the share of the timesteps' distribution below each of them
    noise: torch.Tensor  # (B, C, h, w) float32, pyramid and offset included
    input_noise: torch.Tensor | None  # (B, C, h, w) float32: the noise with the input perturbation on top
    posterior_noise: torch.Tensor  # (B, C, h, w) float32
    # What some families condition on (Podell et al. 2023, section 2.2), in pixels as (height, width) or (top, left);
    # zeros for a row that cannot be used.
    original_size: torch.Tensor  # (B, 2) int64: of the picture in its file, upright
    crop_corner: torch.Tensor  # (B, 2) int64: of the crop in the scaled picture, mirrored where that is
    target_size: torch.Tensor  # (B, 2) int64: of the images
    weights: torch.Tensor  # (B,) float32: 0 for a row that cannot be used
    latent_weights: torch.Tensor | None  # (B, 1, h, w) float32: of the errors in an image, by its mask
    names: tuple[str, ...]  # of the B rows, for people
    plan: MicroBatch
    bad: tuple[tuple[str, str], ...]  # (name, reason) of the rows that cannot be used
    records: list[Row]  # of the rows in `to_encode`: what the store keeps besides their moments

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, copied without waiting for it."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def all_moments(self, encode: Encode, store: LatentStore | None = None) -> torch.Tensor:
        """Moments (B, 2C, h, w): those in the batch, and those encoded from its pixels, which the store keeps."""
        if len(self.to_encode) == len(self.weights) and store is None:
            return encode(self.pixels)
        batch_size, channels, height, width = self.noise.shape
        moments = self.moments
        if moments is None:
            moments = torch.zeros(batch_size, 2 * channels, height, width, device=self.noise.device)
        if len(self.to_encode) == 0:
            return moments
        made = encode(self.pixels)
        if store is not None:
            made = store.round(made)
            mirrored = store.round(encode(self.pixels.flip(-1))) if store.keeps_flips else None
            if self.plan.weight:  # otherwise another process trains on the row, and keeps it
                store.put(self.records, made, mirrored)
            if mirrored is not None:
                made = torch.where(self.flip[self.to_encode][:, None, None, None], mirrored, made)
        moments[self.to_encode] = made
        return moments

    def in_parts_of(self, size: int) -> list[Batch]:
        """The same samples with the same draws in batches of at most `size`, as even as possible.

        Views, so that pinned memory stays pinned.
        """
        return self.split(math.ceil(len(self.weights) / size))

    def split(self, number: int) -> list[Batch]:
        """The same samples with the same draws in at most `number` batches, as even as possible."""
        bounds = np.linspace(0, len(self.weights), min(number, len(self.weights)) + 1).round().astype(int).tolist()
        return [self._part(start, end, is_last=end == bounds[-1]) for start, end in itertools.pairwise(bounds)]

    def _part(self, start: int, end: int, *, is_last: bool) -> Batch:
        live = slice(*torch.searchsorted(self.to_encode, torch.tensor([start, end])).tolist())
        plan = replace(
            self.plan,
            rows=self.plan.rows[start:end],
            positions=self.plan.positions[start:end],
            strata=self.plan.strata[start:end],
            is_last=self.plan.is_last and is_last,
            examples=None if self.plan.examples is None else self.plan.examples[start:end],
        )
        own: dict[str, Any] = {"plan": plan, "pixels": self.pixels[live], "records": self.records[live]}
        own["to_encode"] = pinned_like(self.to_encode[live] - start, self.to_encode)
        own["bad"] = self.bad if start == 0 else ()
        for name in (field.name for field in fields(self) if field.name not in own):
            whole = getattr(self, name)
            own[name] = None if whole is None else whole[start:end]
        return Batch(**own)

    def pin_memory(self) -> Batch:
        """Called by the loader: copies from pinned memory do not block."""
        return self._map(torch.Tensor.pin_memory)

    def out_of_shared_memory(self) -> Batch:
        """With pixels of its own: those that a worker made lie in shared memory, of which there may be little."""
        return replace(self, pixels=self.pixels.clone())

    def __reduce__(self) -> tuple[Any, ...]:
        """From a worker to the loop: torch shares each tensor's memory, NumPy arrays are copied."""
        return _unpacked, tuple(
            value.numpy() if isinstance(value, torch.Tensor) and value.nbytes <= SMALL else value
            for value in (getattr(self, field.name) for field in fields(self))
        )

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped: dict[str, Any] = {
            name: function(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()
        }
        return Batch(**mapped)


def _unpacked(*values: Any) -> Batch:
    tensors: list[Any] = [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in values]
    return Batch(*tensors)


class BatchBuilder(torch.utils.data.Dataset):
    """Builds the batch of a MicroBatch; runs in the loader's workers.

    `latent_shape` gives (C, h, w) for an image size (height, width). `rows` is None for a stream, whose
    rows come with the MicroBatch; `objective` says how timesteps and noise are drawn; `provenance` is what the rows'
    moments must have, where rows have moments. A row whose image or caption is unusable gets weight 0 and is named, or
    raises RecipeError if the settings say so.
    """

    def __init__(
        self,
        rows: datasets.Dataset | None,
        config: Recipe,
        *,
        seed: int,
        tokenize: Callable[[list[str], CaptionConfig], torch.Tensor],
        latent_shape: Callable[[tuple[int, int]], tuple[int, int, int]],
        num_train_timesteps: int,
        objective: ObjectiveConfig = PLAIN,
        store: LatentStore | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.rows = rows
        self.provenance = provenance
        self._known_provenances: set[str] = set()
        # A copy: a fast tokenizer keeps padding and truncation as state, and this one is used from another thread
        # than the pipeline's, which would raise "Already borrowed" (huggingface/transformers#47085).
        self.tokenize = copy.deepcopy(tokenize)
        self.config = config
        self.captions = caption_columns(config)
        self.seed = seed
        self.latent_shape = latent_shape
        self.num_train_timesteps = num_train_timesteps
        self.objective = objective
        self.store = store

    def __getitem__(self, plan: MicroBatch) -> Batch:
        if self.store is not None:
            self.store.begin_epoch(plan.epoch)
        latent_shape = self.latent_shape(plan.size)
        drawn = [
            draw(
                self.seed,
                int(position),
                stratum=int(stratum),
                global_batch_size=plan.global_batch_size,
                latent_shape=latent_shape,
                num_train_timesteps=self.num_train_timesteps,
                objective=self.objective,
            )
            for position, stratum in zip(plan.positions, plan.strata, strict=True)
        ]
        images = _Images(plan.size, latent_shape, len(drawn), self.config.cropping)
        masks: list[np.ndarray | None] = [None] * len(drawn)
        captions_config = self._captions_config(plan)
        captions: list[str] = []
        weights = torch.full((len(drawn),), plan.weight)
        bad = []
        names = []
        for place, (number, row) in enumerate(zip(plan.rows.tolist(), self._rows(plan), strict=True)):
            name = row_name(number, row.get(self.config.image_column), streamed=plan.examples is not None)
            names.append(name)
            try:
                caption = self._caption(row, captions_config, drawn[place], name)
                masks[place] = self._add_image(images, place, row, drawn[place])
                if hides_all(masks[place], self.config):  # in this crop: the next one may differ
                    weights[place] = 0
            except BadRow as error:
                bad.append((name, str(error)))
                weights[place] = 0
                caption = ""
                if self.store is None:
                    images.add_pixels(place, np.zeros((3, *plan.size), dtype=np.uint8), (0, 0), {})
            captions.append(caption)
        noise = np.stack([training_noise(sample, self.objective) for sample in drawn])  # (B, C, h, w)
        input_noise = None
        if self.objective.input_perturbation:
            perturbation = [s.perturbation_noise for s in drawn if s.perturbation_noise is not None]
            input_noise = torch.from_numpy(noise + self.objective.input_perturbation * np.stack(perturbation))
        keeps_both = self.store is not None and self.config.random_flip
        return Batch(
            pixels=images.pixels,
            to_encode=torch.tensor(images.to_encode, dtype=torch.int64),
            moments=images.moments,
            flip=torch.tensor([keeps_both and self._flips(sample) for sample in drawn]),
            input_ids=self._input_ids(captions),
            timesteps=torch.tensor([sample.timestep for sample in drawn]),
            timestep_u=torch.tensor([sample.timestep_u for sample in drawn], dtype=torch.float64),
            noise=torch.from_numpy(noise),
            input_noise=input_noise,
            posterior_noise=torch.from_numpy(np.stack([sample.posterior_noise for sample in drawn])),
            original_size=torch.tensor(images.original_sizes),
            crop_corner=torch.tensor([self._crop_corner(images, place, sample) for place, sample in enumerate(drawn)]),
            target_size=torch.tensor([plan.size] * len(drawn)),
            weights=weights,
            latent_weights=weights_of_masks(masks, latent_shape, self.config) if self.config.masked_loss else None,
            names=tuple(names),
            plan=plan,
            bad=tuple(bad),
            records=images.records,
        )

    def _rows(self, plan: MicroBatch) -> list[Row]:
        if plan.examples is not None:
            return list(plan.examples)
        assert self.rows is not None
        columns = self.rows[plan.rows.tolist()]
        return [{name: values[number] for name, values in columns.items()} for number in range(len(plan.rows))]

    def _crop_corner(self, images: _Images, place: int, drawn: Draws) -> tuple[int, int]:
        original_size, size = images.original_sizes[place], images.size
        if 0 in original_size:
            return 0, 0
        (_, width), (top, left) = place_crop(original_size, size, _crop_u(images.croppings[place], drawn))
        return top, width - left - size[1] if self._flips(drawn) else left

    def _flips(self, drawn: Draws) -> bool:
        return self.config.random_flip and drawn.flip_u < 0.5

    def _captions_config(self, plan: MicroBatch) -> CaptionConfig:
        """How captions of a micro-batch are made: in one of every so many epochs, all of them are dropped.

        Prefix and suffix are of what is trained, and not of class pictures, which show what the model knows without.
        """
        changes: dict[str, Any] = {"caption_prefix": None, "caption_suffix": None} if plan.is_class else {}
        every = self.config.caption_dropout_every_n_epochs
        if every and (plan.epoch + 1) % every == 0:
            changes["caption_dropout"] = 1.0
        return self.config.model_copy(update=changes) if changes else self.config

    def _caption(self, row: Row, config: CaptionConfig, drawn: Draws, name: str) -> str:
        try:
            return make_caption(row, config, drawn)
        except CaptionError as error:
            if config.blank_captions == "error":
                raise RecipeError(f"{name}: {error} (--blank_captions error)") from error
            raise

    def _input_ids(self, captions: list[str]) -> torch.Tensor:
        try:
            return self.tokenize(captions, self.config)
        except CaptionError as error:  # --long_captions error
            raise RecipeError(str(error)) from error

    def _check_provenance(self, found: str) -> None:
        """Check that moments that come as data are this VAE's, in every row. Raises RecipeError."""
        if found not in self._known_provenances:
            assert self.provenance is not None
            check_provenance(found, self.provenance)
            self._known_provenances.add(found)

    def _add_image(self, images: _Images, place: int, row: Row, drawn: Draws) -> np.ndarray | None:
        """Add the row's moments where they are known, otherwise its pixels; returns its mask, (h, w) uint8.

        Raises ImageError, and BadRow for the mask.
        """
        flips = self._flips(drawn)
        if "moments" in row:
            self._check_provenance(row["made_by"])
            images.add_moments(place, row, flip=flips)
            return self._kept_mask(row, flip=flips)
        encoded, config = row[self.config.image_column], self.config
        record: Row = {}
        if self.store is not None:
            try:
                key = row_key(encoded, own_mask(row))
            except (OSError, TypeError) as error:
                raise ImageError(f"no image: {error}") from error
            kept = self.store.find(key)
            if kept is not None:
                images.add_moments(place, kept, flip=flips)
                return self._kept_mask(kept, flip=flips)
            record = {"key": key, **{name: row[name] for name in self.captions}}
        height, width = images.size
        image, original_size = open_with_size(
            encoded, at_least=(width, height), max_megapixels=config.max_image_megapixels
        )
        crop_u = _crop_u(config.cropping, drawn)
        mask = mask_of(row, original_size, config) if config.masked_loss else None
        fitted = None
        if mask is not None:
            fitted = fit_mask(mask, original_size, images.size, images.latent_shape[1:], crop_u)
            if config.cropping != "random":
                check_shows_white(fitted, config)
        pixels = fit_image(
            image,
            images.size,
            interpolation=config.image_interpolation_mode,
            crop_u=crop_u,
            flip=flips and self.store is None,
        )
        if self.store is not None and config.masked_loss:
            record[LATENT_MASK] = None if fitted is None else fitted.tobytes()
        images.add_pixels(place, pixels, original_size, record)
        return mirrored(fitted) if flips else fitted

    def _kept_mask(self, row: Row, *, flip: bool) -> np.ndarray | None:
        """The mask (h, w) that is kept with a row's moments."""
        if not self.config.masked_loss or row[LATENT_MASK] is None:
            return None
        shape = self.latent_shape((row["height"], row["width"]))[1:]
        mask = np.frombuffer(row[LATENT_MASK], dtype=np.uint8).reshape(shape)
        return mirrored(mask) if flip else mask


def _crop_u(cropping: str, drawn: Draws) -> tuple[float, float] | None:
    return {"random": drawn.crop_u, "center": (0.5, 0.5), "none": None}[cropping]


class _Images:
    """The pixels or moments of a micro-batch, while they are gathered."""

    def __init__(self, size: tuple[int, int], latent_shape: tuple[int, int, int], number: int, cropping: str) -> None:
        self.size = size
        self.latent_shape = latent_shape
        self.number = number
        self.original_sizes = [(0, 0)] * number
        self.croppings = [cropping] * number  # of moments, as they were made
        self.to_encode: list[int] = []
        self.records: list[Row] = []
        self.moments: torch.Tensor | None = None
        self._pixels: torch.Tensor | None = None

    def add_pixels(self, place: int, pixels: np.ndarray, original_size: tuple[int, int], record: Row) -> None:
        if self._pixels is None:
            self._pixels = torch.empty((self.number, 3, *self.size), dtype=torch.uint8)
            if torch.utils.data.get_worker_info() is not None:
                self._pixels.share_memory_()  # where the loop reads them
        self._pixels.numpy()[len(self.to_encode)] = pixels
        self.to_encode.append(place)
        self.original_sizes[place] = original_size
        sizes = zip(SIZE_COLUMNS, (*self.size, *original_size), strict=True)
        self.records.append({**record, **dict(sizes)})

    def add_moments(self, place: int, row: Row, *, flip: bool) -> None:
        moments = moments_of(row, flip=flip, latent_shape=self.latent_shape)
        if self.moments is None:
            self.moments = torch.zeros(self.number, *moments.shape)
        self.moments[place] = moments
        self.original_sizes[place] = row["original_height"], row["original_width"]
        self.croppings[place] = json.loads(row["made_by"])["crop"]

    @property
    def pixels(self) -> torch.Tensor:
        if self._pixels is None:
            return torch.zeros((0, 3, *self.size), dtype=torch.uint8)
        return self._pixels[: len(self.to_encode)]


def end_workers(iterator: Any) -> None:
    """End the processes of a DataLoader's iterator, and wait for them.

    They ignore the signal with which Python would end them when it exits. torch (2.13) has no public way but to
    delete the iterator, which an error's traceback delays.
    """
    iterator._shutdown_workers()


def room_for_batches(recipe: Recipe) -> int:
    """Micro-batches of pixels that half of the free shared memory has room for, shared by the machine's processes."""
    if not SHARED_MEMORY.is_dir():
        return sys.maxsize
    pixels = 3 * recipe.resolution**2 * recipe.train_batch_size
    return shutil.disk_usage(SHARED_MEMORY).free // (2 * num_local_processes() * pixels)


class TrainingBatches:
    """This process's optimizer steps from a position on, each a list of its micro-batches.

    Built ahead by workers or, without any, by a thread: a whole step ahead, or less where shared memory is short.

    Not sharded again by accelerate: each process's share is part of the plans.
    """

    def __init__(
        self, builder: BatchBuilder, plans: Plans, *, num_workers: int, pin_memory: bool, read_ahead: int = READ_AHEAD
    ) -> None:
        """At least `read_ahead` micro-batches are built ahead; fewer only where shared memory is short."""
        self.builder = builder
        self.plans = plans
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.read_ahead = max(READ_AHEAD, read_ahead)

    def __call__(
        self, samples_seen: int, num_steps: int, stream_state: dict[str, Any] | None = None
    ) -> Generator[list[Batch], None, None]:
        """The micro-batches of the next `num_steps` global batches; close it, since the workers end with it."""
        step: list[Batch] = []
        with closing(self._micro_batches(samples_seen, num_steps, stream_state)) as micro_batches:
            for batch in micro_batches:
                step.append(batch.out_of_shared_memory() if self.num_workers and not self.pin_memory else batch)
                if batch.plan.is_last:
                    yield step
                    step = []

    def _micro_batches(
        self, samples_seen: int, num_steps: int, stream_state: dict[str, Any] | None
    ) -> Generator[Batch, None, None]:
        plans = self._plans_of_steps(self.plans(samples_seen, stream_state), num_steps)
        if self.builder.store is not None:
            if (first := next(plans, None)) is None:
                return
            # An epoch may have fewer micro-batches than there are workers: some begin with a later one.
            self.builder.store.start_at(first.epoch, is_within=samples_seen > 0)
            plans = itertools.chain([first], plans)
        if self.num_workers == 0:
            yield from self._read_ahead(plans)
            return
        failures: list[Exception] = []

        def plans_until_failure() -> Iterator[MicroBatch]:
            try:
                yield from plans
            except Exception as error:  # raised below: in the loader's constructor it would leave the workers behind
                failures.append(error)

        loader = torch.utils.data.DataLoader(
            self.builder,
            sampler=plans_until_failure(),  # read by the main process only
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=self._prefetch_factor(),
            pin_memory=self.pin_memory,
            worker_init_fn=outlive_signals,
        )
        workers = iter(loader)
        try:
            yield from workers
            if failures:
                raise failures[0]
        except RecipeError as error:
            # The loader puts a worker's traceback into the message; its last line is ours.
            raise RecipeError(str(error).rstrip().splitlines()[-1].removeprefix(f"{RECIPE_ERROR}: ")) from None
        finally:
            self._release()
            end_workers(workers)

    def _prefetch_factor(self) -> int:
        """Micro-batches that each worker builds ahead: a whole step together, if shared memory has ample room."""
        wanted = -(-self.read_ahead // self.num_workers)
        return max(READ_AHEAD, min(wanted, room_for_batches(self.builder.config) // 2 // self.num_workers))

    @staticmethod
    def _plans_of_steps(plans: Iterator[MicroBatch], num_steps: int) -> Iterator[MicroBatch]:
        while num_steps > 0:
            plan = next(plans)
            yield plan
            num_steps -= plan.is_last

    def _read_ahead(self, plans: Iterator[MicroBatch]) -> Iterator[Batch]:
        # torch gets one thread for scaling images: the others are for the model.
        with ThreadPoolExecutor(1, "batches", initializer=torch.set_num_threads, initargs=(1,)) as reader:
            try:
                waiting: list[Future[Batch]] = [
                    reader.submit(self._build, plan) for plan in itertools.islice(plans, self.read_ahead)
                ]
                while waiting:
                    batch = waiting.pop(0).result()
                    waiting += [reader.submit(self._build, plan) for plan in itertools.islice(plans, 1)]
                    yield batch
            finally:
                self._release()

    def _release(self) -> None:
        """Release readers that wait for an epoch to be written, so that they can end."""
        if self.builder.store is not None:
            self.builder.store.publish_epoch(END)

    def _build(self, plan: MicroBatch) -> Batch:
        batch = self.builder[plan]
        return batch.pin_memory() if self.pin_memory else batch
