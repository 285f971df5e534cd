"""Build the parts of a run from a resolved recipe: data, model, state, validation and tracking."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from sd_recipes.checkpoints.format import Manifest
from sd_recipes.checkpoints.resume import finish_epoch, global_batch_size
from sd_recipes.data.batches import Batch, BatchBuilder, TrainingBatches
from sd_recipes.data.captions import undisturbed
from sd_recipes.data.held_out import HELD_OUT_SEED
from sd_recipes.data.latent_store import (
    LatentStore,
    check_one_provenance,
    memory_folder,
    provenance_of,
    remove_memory_folder,
)
from sd_recipes.data.order import Order
from sd_recipes.data.sizes import square_side
from sd_recipes.data.training_data import TrainingData, load_training_data, plans
from sd_recipes.data.workers import num_workers_of
from sd_recipes.errors import RecipeError
from sd_recipes.evaluation.metrics import ImageTextScore
from sd_recipes.evaluation.sample_errors import HELD_OUT, TRAIN, FixedSamples
from sd_recipes.evaluation.uncertainty_plot import draw_uncertainty
from sd_recipes.evaluation.validation import Validator
from sd_recipes.evaluation.watched_rows import WatchedRows
from sd_recipes.model.checks import check_pictures, check_recipe_fits, check_schedule
from sd_recipes.model.compilation import compile_unet, in_steps
from sd_recipes.model.components import Components, latent_shape_of, load_scheduler
from sd_recipes.model.conditioning import CachedText, Conditioning
from sd_recipes.model.families import family_of
from sd_recipes.model.family import Family, TextStates
from sd_recipes.model.latents import LatentEncoder, bearable_dtype, decode_without_autocast
from sd_recipes.model.lora import add_lora, trained_lora
from sd_recipes.model.lora_files import peft_settings
from sd_recipes.model.placement import apply_memory_format, keep_as_loaded, kept_as_loaded, move_models
from sd_recipes.recipe import ObjectiveConfig, Recipe, odd_settings
from sd_recipes.redaction import redacted
from sd_recipes.runtime.accelerator import DTYPES
from sd_recipes.runtime.agreement import wait_for_all
from sd_recipes.runtime.fsdp import check_wrapped_classes
from sd_recipes.runtime.gradients import GradientExchange
from sd_recipes.runtime.launcher import DYNAMO, configuration
from sd_recipes.runtime.out_of_memory import AtOnce
from sd_recipes.runtime.signals import stop_request
from sd_recipes.runtime.trackers import Tracker
from sd_recipes.training.dropout import has_dropout
from sd_recipes.training.ema import AveragedWeights, release_before_steps
from sd_recipes.training.frozen_model import FrozenModel, frozen_model
from sd_recipes.training.fused_backward import FusedBackward, check_fused_backward
from sd_recipes.training.guard import Guard
from sd_recipes.training.objective import DenoisingLoss, NoiseSchedule
from sd_recipes.training.optim import build_optimizer, build_schedule
from sd_recipes.training.optimizer_check import check_combinations, check_optimizer
from sd_recipes.training.quiet_loss import QuietLoss
from sd_recipes.training.rates import matches_in_words, set_rates
from sd_recipes.training.row_losses import RowLosses
from sd_recipes.training.schedule_free import EvaluationWeights, has_modes
from sd_recipes.training.state import SNAPSHOTS, TrainedPart, TrainState
from sd_recipes.training.timestep_errors import TimestepErrors
from sd_recipes.training.uncertainty import CONFIG, LEARNING_RATE, Uncertainty
from sd_recipes.training.utilisation import Utilisation

logger = logging.getLogger(__name__)

NOT_BEGUN = "while it was loading, before its first step"
# Of a part's folder in a checkpoint: by diffusers' name, or by transformers'.
UNET_WEIGHTS, WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
UNCERTAINTY = "uncertainty"
SIZES_OF_STREAM = 32  # of pictures that a compiled UNet meets, where nobody knows
COMPILED = {"blocks": "the UNet's blocks", "unet": "the UNet", "graphs": "the UNet, as CUDA graphs"}
LORA = "_lora"  # suffix of the parts that are LoRAs of a component


Checkpoint = tuple[Path, Manifest]


@dataclass
class Model:
    """A pipeline's parts, loaded and placed, and how a training step uses them."""

    family: Family
    components: Components
    unet: Callable[..., Any]  # as a training step calls it: autocast, compiled, or sharded
    exchange: GradientExchange  # of all that is trained
    encoder: LatentEncoder
    encode_text: Callable[[torch.Tensor], TextStates]  # of input_ids in the host's memory
    dropout_seed: int | None  # if something of it draws dropout
    objective: DenoisingLoss
    quiet_loss: QuietLoss
    timestep_errors: TimestepErrors | None  # by which timesteps are drawn, instead of those that a batch has
    steps_in_backward: bool  # with --fused_backward_pass
    frozen: FrozenModel | None  # whose predictions are the targets of class pictures, with --prior_preservation model
    utilisation: Utilisation | None  # on a GPU, or if a run is profiled

    def losses(self, latents: torch.Tensor, conditioning: Conditioning, batch: Batch) -> torch.Tensor:
        """(B,) loss of each image of a batch on the device, whose latents are (B, C, h, w)."""
        errors = self.timestep_errors
        timesteps = batch.timesteps if errors is None else errors.timesteps(batch.timestep_u)
        noises = batch.noise, batch.input_noise
        if self.utilisation:
            self.utilisation.note(latents, conditioning)
        teacher = partial(self.frozen.predict, batch) if self.frozen is not None and batch.plan.is_class else None
        losses = self.objective.undivided(
            self.unet,
            latents,
            conditioning,
            timesteps,
            *noises,
            latent_weights=batch.latent_weights,
            teacher=teacher,
        )
        self.quiet_loss.add(batch, timesteps, losses.detach())
        if errors is None:
            return self.objective.divided(losses, timesteps)
        errors.add(timesteps, losses.detach(), batch.weights)
        return errors.weights(timesteps) * losses


