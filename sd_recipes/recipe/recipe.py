"""The recipe as a whole: its sections, and the checks of settings from several of them."""

import math
import re
from typing import Any, cast

from pydantic import ConfigDict, model_validator

from sd_recipes.optimizers import EIGHT_BIT_ADAMW
from sd_recipes.recipe.captions import CaptionConfig
from sd_recipes.recipe.data import CacheConfig, DataConfig, DataSettings
from sd_recipes.recipe.images import ImageConfig, MaskConfig
from sd_recipes.recipe.memory import MemoryConfig
from sd_recipes.recipe.model import LoraConfig, ModelConfig, TextEncoderConfig
from sd_recipes.recipe.objective import ObjectiveConfig
from sd_recipes.recipe.optimization import DIFFUSERS_LENGTH, OptimConfig
from sd_recipes.recipe.prior_preservation import PriorConfig
from sd_recipes.recipe.run import CheckpointConfig, HubConfig, RunConfig
from sd_recipes.recipe.section import OnResume, Section
from sd_recipes.recipe.validation import ValidationConfig
from sd_recipes.redaction import redacted

ONLY_IN_FILES = {"data_sources"}  # settings that have no flag
SECTIONS: tuple[type[Section], ...] = (
    RunConfig, ModelConfig, TextEncoderConfig, LoraConfig, DataConfig, ImageConfig, MaskConfig, PriorConfig,
    CaptionConfig, CacheConfig, ObjectiveConfig, OptimConfig, MemoryConfig, CheckpointConfig, ValidationConfig,
    HubConfig,
)  # fmt: skip


