"""The parts that pipelines of all families have, each loaded by its own class, from safetensors unless asked otherwise.

A repository cannot choose a class, except a sampler from SAMPLERS, and none of its code is run.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from safetensors import SafetensorError

from sd_recipes.errors import RecipeError, one_line
from sd_recipes.model.loading import fill
from sd_recipes.model.predictions import PREDICTIONS
from sd_recipes.model.samplers import of_class
from sd_recipes.model.sources import Source, source_of
from sd_recipes.model.weight_files import UnfittingWeights, UnreadableWeights
from sd_recipes.recipe import ModelConfig

logger = logging.getLogger(__name__)

# Sampling schedulers that a pipeline may name; any other is replaced by DDIM, with a warning.
SAMPLERS: dict[str, type[SchedulerMixin]] = {
    sampler.__name__: sampler
    for sampler in (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        PNDMScheduler,
    )
}
# By `_class_name`, or transformers' `model_type`, of a part's configuration.
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "clip_text_model", "clip"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "clip_text_model", "clip"),
}
# What makes a scheduler's last timestep pure noise, and lets sampling begin there.
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@dataclass
class Components:
    """What every pipeline is made of; a family adds its text models and tokenizers."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDPMScheduler  # of training
    sampler: SchedulerMixin  # of the pipeline
    clip_skip: int | None = field(default=None, kw_only=True)  # how many of a text model's last layers are left out
    # The frozen parts as they were loaded, if they run rounded to another type; see `placement.keep_as_loaded`.
    as_loaded: dict[str, Any] = field(default_factory=dict, kw_only=True)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per side that one latent stands for."""
        return _scale_factor(self.vae)

    def set_prediction_type(self, prediction_type: str) -> None:
        """The exported pipeline must sample with the prediction type that was trained."""
        if prediction_type == "sample":
            self._replace_pndm("from a prediction of x_0")
        # Made anew: what is registered afterwards is lost where a sampler of another class is made of this one's
        # configuration, if it is not in the model's file.
        self.scheduler, self.sampler = (
            type(each).from_config(each.config, prediction_type=prediction_type)
            for each in (self.scheduler, self.sampler)
        )

    def rescale_to_zero_snr(self) -> None:
        """Noise schedules that end in pure noise, and sampling from there (Lin et al. 2023, sections 3.1 and 3.3)."""
        self._replace_pndm("from pure noise")
        self.scheduler = DDPMScheduler.from_config(self.scheduler.config, **ZERO_SNR)
        self.sampler = type(self.sampler).from_config(self.sampler.config, **ZERO_SNR)

    def _replace_pndm(self, what: str) -> None:
        if isinstance(self.sampler, PNDMScheduler):
            logger.warning("PNDM cannot sample %s: the pipeline gets DDIM.", what)
            self.sampler = of_class(DDIMScheduler, self.sampler.config)


def _scale_factor(vae: AutoencoderKL) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_shape_of(vae: AutoencoderKL) -> Callable[[tuple[int, int]], tuple[int, int, int]]:
    """The function from an image's (height, width) to its latents' (C, h, w); it holds no model."""
    return partial(_latent_shape, vae.config.latent_channels, _scale_factor(vae))


def _latent_shape(channels: int, factor: int, size: tuple[int, int]) -> tuple[int, int, int]:
    height, width = size
    return channels, height // factor, width // factor


def load_vae(config: ModelConfig, *, weights: bool = True) -> AutoencoderKL:
    """The VAE in float32, frozen. Raises RecipeError."""
    vae = load_part(config, "vae", AutoencoderKL.from_config, weights=weights)
    return vae.requires_grad_(False).eval()


def load_unet(config: ModelConfig, *, weights: bool = True) -> UNet2DConditionModel:
    """The UNet in float32, or a new one with random weights. Raises RecipeError."""
    if config.train_from_scratch:
        with nullcontext() if weights else init_empty_weights():
            return _new_unet(config)
    if config.non_ema_revision and weights:
        logger.warning("--non_ema_revision is deprecated: use --variant non_ema")
    return load_part(config, "unet", UNet2DConditionModel.from_config, weights=weights).eval()


def load_part(config: ModelConfig, part: str, build: Callable[[dict[str, Any]], Any], *, weights: bool = True) -> Any:
    """A part of the model in float32, in host memory: `build` makes its module of its configuration.

    Without `weights` it is that, on the meta device. Raises RecipeError unless every one of its tensors is loaded, and
    every one of the file's belongs to it.
    """
    source, settings = read_settings(config, part)
    try:
        with init_empty_weights():
            module = build(settings)
    # Neither diffusers nor transformers checks a configuration: their modules raise whatever they raise.
    except Exception as error:
        source.cannot_load(part, f"its configuration does not describe one ({one_line(error)})", error)
    if not weights:
        return module
    found = source.weights(part, settings, module.state_dict())
    try:
        fill(module, found, part)
    except UnfittingWeights as error:
        source.cannot_load(part, f"{found.place} {error}: {source.way_out}", error)
    except UnreadableWeights as error:
        source.cannot_load(part, f"{found.place} {error}", error)
    except (SafetensorError, OSError) as error:
        words = f"{found.place} cannot be read ({one_line(error)}): copy or download it again"
        source.cannot_load(part, words, error)
    return module


def read_settings(config: ModelConfig, part: str) -> tuple[Source, dict[str, Any]]:
    """Where a part comes from, and its configuration. Raises RecipeError for one of another class than is loaded."""
    source, wanted = source_of(config, part), CLASSES[part]
    settings = source.read_config(part)
    found = settings.get("_class_name") or settings.get("model_type")
    if found is not None and found not in wanted:
        source.cannot_load(part, f"it is a {found}, and a {wanted[0]} is needed: choose a model that has one")
    return source, settings


def load_scheduler(config: ModelConfig) -> DDPMScheduler:
    """The training scheduler. Raises RecipeError."""
    source = source_of(config, "scheduler")
    settings = _scheduler_settings(config)
    if difference := _unlike_ddpm(settings):
        source.cannot_load(
            "scheduler",
            f"its {settings.get('_class_name', 'configuration')} {difference}. Training would not continue what "
            "the model learned: choose another one, or take the scheduler/scheduler_config.json of the one that it was "
            "made from",
        )
    if not config.train_from_scratch:
        source_of(config, "unet").say_noise_schedule()
    try:
        return DDPMScheduler.from_config(settings)
    except Exception as error:  # diffusers does not check a configuration
        source.cannot_load("scheduler", one_line(error), error)


def _unlike_ddpm(settings: dict[str, Any]) -> str | None:
    """Why a model with such a scheduler was not trained as it would be here; None if it was."""
    if str(settings.get("_class_name")).startswith("FlowMatch") or settings.get("use_flow_sigmas"):
        return "is of flow matching, which knows no betas, and not of DDPM"
    if str(settings.get("_class_name")).startswith("EDM"):
        return "is of EDM, which knows no betas, and not of DDPM"
    if settings.get("beta_start") is None and settings.get("trained_betas") is None:
        return "has no betas (beta_start, beta_end), so that the noise schedule of the model is not known"
    if settings.get("prediction_type", "epsilon") not in PREDICTIONS:
        return f"has the prediction_type {settings['prediction_type']}, which is none of {', '.join(PREDICTIONS)}"
    return None


def load_sampler(config: ModelConfig, scheduler: DDPMScheduler) -> SchedulerMixin:
    """The scheduler class that the model's own scheduler_config.json names, if it is a known one."""
    saved = _scheduler_settings(config)
    sampler = SAMPLERS.get(name := str(saved.get("_class_name", "DDIMScheduler")))
    if sampler is None:
        logger.warning("The model's scheduler %s is not one of %s: DDIM is used.", name, ", ".join(SAMPLERS))
    elif sampler is PNDMScheduler and saved.get("rescale_betas_zero_snr"):
        logger.warning("PNDM cannot sample with zero terminal SNR: the pipeline gets DDIM.")
        sampler = None
    try:
        return sampler.from_config(saved) if sampler else of_class(DDIMScheduler, saved)
    except Exception as error:  # diffusers does not check a configuration
        source_of(config, "scheduler").cannot_load("scheduler", one_line(error), error)