@dataclass
class Run:
    """The parts of a run, as `build_run` puts them together."""

    recipe: Recipe  # resolved
    accelerator: Accelerator
    data: TrainingData
    batches: TrainingBatches
    store: LatentStore | None
    model: Model
    state: TrainState
    validator: Validator
    tracker: Tracker
    guard: Guard
    num_steps: int  # of the whole run
    checkpoint: Checkpoint | None  # that it resumes from
    planned_memory: int | None = None  # bytes, to be compared with what is measured

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.output_dir)


def build_run(recipe: Recipe, accelerator: Accelerator, checkpoint: Checkpoint | None) -> Run:
    """Load data and models and put the run together. Raises RecipeError for what the user can fix.

    The recipe is resolved; the checkpoint is the one that the run resumes from.
    """
    assert recipe.seed is not None, "the recipe is resolved"
    manifest = checkpoint and checkpoint[1]
    for words in odd_settings(recipe):
        logger.warning("%s", words)
    check_optimizer(recipe, accelerator.device)
    family = family_of(recipe)
    # The smallest parts first, so that a missing model is reported soon: for tokenizers, which the data checks need,
    # transformers would keep asking an unreachable Hub for minutes.
    scheduler = load_scheduler(recipe)
    check_schedule(recipe, scheduler)
    tokenizers = family.load_tokenizers(recipe)
    batch_size = global_batch_size(recipe, accelerator.num_processes, manifest)
    data = load_training_data(
        recipe, tokenizers[0], seed=recipe.seed, global_batch_size=batch_size, rank=accelerator.process_index
    )
    if data.order and manifest:
        data.order = finish_epoch(data.order, manifest)
    num_steps = steps_of_run(recipe, data.order, manifest)

    stop_request.check(NOT_BEGUN)
    torch.manual_seed(recipe.seed)  # initial weights of a UNet from scratch, or of a LoRA
    components = family.load(recipe, scheduler, tokenizers)
    stop_request.check(NOT_BEGUN)
    check_recipe_fits(recipe, components)
    choose_trained(recipe, family, components)
    convert(recipe, components, is_new=checkpoint is None)
    check_pictures(recipe, components.sampler)
    provenance = None
    vae_dtype = bearable_dtype(components.vae, DTYPES[accelerator.mixed_precision], accelerator.device)
    if data.provenances or recipe.cache_latents != "off":  # of the weights as they were loaded
        provenance = provenance_of(recipe, components.vae, vae_dtype, tiling=recipe.vae_tiling)
        check_one_provenance(data.provenances, provenance)
    if accelerator.is_main_process:
        keep_as_loaded(components, kept_as_loaded(family, recipe))
    model, state = build_model(
        recipe,
        family,
        components,
        accelerator,
        vae_dtype=vae_dtype,
        batch_size=batch_size,
        num_steps=num_steps,
        num_rows=None if data.rows is None else len(data.rows),
        num_sizes=SIZES_OF_STREAM if data.order is None else len(data.order.sizes),
    )
    store = open_store(recipe, provenance, accelerator)
    tracker = Tracker(accelerator, recipe)
    builder_settings: dict[str, Any] = {
        "tokenize": partial(family.tokenize, tokenizers),
        "latent_shape": latent_shape_of(components.vae),
        "num_train_timesteps": scheduler.config.num_train_timesteps,
        "provenance": provenance,
    }
    return Run(
        recipe=recipe,
        accelerator=accelerator,
        data=data,
        batches=TrainingBatches(
            BatchBuilder(
                data.rows,
                recipe,
                seed=recipe.seed,
                objective=recipe,
                store=store,
                **builder_settings,
            ),
            plans(data, recipe, rank=accelerator.process_index, world_size=accelerator.num_processes),
            num_workers=num_workers_of(recipe, accelerator.device.type),
            pin_memory=accelerator.device.type == "cuda",
            read_ahead=micro_batches_of_step(recipe, batch_size, accelerator.num_processes)
            * (2 if recipe.has_class_pictures else 1),
        ),
        store=store,
        model=model,
        state=state,
        validator=build_validator(recipe, model, data, builder_settings, accelerator),
        tracker=tracker,
        guard=Guard(state, tracker, recipe.max_skipped_steps),
        num_steps=num_steps,
        checkpoint=checkpoint,
    )


