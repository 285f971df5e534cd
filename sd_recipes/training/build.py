"""A recipe to everything that the loop needs."""

from __future__ import annotations

import errno
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator

from sd_recipes.checkpoints.format import Manifest
from sd_recipes.checkpoints.resume import choose_checkpoint, finish_epoch, global_batch_size
from sd_recipes.data.bad_rows import BadRows
from sd_recipes.data.batches import BatchBuilder, TrainingBatches
from sd_recipes.data.latent_store import LatentCache, check_one_provenance, made_by, memory_folder, remove_memory_folder
from sd_recipes.data.order import Order
from sd_recipes.data.sizes import square_side
from sd_recipes.data.training_data import load_training_data, plans
from sd_recipes.errors import RecipeError
from sd_recipes.evaluation.metrics import ImageTextScore
from sd_recipes.evaluation.validation import HELD_OUT_SEED, Validator
from sd_recipes.model.components import Components, latent_shape_of, load_components
from sd_recipes.model.conditioning import CachedText, encode_text
from sd_recipes.model.placement import DTYPES, place
from sd_recipes.recipe import ObjectiveConfig, Recipe, odd_settings
from sd_recipes.redaction import redacted
from sd_recipes.runtime.agreement import StopAgreement, broadcast, wait_for_all
from sd_recipes.runtime.fsdp import check_wrapped_classes, gather_unet
from sd_recipes.runtime.out_of_memory import AtOnce
from sd_recipes.runtime.signals import stop_request
from sd_recipes.runtime.trackers import Tracker
from sd_recipes.training.ema import AveragedWeights
from sd_recipes.training.objective import DenoisingLoss
from sd_recipes.training.optim import build_optimizer, build_schedule

logger = logging.getLogger(__name__)

NOT_BEGUN = "while it was loading, before a step was made"


@dataclass
class Training:
    """All parts of a run, put together."""

    recipe: Recipe
    accelerator: Accelerator
    components: Components
    unet: torch.nn.Module  # as the loop calls it: components.unet, wrapped or divided where there are several processes
    unet_config: str  # its config.json
    objective: DenoisingLoss
    held_out_objective: DenoisingLoss
    optimizer: Any  # accelerate's wrapper
    schedule: torch.optim.lr_scheduler.LambdaLR
    ema: AveragedWeights | None
    batches: TrainingBatches
    num_rows: int | None  # unknown of a stream
    order: Order | None  # likewise
    bad_rows: BadRows
    cache: LatentCache | None
    encode_text: Callable[[torch.Tensor], torch.Tensor]  # input_ids in the host's memory to states on the device
    validator: Validator
    tracker: Tracker
    any_rank_stopping: StopAgreement
    checkpoint: tuple[Path, Manifest] | None  # from which it goes on
    weight_dtype: torch.dtype  # of the frozen models
    global_batch_size: int  # images of an optimizer step, over all processes
    max_train_steps: int
    seed: int

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """Within it, on the first process, `components.unet` has the weights that are judged and exported.

        Those are the average, if there is one. Every process has to enter it, since a divided UNet is put together.
        """
        unet, is_main = self.components.unet, self.accelerator.is_main_process
        if self.accelerator.is_fsdp2:
            tensors = self.ema.named_tensors() if self.ema else unet.state_dict()
            whole = gather_unet(self.unet_config, tensors, self.accelerator.device, is_wanted=is_main)
            self.components.unet = whole or unet
            try:
                yield
            finally:
                self.components.unet = unet
        elif self.ema is None or not is_main:
            yield
        else:
            with self.ema.applied():
                yield