class Recipe(
    RunConfig, ModelConfig, TextEncoderConfig, LoraConfig, DataSettings, ObjectiveConfig, OptimConfig, MemoryConfig,
    CheckpointConfig, ValidationConfig, HubConfig,
):  # fmt: skip
    """All settings of a run, frozen. Raises pydantic's ValidationError, which `load_recipe` turns into RecipeError."""

    model_config = ConfigDict(frozen=True)

    @property
    def images_at_once(self) -> int:
        """How many images a device takes at once, as long as there is memory for them."""
        given = self.micro_batch if isinstance(self.micro_batch, int) else self.train_batch_size
        return min(given, self.train_batch_size)

    @model_validator(mode="before")
    @classmethod
    def name_the_optimizer(cls, settings: Any) -> Any:
        """`--use_8bit_adam` is another way to say `--optimizer adamw8bit`."""
        if isinstance(settings, dict) and settings.get("use_8bit_adam") is True:
            return {
                **settings,
                "optimizer": {"adamw": "adamw8bit"}.get(name := settings.get("optimizer", "adamw"), name),
            }
        return settings

    @model_validator(mode="before")
    @classmethod
    def name_what_is_compiled(cls, settings: Any) -> Any:
        """`--compile_unet` is another way to say `--compile unet`."""
        if isinstance(settings, dict) and settings.get("compile_unet") is True and settings.get("compile") is None:
            return {**settings, "compile": "unet"}
        return settings

    @model_validator(mode="before")
    @classmethod
    def name_the_rank(cls, settings: Any) -> Any:
        """`--rank` is another way to say `--lora_rank`."""
        if isinstance(settings, dict) and settings.get("rank") is not None and settings.get("lora_rank") is None:
            return {**settings, "lora_rank": settings["rank"]}
        return settings

    @model_validator(mode="after")
    def lora_agrees(self) -> "Recipe":
        if self.rank not in (None, self.lora_rank):
            raise ValueError(f"--rank {self.rank} contradicts --lora_rank {self.lora_rank}: drop one of them")
        for name, field in LoraConfig.model_fields.items():
            value = getattr(self, name)
            if value != field.default and not self.trains_lora:
                raise ValueError(
                    f"{redacted(_as_flag(name, value))} is not read without --lora_rank: add --lora_rank 8, or drop it"
                )
        if self.lora_weights is not None:
            for name in ("lora_targets", "lora_use_dora"):
                if value := getattr(self, name):
                    raise ValueError(
                        f"{_as_flag(name, value)} contradicts --lora_weights, which says so by itself: drop it"
                    )
        if self.trains_lora and self.train_from_scratch:
            flag = "--lora_rank" if self.lora_weights is None else "--lora_weights"
            raise ValueError(
                f"{flag} changes a trained UNet, and --train_from_scratch has none: drop --train_from_scratch, or "
                f"train the UNet whole, without {flag}"
            )
        return self

    @model_validator(mode="after")
    def text_encoder_agrees(self) -> "Recipe":
        if self.train_text_encoder and self.trains_lora:
            raise ValueError(
                "--train_text_encoder trains the whole text encoder, which a LoRA's file cannot hold: use "
                "--lora_text_encoder, or drop the LoRA"
            )
        is_trained = self.train_text_encoder or self.lora_text_encoder
        for name in ("text_encoder_learning_rate", "text_encoder_steps"):
            if (value := getattr(self, name)) is not None and not is_trained:
                add = "--lora_text_encoder" if self.trains_lora else "--train_text_encoder"
                raise ValueError(
                    f"{_as_flag(name, value)} is of a text encoder that is trained, and it is not: add {add}, or drop "
                    f"--{name}"
                )
        if is_trained and self.cache_text:
            raise ValueError(
                "--cache_text keeps what the text encoder says of a caption, which changes as it is trained: drop it"
            )
        return self

    @model_validator(mode="after")
    def check(self) -> "Recipe":
        if self.pretrained_model_name_or_path is None and not self.dry_run:  # which looks at the data alone then
            raise ValueError(
                "--pretrained_model_name_or_path is missing: give a pipeline folder, a single file, a Hub id, or "
                "sd-recipes/tiny-emoji"
            )
        if self.streaming and self.max_train_steps is None:
            raise ValueError("--streaming does not know the number of rows: give --max_train_steps")
        if self.hub_token is not None:
            raise ValueError(
                "--hub_token is refused, because flags are written to logs: log in with `hf auth login`, "
                "or set the environment variable HF_TOKEN"
            )
        if self.unet_config and not self.train_from_scratch:
            raise ValueError(
                "--unet_config describes a UNet without weights: add --train_from_scratch, or drop --unet_config"
            )
        if self.train_from_scratch and self.non_ema_revision:
            raise ValueError("--train_from_scratch loads no UNet, so --non_ema_revision contradicts it: drop one")
        if self.use_8bit_adam and self.optimizer not in EIGHT_BIT_ADAMW:
            raise ValueError(f"--use_8bit_adam contradicts --optimizer {self.optimizer}: drop one of them")
        if self.compile_unet and self.compile != "unet":
            raise ValueError(f"--compile_unet contradicts --compile {self.compile}: drop one of them")
        if self.ema_length != DIFFUSERS_LENGTH and self.ema_decay != OptimConfig.model_fields["ema_decay"].default:
            raise ValueError(
                f"--ema_decay {self.ema_decay} contradicts --ema_length {self.ema_length}, which gives the decays: "
                f"leave --ema_decay at 0.9999, or --ema_length at {DIFFUSERS_LENGTH}"
            )
        if self.overwrite and self.resume_from_checkpoint:
            raise ValueError("--overwrite starts over, which --resume_from_checkpoint contradicts: drop one")
        if self.validation_clip_model and not self.draws_pictures:
            raise ValueError(
                "--validation_clip_model scores validation pictures: give some --validation_prompts, or a "
                "--validation_split whose captions are drawn"
            )
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.tracker_project_name) or set(self.tracker_project_name) == {"."}:
            raise ValueError(
                f"--tracker_project_name {redacted(self.tracker_project_name)!r} becomes a folder's name: "
                "use letters, digits, dot, dash and underscore"
            )
        trackers = {"tensorboard", "wandb", "comet_ml", "all", "none"}
        if self.report_to not in trackers:
            raise ValueError(f"--report_to {redacted(self.report_to)!r} is not one of: {', '.join(sorted(trackers))}")
        if self.needs_contiguous_weights and self.channels_last == "always":
            raise ValueError(
                f"--channels_last always contradicts --optimizer {self.optimizer}, which needs contiguous weights: use "
                "auto"
            )
        if self.gradient_checkpointing and self.gradient_checkpointing_blocks:
            raise ValueError(
                "--gradient_checkpointing recomputes all blocks, and --gradient_checkpointing_blocks "
                f"{' '.join(self.gradient_checkpointing_blocks)} only some: drop one"
            )
        if self.fused_backward_pass and self.max_grad_norm not in (0, math.inf):
            raise ValueError(
                "--fused_backward_pass steps before the norm of all gradients is known, so that nothing can be clipped "
                "to it: add --max_grad_norm 0, or drop --fused_backward_pass"
            )
        if self.fused_backward_pass and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "--fused_backward_pass frees each gradient at once, which --gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} adds up: use a larger --train_batch_size, or drop one"
            )
        if self.fused_backward_pass and self.has_class_pictures:
            raise ValueError(
                "--fused_backward_pass steps within one backward pass, and class pictures (--class_data_dir, is_reg) "
                "take another: drop one"
            )
        for name, value in (("num_class_images", None), ("prior_preservation", "pictures")):
            if self.train_from_scratch and getattr(self, name) != value:
                raise ValueError(
                    f"--{name} {getattr(self, name)} needs what the model knows before it is trained, which with "
                    "--train_from_scratch is nothing: drop one"
                )
        if self.prior_preservation == "model" and self.rescale_betas_zero_snr:
            raise ValueError(
                "--prior_preservation model asks the model as it was, which does not know the noise of "
                "--rescale_betas_zero_snr: use --prior_preservation pictures, or drop one"
            )
        if self.compile == "graphs" and self.prior_preservation == "model" and self.trains_lora:
            raise ValueError(
                "--compile graphs writes all predictions of a UNet to the same memory, and with a LoRA the targets of "
                "--prior_preservation model are predictions of the same UNet: use --compile unet"
            )
        if self.fused_backward_pass and self.micro_batch not in (None, self.train_batch_size):
            raise ValueError(
                "--fused_backward_pass steps within one backward pass, which --micro_batch "
                f"{self.micro_batch} divides: drop one"
            )
        return self


def _as_flag(name: str, value: Any) -> str:
    """A setting as it is given on the command line."""
    if value is True:
        return f"--{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def on_resume(name: str) -> OnResume:
    """What a change of the setting `name` means for a resumed run."""
    extra = Recipe.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return cast(OnResume, extra["on_resume"])