def choose_trained(recipe: Recipe, family: Family, components: Components) -> None:
    """Let gradients reach what is trained besides the UNet, or a LoRA in its place. Raises RecipeError."""
    if recipe.trains_lora:
        add_lora(recipe, family, components)
    elif recipe.train_text_encoder:
        unused = family.without_effect(components)
        for name in family.text_models:
            for parameter_name, parameter in getattr(components, name).named_parameters():
                # What no loss depends on gets no gradient, and weight decay alone must not move it.
                parameter.requires_grad_(not parameter_name.startswith(unused.get(name, ())))


def convert(recipe: Recipe, components: Components, *, is_new: bool) -> None:
    """Make training and sampling schedules what the recipe says; tell of a new run whose UNet has to learn to fit."""
    given = components.scheduler.config.prediction_type
    wanted = recipe.prediction_type or given
    if wanted != given and is_new and not recipe.train_from_scratch:
        logger.warning(
            "The model predicts %s and is trained to predict %s from here on: until it has learned to, which takes "
            "thousands of steps, its pictures are noise. The exported scheduler says %s.",
            given, wanted, wanted,
        )  # fmt: skip
    components.set_prediction_type(wanted)
    if recipe.rescale_betas_zero_snr:
        components.rescale_to_zero_snr()


def steps_of_run(recipe: Recipe, order: Order | None, manifest: Manifest | None) -> int:
    """Optimizer steps of the whole run, including those before a checkpoint."""
    if recipe.max_train_steps is not None:
        return recipe.max_train_steps
    assert order is not None, "the recipe's check asks a stream for --max_train_steps"
    done, samples_seen = (manifest.step, manifest.samples_seen) if manifest else (0, 0)
    # Not counted over all epochs: the steps already done may have had batches of another size.
    return done + order.num_steps(recipe.num_train_epochs, samples_seen)