def build_training(recipe: Recipe, accelerator: Accelerator) -> Training:
    """Load data and models and put the run together. Raises RecipeError for what a person can mend."""
    output_dir = Path(recipe.output_dir)
    check_output_dir(output_dir, writes=not recipe.dry_run)
    for words in odd_settings(recipe):
        logger.warning("%s", words)
    recipe.mixed_precision = accelerator.mixed_precision  # accelerate's own configuration may have set it
    checkpoint = choose_checkpoint(recipe, accelerator.is_main_process)
    seed = _agree_on_seed(recipe.seed)
    recipe.seed = seed

    batch_size = global_batch_size(recipe, accelerator.num_processes, checkpoint[1] if checkpoint else None)
    data = load_training_data(recipe, seed=seed, global_batch_size=batch_size, rank=accelerator.process_index)
    global_step = samples_seen = 0
    if checkpoint:
        global_step, samples_seen = checkpoint[1].step, checkpoint[1].samples_seen
        data.order = data.order and finish_epoch(data.order, checkpoint[1])
    max_train_steps = recipe.max_train_steps
    if max_train_steps is None:
        assert data.order is not None, "the recipe's check asks a stream for --max_train_steps"
        # Not of all epochs: the steps that are done may have had batches of another size.
        max_train_steps = global_step + data.order.num_steps(recipe.num_train_epochs, samples_seen)

    stop_request.check(NOT_BEGUN)
    torch.manual_seed(seed)  # initial weights of a UNet from scratch, and its dropout
    components = load_components(recipe)
    stop_request.check(NOT_BEGUN)
    factor = components.vae_scale_factor
    if recipe.aspect_ratio_buckets and recipe.bucket_step % factor:
        raise RecipeError(f"--bucket_step {recipe.bucket_step} is not a multiple of the VAE's factor {factor}")
    if recipe.resolution % components.vae_scale_factor and not recipe.aspect_ratio_buckets:
        lower = recipe.resolution - recipe.resolution % components.vae_scale_factor
        raise RecipeError(
            f"--resolution {recipe.resolution} is not a multiple of the VAE's factor {components.vae_scale_factor}: "
            f"use {lower or components.vae_scale_factor} or {lower + components.vae_scale_factor}"
        )
    if (
        recipe.dream_training
        and components.scheduler.config.prediction_type != "epsilon"
        and not recipe.prediction_type
    ):
        raise RecipeError("--dream_training is defined for epsilon, and this model predicts something else: drop it")
    num_train_timesteps = components.scheduler.config.num_train_timesteps
    if recipe.validation_prompts and recipe.validation_inference_steps > num_train_timesteps:
        raise RecipeError(
            f"--validation_inference_steps {recipe.validation_inference_steps} is over the model's "
            f"{num_train_timesteps} timesteps: lower it"
        )
    prediction_type = recipe.prediction_type or components.scheduler.config.prediction_type
    components.set_prediction_type(prediction_type)

    device = accelerator.device
    weight_dtype = DTYPES[accelerator.mixed_precision]
    wanted = None
    if (makers := data.makers) or recipe.cache_latents != "off":
        wanted = made_by(recipe, components.vae, weight_dtype)
        check_one_provenance(makers, wanted)
    # bitsandbytes makes parameters contiguous at their first step, after its state took their layout, and FSDP divides
    # no others.
    contiguous = recipe.optimizer == "adamw8bit" or accelerator.is_fsdp2
    place(components, recipe, device, weight_dtype, contiguous_unet=contiguous, exports=accelerator.is_main_process)
    unet = components.unet
    unet_config = redacted(unet.to_json_string())  # with its place; FSDP gives its class another name
    unet.train()
    learning_rate = recipe.learning_rate * (batch_size if recipe.scale_lr else 1)
    fused = accelerator.mixed_precision != "fp16"
    optimizer = build_optimizer(unet.parameters(), recipe, learning_rate=learning_rate, fused=fused)
    schedule = build_schedule(optimizer, recipe, max_train_steps)
    check_wrapped_classes(accelerator, unet)
    wait_for_all()  # one may have read its data or its model far longer than another
    prepared_unet, prepared_optimizer = accelerator.prepare(unet, optimizer)
    ema = AveragedWeights(unet, recipe) if recipe.use_ema else None

    cache = open_cache(recipe, wanted, accelerator)
    builder_settings = {
        "latent_shape": latent_shape_of(components.vae),
        "num_train_timesteps": num_train_timesteps,
        "made_by": wanted,
    }
    builder = BatchBuilder(
        data.rows,
        components.tokenizer,
        recipe,
        seed=seed,
        noise_offset=recipe.noise_offset,
        input_perturbation=recipe.input_perturbation,
        cache=cache,
        **builder_settings,
    )
    encode = CachedText(components.text_encoder) if recipe.cache_text else partial(encode_text, components.text_encoder)
    return Training(
        recipe=recipe,
        accelerator=accelerator,
        components=components,
        unet=prepared_unet,
        unet_config=unet_config,
        objective=DenoisingLoss(components.scheduler, recipe, device),
        # Plain, so that runs with other weightings and tricks can be compared by it.
        held_out_objective=DenoisingLoss(
            components.scheduler, ObjectiveConfig(prediction_type=prediction_type), device
        ),
        optimizer=prepared_optimizer,
        schedule=schedule,
        ema=ema,
        batches=TrainingBatches(
            builder,
            plans(data, recipe, accelerator, seed=seed, global_batch_size=batch_size),
            num_workers=recipe.dataloader_num_workers,
            pin_memory=device.type == "cuda",
        ),
        num_rows=data.num_rows,
        order=data.order,
        bad_rows=data.bad_rows,
        cache=cache,
        encode_text=encode,
        validator=_build_validator(
            recipe, components, data.held_out_rows, builder_settings, scores=accelerator.is_main_process
        ),
        tracker=Tracker(accelerator, recipe),
        any_rank_stopping=StopAgreement(accelerator.num_processes),
        checkpoint=checkpoint,
        weight_dtype=weight_dtype,
        global_batch_size=batch_size,
        max_train_steps=max_train_steps,
        seed=seed,
    )


