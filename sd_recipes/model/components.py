"""The parts that pipelines of all families have, each loaded by its own class, from safetensors only.

A repository cannot choose a class, except a sampler from SAMPLERS, and none of its code is run.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler

from sd_recipes import assets
from sd_recipes.errors import RecipeError, one_line
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


@dataclass
class Components:
    """What every pipeline is made of; a family adds its text models and tokenizers."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDPMScheduler  # of training
    sampler: SchedulerMixin  # of the pipeline
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
        for scheduler in (self.scheduler, self.sampler):
            scheduler.register_to_config(prediction_type=prediction_type)

    def rescale_to_zero_snr(self) -> None:
        """Noise schedules that end in pure noise, and sampling from there (Lin et al. 2023, sections 3.1 and 3.3)."""
        self._replace_pndm("from pure noise")
        changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        self.scheduler = DDPMScheduler.from_config(self.scheduler.config, **changes)
        self.sampler = type(self.sampler).from_config(self.sampler.config, **changes)

    def _replace_pndm(self, what: str) -> None:
        if isinstance(self.sampler, PNDMScheduler):
            logger.warning("PNDM cannot sample %s: the pipeline gets DDIM.", what)
            # DDIM's default is to clip x_0 to [-1, 1], which latents exceed.
            self.sampler = DDIMScheduler.from_config(self.sampler.config, clip_sample=False)


def _scale_factor(vae: AutoencoderKL) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_shape_of(vae: AutoencoderKL) -> Callable[[tuple[int, int]], tuple[int, int, int]]:
    """The function from an image's (height, width) to its latents' (C, h, w); it holds no model."""
    return partial(_latent_shape, vae.config.latent_channels, _scale_factor(vae))


def _latent_shape(channels: int, factor: int, size: tuple[int, int]) -> tuple[int, int, int]:
    height, width = size
    return channels, height // factor, width // factor


def load_vae(config: ModelConfig) -> AutoencoderKL:
    """The VAE in float32, frozen. Raises RecipeError."""
    vae = source_of(config).load_model(AutoencoderKL, "vae", torch_dtype=torch.float32)
    vae.requires_grad_(False)
    return vae.eval()


def load_scheduler(config: ModelConfig) -> DDPMScheduler:
    """The training scheduler. Raises RecipeError."""
    return source_of(config).load(DDPMScheduler, "scheduler")


def load_unet(config: ModelConfig) -> UNet2DConditionModel:
    """The UNet in float32, or a new one with random weights. Raises RecipeError."""
    source = source_of(config)
    if config.train_from_scratch:
        return _new_unet(config, source)
    return source.load_model(UNet2DConditionModel, "unet", torch_dtype=torch.float32)


def load_sampler(config: ModelConfig, scheduler: DDPMScheduler) -> SchedulerMixin:
    """The scheduler class that the model's own scheduler_config.json names, if it is a known one."""
    source = source_of(config)
    saved = DDPMScheduler.load_config(
        source.name, subfolder="scheduler", revision=config.revision, cache_dir=config.cache_dir
    )
    name = str(saved.get("_class_name", "DDIMScheduler"))
    if name not in SAMPLERS:
        logger.warning("The model's scheduler %s is not one of %s: DDIM is used.", name, ", ".join(SAMPLERS))
    return SAMPLERS.get(name, DDIMScheduler).from_config(saved)


@dataclass
class Source:
    """A pipeline folder or Hub repository, from which parts are loaded by class."""

    name: str
    config: ModelConfig

    def __post_init__(self) -> None:
        looks_like_path = self.name.startswith((".", "/", "~")) or self.name.count("/") > 1
        if looks_like_path and not Path(self.name).is_dir():
            raise RecipeError(f"--pretrained_model_name_or_path {self.name}: no such folder")

    def load(self, part: Any, subfolder: str, **options: Any) -> Any:
        options = {
            "subfolder": subfolder,
            "revision": self.config.revision,
            "cache_dir": self.config.cache_dir,
            **options,
        }
        if Path(self.name).is_dir() and not (Path(self.name) / subfolder).is_dir():
            raise RecipeError(
                f"--pretrained_model_name_or_path {self.name} lacks the folder {subfolder}/: a pipeline in diffusers "
                "format has unet/, vae/, text_encoder/, tokenizer/ and scheduler/"
            )
        try:
            return part.from_pretrained(self.name, **options)
        # diffusers, transformers and huggingface_hub report an absent, broken or forbidden part with
        # OSError, ValueError, KeyError, RuntimeError, JSONDecodeError and SafetensorError: no common
        # base. All of them are about the model that the user named.
        except Exception as error:
            words = one_line(error, 400)
            raise RecipeError(
                f"--pretrained_model_name_or_path {self.name}: cannot load {subfolder} ({part.__name__}): {words}"
            ) from error

    def load_model(self, part: Any, subfolder: str, **options: Any) -> Any:
        revision = self.config.revision
        if subfolder == "unet" and self.config.non_ema_revision:
            logger.warning("--non_ema_revision is deprecated: use --variant non_ema")
            revision = self.config.non_ema_revision
        options = {"variant": self.config.variant, "use_safetensors": True, **options, "revision": revision}
        return self.load(part, subfolder, **options)


def source_of(config: ModelConfig) -> Source:
    return Source(assets.resolve(config.pretrained_model_name_or_path or ""), config)


def _new_unet(config: ModelConfig, source: Source) -> UNet2DConditionModel:
    unet_config = _read_unet_config(config, source)
    try:
        return UNet2DConditionModel.from_config(unet_config)
    # diffusers does not check a configuration: its blocks raise whatever they raise.
    except Exception as error:
        words = one_line(error)
        place = f"--unet_config {config.unet_config}" if config.unet_config else "the model's unet/config.json"
        raise RecipeError(f"{place} does not describe a UNet2DConditionModel: {words}") from error


def _read_unet_config(config: ModelConfig, source: Source) -> dict[str, Any]:
    if config.unet_config is None:
        try:
            return UNet2DConditionModel.load_config(
                source.name, subfolder="unet", revision=config.revision, cache_dir=config.cache_dir
            )
        except OSError as error:
            words = one_line(error)
            raise RecipeError(
                f"--train_from_scratch: no UNet configuration, give --unet_config FILE ({words})"
            ) from error
    path = Path(config.unet_config)
    if not path.is_file():
        raise RecipeError(f"--unet_config {path}: no such file")
    try:
        unet_config = json.loads(path.read_text())
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