def build_encoder(recipe: Recipe, vae: AutoencoderKL, accelerator: Accelerator, dtype: torch.dtype) -> LatentEncoder:
    """The VAE in that type, as `bearable_dtype` found it."""
    if recipe.vae_slicing:
        vae.enable_slicing()
    if recipe.vae_tiling:
        vae.enable_tiling()
        logger.warning(
            "--vae_tiling: images of more than %d pixels a side are encoded and decoded in tiles, and differ a little "
            "from whole ones; smaller ones are not.", vae.tile_sample_min_size,
        )  # fmt: skip
    if dtype != DTYPES[accelerator.mixed_precision]:
        decode_without_autocast(vae)
    encoder = LatentEncoder(vae, accelerator.device, dtype)
    apply_memory_format(vae, recipe, accelerator.device, dtype)
    return encoder


def build_model(
    recipe: Recipe,
    family: Family,
    components: Components,
    accelerator: Accelerator,
    *,
    vae_dtype: torch.dtype,
    batch_size: int,
    num_steps: int,
    num_rows: int | None,
    num_sizes: int = 1,
) -> tuple[Model, TrainState]:
    """Put the models where the run needs them; returns them, and what is trained of them.

    `num_sizes` is of pictures.
    """
    device, dtype = accelerator.device, DTYPES[accelerator.mixed_precision]
    # bitsandbytes makes parameters contiguous at their first step, after its state has taken on their layout, and FSDP
    # shards only contiguous ones. What optimizers of other packages take for granted is not known.
    contiguous = recipe.needs_contiguous_weights or accelerator.is_fsdp2
    encoder = build_encoder(recipe, components.vae, accelerator, vae_dtype)
    frozen = frozen_model(recipe, family, components, device, dtype) if recipe.prior_preservation == "model" else None
    move_models(family, components, recipe, device, dtype, contiguous_unet=contiguous)
    if recipe.compile:
        # Without gradients, and without the LoRA, it has programs of its own.
        is_own_teacher = recipe.trains_lora and recipe.prior_preservation == "model"
        num_passes = 1 + recipe.dream_training + is_own_teacher
        compile_unet(components.unet, recipe.compile, num_sizes=num_sizes, num_passes=num_passes)
    parts = trained_parts(recipe, family, components, batch_size)
    num_train_timesteps = components.scheduler.config.num_train_timesteps
    quiet_loss = QuietLoss(num_train_timesteps, recipe, None if num_rows is None else RowLosses(num_rows))
    timestep_errors = TimestepErrors(num_train_timesteps, recipe, device) if recipe.timesteps_by_error else None
    if recipe.fused_backward_pass:
        num_micro_batches = micro_batches_of_step(recipe, batch_size, accelerator.num_processes)
        check_fused_backward(accelerator.num_processes, accelerator.mixed_precision, num_micro_batches)
    assert recipe.seed is not None, "the recipe is resolved"
    optimizer = build_optimizer(
        list(parts.values()),
        recipe,
        fused=None if accelerator.mixed_precision == "fp16" or device.type == "meta" else True,
        seed=recipe.seed,
        step_number=lambda: state.progress.global_step,
    )
    check_combinations(optimizer, recipe)
    fused_backward = FusedBackward(optimizer) if recipe.fused_backward_pass else None
    schedule = build_schedule(optimizer, recipe, num_steps)
    check_wrapped_classes(accelerator, components.unet)
    if accelerator.is_fsdp2 and len(parts) > 1:  # of several modules accelerate (1.15) shards the last one only
        raise RecipeError(f"FSDP shards one model, and this run trains {', '.join(parts)}: train without FSDP")
    wait_for_all()  # one may have taken far longer than another to read its data or its model
    if accelerator.is_fsdp2:
        *prepared, wrapped = accelerator.prepare(*(part.module for part in parts.values()), optimizer)
    else:  # without DDP: gradients are summed by the model's `exchange`
        prepared = [accelerator.prepare_model(part.module, evaluation_mode=True) for part in parts.values()]
        wrapped = accelerator.prepare_optimizer(optimizer)
    for part, module in zip(parts.values(), prepared, strict=True):
        part.prepared = module
        if recipe.use_ema:
            part.average = AveragedWeights(part.parameters, recipe)
        elif has_modes(optimizer):
            part.average = EvaluationWeights(part.parameters, optimizer)
        if recipe.ema_snapshots:
            part.snapshots = {
                suffix: AveragedWeights(part.parameters, recipe, length) for suffix, length in SNAPSHOTS.items()
            }
    release_before_steps(optimizer, [average for part in parts.values() for average in part.averages.values()])
    state = TrainState(
        parts,
        wrapped,
        schedule,
        accelerator.scaler,
        quiet_loss,
        timestep_errors=timestep_errors,
        fused_backward=fused_backward,
    )
    encode_text = text_encoding(recipe, family, components, state)
    unet = part_of(parts, "unet").prepared
    model = Model(
        family=family,
        components=components,
        unet=in_steps(unet) if recipe.compile == "graphs" else unet,
        exchange=GradientExchange(
            [parameter for part in parts.values() for parameter in part.parameters.values()],
            is_needed=accelerator.num_processes > 1 and not accelerator.is_fsdp2,
        ),
        encoder=encoder,
        encode_text=CachedText(encode_text) if recipe.cache_text else encode_text,
        dropout_seed=recipe.seed if has_dropout(part.module for part in parts.values()) else None,
        objective=DenoisingLoss(
            components.scheduler, recipe, device, parts[UNCERTAINTY].prepared if UNCERTAINTY in parts else None
        ),
        quiet_loss=quiet_loss,
        timestep_errors=timestep_errors,
        steps_in_backward=recipe.fused_backward_pass,
        frozen=frozen and frozen.called_as(part_of(parts, "unet").prepared),
        utilisation=(
            Utilisation(components.unet, accelerator, allow_tf32=recipe.allow_tf32)
            if device.type == "cuda" or recipe.profile_steps
            else None
        ),
    )
    return model, state