def _scheduler_settings(config: ModelConfig) -> dict[str, Any]:
    """scheduler_config.json, and what the model's weights say of it, which counts more."""
    source = source_of(config, "scheduler")
    settings = {**source.read_config("scheduler"), **source.noise_schedule_hints()}
    if not config.train_from_scratch:
        settings |= source_of(config, "unet").noise_schedule_hints()
    return settings


def _new_unet(config: ModelConfig) -> UNet2DConditionModel:
    unet_config = _read_unet_config(config)
    try:
        return UNet2DConditionModel.from_config(unet_config)
    # diffusers does not check a configuration: its blocks raise whatever they raise.
    except Exception as error:
        words = one_line(error)
        place = f"--unet_config {config.unet_config}" if config.unet_config else "the model's unet/config.json"
        raise RecipeError(f"{place} does not describe a UNet2DConditionModel: {words}") from error


def _read_unet_config(config: ModelConfig) -> dict[str, Any]:
    if config.unet_config is None:
        try:
            return source_of(config, "unet").read_config("unet")
        except RecipeError as error:
            raise RecipeError(
                f"--train_from_scratch: no UNet configuration, give --unet_config FILE ({one_line(error)})"
            ) from error
    path = Path(config.unet_config)
    if not path.is_file():
        raise RecipeError(f"--unet_config {path}: no such file")
    try:
        unet_config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"--unet_config {path}: not a JSON file: {error}") from None
    if not isinstance(unet_config, dict):
        raise RecipeError(f"--unet_config {path}: not a JSON object of settings")
    known = inspect.signature(UNet2DConditionModel.__init__).parameters
    for key in unet_config:
        if key not in known and not key.startswith("_"):  # such as _class_name and _diffusers_version
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            raise RecipeError(f"--unet_config {path}: unknown key {key!r}{hint}")
    return unet_config