def check_output_dir(output_dir: Path, *, writes: bool = True) -> None:
    """Make the folder and write into it once; without `writes` ask only whether that is allowed. Raises RecipeError."""
    try:
        if writes:
            output_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output_dir) as file:
                file.write(b"0")
        else:
            path = output_dir.absolute()
            there = next(place for place in (path, *path.parents) if os.path.lexists(place))
            if not there.is_dir():
                raise OSError(errno.ENOTDIR, f"{there} is not a folder")
            if not os.access(there, os.W_OK | os.X_OK):
                raise OSError(errno.EACCES, f"no right to write to {there}, or a read-only file system")
    except OSError as error:
        raise RecipeError(f"--output_dir {output_dir} cannot be written: {error.strerror}; choose another") from None


def _agree_on_seed(seed: int | None) -> int:
    """The seed, or one drawn by the first process for all."""
    drawn = int(np.random.SeedSequence().generate_state(1, np.uint32)[0]) if seed is None else seed
    return broadcast(drawn)


def _build_validator(
    recipe: Recipe,
    components: Components,
    rows: datasets.Dataset | None,
    settings: dict[str, Any],
    *,
    scores: bool,
) -> Validator:
    held_out = None
    if rows is not None:
        plain = {"center_crop": True, "crop": None, "random_flip": False, "caption_dropout": 0.0, "shuffle_tags": False}
        config = recipe.model_copy(update=plain)
        held_out = BatchBuilder(rows, components.tokenizer, config, seed=HELD_OUT_SEED, **settings)
    score = None
    if recipe.validation_clip_model and scores:
        score = ImageTextScore(recipe.validation_clip_model, recipe.cache_dir)
    side = square_side(recipe)
    # The pipeline takes multiples of 8 only, whatever the VAE's factor; a smaller factor divides 8.
    picture_side = side - side % 8
    if recipe.validation_prompts and picture_side != recipe.resolution:
        logger.info("Validation pictures are of %d x %d pixels.", picture_side, picture_side)
    num_prompts = len(recipe.validation_prompts or [])
    return Validator(
        held_out,
        score,
        held_out_size=(side, side),
        picture_size=(picture_side, picture_side),
        held_out_at_once=AtOnce(recipe.train_batch_size, "the held-out loss"),
        pictures_at_once=AtOnce(min(recipe.train_batch_size, num_prompts), "validation pictures"),
    )