def text_encoding(
    recipe: Recipe, family: Family, components: Components, state: TrainState
) -> Callable[[torch.Tensor], TextStates]:
    """How a training step encodes its captions: with a graph while the text encoder is trained.

    A frozen one gets no gradients, so that no optimizer steps it; its average goes on, towards where it stands.
    """
    if not (recipe.train_text_encoder or recipe.lora_text_encoder):
        return partial(family.encode_text, components)
    prepared: dict[str, Any] = {name: part_of(state.parts, name).prepared for name in family.text_models}
    trained = replace(components, **prepared)

    def encode(input_ids: torch.Tensor) -> TextStates:
        if recipe.text_encoder_steps is None or state.progress.global_step < recipe.text_encoder_steps:
            return family.encode_text(trained, input_ids)
        with torch.no_grad():
            return family.encode_text(components, input_ids)

    return encode


def part_of(parts: Mapping[str, TrainedPart], component: str) -> TrainedPart:
    """The part that trains a component, itself or by a LoRA."""
    return parts.get(component) or parts[component + LORA]


def trained_parts(recipe: Recipe, family: Family, components: Components, batch_size: int) -> dict[str, TrainedPart]:
    """What is trained, by name: parts of the components or LoRAs of them, and the learned uncertainty."""
    factor = batch_size if recipe.scale_lr else 1
    learning_rates = {"unet": recipe.learning_rate * factor}
    if recipe.train_text_encoder or recipe.lora_text_encoder:
        own = recipe.text_encoder_learning_rate
        learning_rates |= dict.fromkeys(family.text_models, (recipe.learning_rate if own is None else own) * factor)
    make = lora_part if recipe.trains_lora else whole_part
    parts: dict[str, TrainedPart] = {}
    for component, learning_rate in learning_rates.items():
        part = make(component, getattr(components, component).train(), learning_rate)
        parts[part.name] = part
    set_rates(list(parts.values()), recipe.param_groups or [], factor)
    if recipe.learned_uncertainty:
        parts[UNCERTAINTY] = uncertainty_part(components.scheduler, components.unet.device)
    return parts


def whole_part(component: str, module: Any, learning_rate: float) -> TrainedPart:
    """A component of the pipeline."""
    # FSDP changes the name of a module's class, so its configuration is taken before that.
    if component == "unet":
        config, rebuild = redacted(module.to_json_string()), partial(rebuild_unet, module.config)
        return TrainedPart(component, module, UNET_WEIGHTS, config, learning_rate, rebuild)
    return TrainedPart(component, module, WEIGHTS, redacted(module.config.to_json_string()), learning_rate)


