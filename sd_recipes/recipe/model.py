"""Settings of the model that training starts from, and of what is trained of it: text encoder, LoRA."""

from typing import Annotated, Any

from pydantic import BeforeValidator, model_validator

from sd_recipes.recipe.section import Number, Section, also_called, setting


def _list_from_text(value: Any) -> Any:
    """A recipe file may give a single name without brackets."""
    return [value] if isinstance(value, str) else value


class ModelConfig(Section):
    """Model: the pipeline that training starts from."""

    pretrained_model_name_or_path: str | None = setting(
        None,
        "compared",
        "A pipeline folder in diffusers format, a single file (.safetensors), a Hub id, or sd-recipes/tiny-emoji.",
    )
    vae: str | None = setting(
        None, "warned", "Another VAE than the model's: a file, a folder, or a Hub id, of a VAE or of a pipeline."
    )
    pretrained_vae_model_name_or_path: str | None = setting(
        None, "free", "Same as --vae, as diffusers' SDXL scripts call it."
    )
    base: str | None = setting(
        None,
        "warned",
        "The model whose parts fill in what --pretrained_model_name_or_path lacks, such as all but the UNet; a file "
        "takes its configuration from it, too.",
    )
    allow_pickle_weights: bool = setting(
        False, "free", "Read weights in .ckpt and .bin files too, without running code that they may hold."
    )
    revision: str | None = setting(None, "warned", "Branch, tag or commit of the Hub model.")
    variant: str | None = setting(None, "warned", "Variant of the weight files, such as fp16.")
    non_ema_revision: str | None = setting(
        None, "compared", "Revision of the UNet only (deprecated: use --variant non_ema)."
    )
    cache_dir: str | None = setting(None, "free", "Where downloads are cached.")
    clip_skip: int | None = setting(
        None,
        "refused",
        "Leave out so many of the text encoder's last layers, as diffusers counts: 1 is A1111's and sd-scripts' 2; of "
        "SDXL, so many before the last, which it never uses.",
        ge=1,
    )
    train_from_scratch: bool = setting(False, "compared", "Start from a UNet with random weights.")
    unet_config: str | None = setting(
        None, "compared", "JSON file with the UNet's configuration (needs --train_from_scratch)."
    )

    @model_validator(mode="before")
    @classmethod
    def name_the_vae(cls, settings: Any) -> Any:
        return also_called(settings, "vae", "pretrained_vae_model_name_or_path")


class TextEncoderConfig(Section):
    """Text encoder: whether it is trained along with the UNet, how fast, and for how long."""

    train_text_encoder: bool = setting(False, "compared", "Train the text encoder too.")
    text_encoder_learning_rate: Number | None = setting(
        None, "warned", "Its learning rate, also with --lora_text_encoder; if not given, --learning_rate.", ge=0
    )
    text_encoder_steps: int | None = setting(
        None, "warned", "Freeze it after so many optimizer steps; if not given, never.", ge=1
    )


class LoraConfig(Section):
    """LoRA: small changes to the model that are trained in its place, a file of megabytes."""

    lora_rank: int | None = setting(None, "compared", "Train a LoRA of this rank; 4 to 64 are usual.", ge=1)
    lora_alpha: Number | None = setting(
        None, "compared", "Changes are scaled by this over the rank; if not given, the rank.", gt=0, allow_inf_nan=False
    )
    lora_dropout: Number = setting(0.0, "warned", "Dropout of the changes' input.", ge=0, lt=1)
    lora_targets: Annotated[list[str] | None, BeforeValidator(_list_from_text)] = setting(
        None,
        "compared",
        "The layers that are changed: `attention` (if not given), `all` in the blocks, or names such as attn2 or ff.",
        min_length=1,
    )
    lora_use_dora: bool = setting(False, "compared", "DoRA: train the length of each changed weight apart.")
    lora_text_encoder: bool = setting(False, "compared", "Change the text encoder too.")
    lora_weights: str | None = setting(
        None, "compared", "Start from this LoRA: a .safetensors file with diffusers' or kohya's keys, or its folder."
    )
    rank: int | None = setting(None, "free", "Same as --lora_rank, as diffusers' LoRA script calls it.", ge=1)

    @property
    def trains_lora(self) -> bool:
        """Whether a LoRA is trained, and not the model itself."""
        return self.lora_rank is not None or self.lora_weights is not None

    @property
    def product(self) -> str:
        """What the run leaves in its folder, in a word."""
        return "LoRA" if self.trains_lora else "pipeline"