def describe(training: Training) -> str:
    """The run in a few lines: data, steps, batch, parameters."""
    recipe, accelerator = training.recipe, training.accelerator
    trainable = sum(parameter.numel() for parameter in training.components.unet.parameters() if parameter.requires_grad)
    steps = f"{training.max_train_steps:,}"
    if training.order:
        of_epoch = training.order.num_steps(1)
        steps += f" ({of_epoch:,} an epoch, {num_epochs(training, of_epoch):.4g} epochs)"
    lines = {
        **({"goes on from": f"{training.checkpoint[0]}"} if training.checkpoint else {}),
        "rows": "a stream" if training.num_rows is None else f"{training.num_rows:,}",
        "global batch": _batch_in_words(recipe, training.global_batch_size, accelerator.num_processes),
        "optimizer steps": steps,
        "trainable parameters": f"{trainable:,} (UNet)",
        "predicts": training.objective.prediction_type,
        "device": f"{accelerator.device}, {accelerator.mixed_precision} mixed precision"
        + (f", the UNet divided among {accelerator.num_processes} processes (FSDP2)" if accelerator.is_fsdp2 else ""),
        "seed": training.seed,
    }
    return "\n".join(f"  {name:<21}{value}" for name, value in lines.items())


def num_epochs(training: Training, steps_per_epoch: int) -> float:
    """Epochs at the end of a run, those before a checkpoint by the samples: its batches may have had another size."""
    assert training.order is not None
    if training.checkpoint is None:
        return training.max_train_steps / steps_per_epoch
    manifest = training.checkpoint[1]
    epoch = manifest.samples_seen // training.order.num_rows
    left_of_epoch = training.order.num_steps(epoch + 1, manifest.samples_seen)
    return epoch + 1 + (training.max_train_steps - manifest.step - left_of_epoch) / steps_per_epoch


def _batch_in_words(recipe: Recipe, global_batch_size: int, num_processes: int) -> str:
    size, accumulated = recipe.train_batch_size, recipe.gradient_accumulation_steps
    if size * accumulated * num_processes != global_batch_size:  # of a run that began on other processes
        accumulated = math.ceil(math.ceil(global_batch_size / num_processes) / size)
        return f"{global_batch_size}, kept, on {num_processes} processes: at most {size} x {accumulated} on each"
    return f"{global_batch_size} = {size} a device x {accumulated} accumulated x {num_processes} processes"


def open_cache(recipe: Recipe, made_by: dict[str, Any] | None, accelerator: Accelerator) -> LatentCache | None:
    """The latent cache of a recipe, if it asks for one. Raises RecipeError if there is no room for it in memory."""
    if recipe.dry_run:  # no row will be asked for, and it leaves no trace, nor takes another run's memory
        return None
    if accelerator.is_local_main_process:
        remove_memory_folder(recipe.output_dir)  # whatever this run will use
    if recipe.cache_latents == "off":
        return None
    assert made_by is not None
    if recipe.streaming and len(recipe.sources) > 1:
        logger.warning(
            "Several streams have no common epoch, after which a cache could be read: --cache_latents keeps each row "
            "once, and reads them when the run goes on or another begins."
        )
    folder = Path(recipe.latent_cache_dir or Path(recipe.output_dir) / "latents")
    if recipe.cache_latents == "memory":
        wait_for_all()  # until it is removed
        folder = memory_folder(recipe.output_dir)
    return LatentCache(folder, made_by, accelerator.process_index, temporary=recipe.cache_latents == "memory")