def lora_part(component: str, module: Any, learning_rate: float) -> TrainedPart:
    """The LoRA of a component."""
    config = json.dumps(peft_settings(trained_lora(module)), indent=1) + "\n"
    return TrainedPart(component + LORA, module, WEIGHTS, config, learning_rate, is_whole=False)


def uncertainty_part(scheduler: DDPMScheduler, device: torch.device) -> TrainedPart:
    """The learned uncertainty, of which a run leaves a drawing."""
    uncertainty = Uncertainty(NoiseSchedule(scheduler, device))

    def export(tensors: Mapping[str, torch.Tensor], output_dir: Path) -> None:
        draw_uncertainty(uncertainty.by_timestep(tensors["weight"]), output_dir / "uncertainty.png")

    return TrainedPart(UNCERTAINTY, uncertainty, WEIGHTS, CONFIG, LEARNING_RATE, export=export)


def rebuild_unet(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A frozen UNet in float32 from whole tensors, which it uses without copying them if they are."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
    unet.load_state_dict(dict(tensors), assign=True)
    return unet.float().requires_grad_(False).eval()


def build_validator(
    recipe: Recipe, model: Model, data: TrainingData, settings: Mapping[str, Any], accelerator: Accelerator
) -> Validator:
    sets = {}
    if data.held_out is not None and data.watched is not None:
        sets = {HELD_OUT: data.held_out, TRAIN: data.watched}
    plain = {"center_crop": True, "crop": None, "random_flip": False}
    plain_recipe = undisturbed(recipe).model_copy(update=plain)
    watched = WatchedRows(sets, plain_recipe) if sets else None
    prompts = recipe.validation_prompts or []
    if watched and not prompts:
        prompts = watched.captions(recipe.validation_pictures)
    side = square_side(recipe)
    # The pipeline takes multiples of 8 only, whatever the VAE's factor; a smaller factor divides 8.
    picture_side = side - side % 8
    if recipe.validation_prompts and picture_side != recipe.resolution:
        logger.info("Validation pictures have %d x %d pixels.", picture_side, picture_side)
    score = None
    if recipe.validation_clip_model and accelerator.is_main_process:
        score = ImageTextScore(recipe.validation_clip_model, accelerator.device, recipe.cache_dir)
    # Plain, so that runs with different weightings and tricks can be compared by it.
    plain_objective = ObjectiveConfig(prediction_type=model.objective.prediction_type)
    own = slice(accelerator.process_index, None, accelerator.num_processes)
    return Validator(
        recipe,
        accelerator,
        model.family,
        model.components,
        model.encoder,
        DenoisingLoss(model.components.scheduler, plain_objective, accelerator.device),
        {
            name: FixedSamples(
                BatchBuilder(fixed.rows, plain_recipe, seed=HELD_OUT_SEED, **settings),
                (side, side),
                recipe.validation_samples,
                own,
                keeps_text=not (recipe.train_text_encoder or recipe.lora_text_encoder),
                num_workers=num_workers_of(recipe, accelerator.device.type),
                pin_memory=accelerator.device.type == "cuda",
            )
            for name, fixed in sets.items()
        },
        watched,
        prompts,
        score,
        picture_size=(picture_side, picture_side),
        samples_at_once=AtOnce(recipe.train_batch_size, "the held-out loss"),
        pictures_at_once=AtOnce(min(recipe.train_batch_size, len(prompts)), "validation pictures"),
    )


def open_store(recipe: Recipe, provenance: dict[str, Any] | None, accelerator: Accelerator) -> LatentStore | None:
    """The recipe's latent store, if it asks for one. Raises RecipeError if there is no room for it in memory."""
    if recipe.dry_run:  # it reads no row, leaves no trace, and takes no other run's memory
        return None
    if accelerator.is_local_main_process:
        remove_memory_folder(recipe.output_dir)  # whatever cache this run will use
    if recipe.cache_latents == "off":
        return None
    assert provenance is not None
    if recipe.streaming and len(recipe.sources) > 1:
        logger.warning(
            "Several streams have no common epoch after which the cache could be read: --cache_latents keeps each row "
            "once, and reads them when the run resumes or another one starts."
        )
    folder = Path(recipe.latent_cache_dir or Path(recipe.output_dir) / "latents")
    if recipe.cache_latents == "memory":
        wait_for_all()  # until it is removed
        folder = memory_folder(recipe.output_dir)
    return LatentStore(folder, provenance, accelerator.process_index, temporary=recipe.cache_latents == "memory")


def describe(run: Run) -> str:
    """The run in a few lines: data, steps, batch, parameters."""
    accelerator, data = run.accelerator, run.data
    steps = f"{run.num_steps:,}"
    if data.order is not None:
        of_epoch = data.order.num_steps(1)
        steps += f" ({of_epoch:,} per epoch, {num_epochs(run, data.order):.4g} epochs)"
    trained = ", ".join(
        f"{sum(each.numel() for each in part.parameters.values()):,} ({part.name})" for part in run.state.parts.values()
    )
    of_groups = matches_in_words(run.state.parts.values(), run.recipe.param_groups or [])
    backend = os.environ.get(DYNAMO, "no").lower()
    lines = {
        **({"resumes from": f"{run.checkpoint[0]}"} if run.checkpoint else {}),
        "global batch": batch_in_words(run),
        **({"class pictures": f"{data.class_rows.num_rows:,}, one beside each image"} if data.class_rows else {}),
        "optimizer steps": steps,
        "trainable parameters": trained,
        **({"parameters of groups": f"\n{'':<23}".join(of_groups)} if of_groups else {}),
        "predicts": run.model.objective.prediction_type,
        **(
            {"text states": _text_states_in_words(run.model.family, run.recipe.clip_skip)}
            if run.recipe.clip_skip
            else {}
        ),
        "device": f"{accelerator.device}, {accelerator.mixed_precision} mixed precision"
        + (f", compiled by {backend} (torch dynamo) of {configuration()}" if backend != "no" else "")
        + (f", compiled: {COMPILED[run.recipe.compile]}" if run.recipe.compile else "")
        + (f", sharded over {accelerator.num_processes} processes (FSDP2)" if accelerator.is_fsdp2 else ""),
        "seed": run.recipe.seed,
    }
    return "\n".join(f"  {name:<21}{value}" for name, value in lines.items())


def _text_states_in_words(family: Family, clip_skip: int) -> str:
    left_out = family.encoder_layer(clip_skip) - 1
    layers = "the last layer" if left_out == 1 else f"the last {left_out} layers"
    of = "each text encoder" if len(family.text_models) > 1 else "the text encoder"
    return f"without {layers} of {of}: draw with {family.clip_skip_in_words(clip_skip)}"


def num_epochs(run: Run, order: Order) -> float:
    """Epochs at the end of a run. Those before a checkpoint are counted by samples: batch sizes may have differed."""
    of_epoch = order.num_steps(1)
    if run.checkpoint is None:
        return run.num_steps / of_epoch
    manifest = run.checkpoint[1]
    epoch = manifest.samples_seen // order.num_rows
    left_of_epoch = order.num_steps(epoch + 1, manifest.samples_seen)
    return epoch + 1 + (run.num_steps - manifest.step - left_of_epoch) / of_epoch


def batch_in_words(run: Run) -> str:
    """A global batch as what it consists of."""
    recipe, global_batch_size, num_processes = run.recipe, run.data.global_batch_size, run.accelerator.num_processes
    size, accumulated = recipe.train_batch_size, recipe.gradient_accumulation_steps
    at_once = f", {recipe.images_at_once} at once" if recipe.images_at_once < size else ""
    if size * accumulated * num_processes != global_batch_size:  # the run began on another number
        accumulated = micro_batches_of_step(recipe, global_batch_size, num_processes)
        return (
            f"{global_batch_size}, kept, on {num_processes} processes: at most {size} x {accumulated} on each{at_once}"
        )
    return f"{global_batch_size} = {size} per device x {accumulated} accumulated x {num_processes} processes{at_once}"


def micro_batches_of_step(recipe: Recipe, global_batch_size: int, num_processes: int) -> int:
    """The most micro-batches that a process has in an optimizer step."""
    return math.ceil(math.ceil(global_batch_size / num_processes) / recipe.train_batch_size)
