"""CLIP's text models and tokenizers, which pipelines of all families have one or two of."""

from __future__ import annotations

import json
import logging
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTokenizer

from sd_recipes import assets
from sd_recipes.errors import RecipeError, one_line
from sd_recipes.model.components import read_settings
from sd_recipes.model.sources import source_of
from sd_recipes.recipe import ModelConfig

logger = logging.getLogger(__name__)


def text_config(settings: dict[str, Any]) -> CLIPTextConfig:
    """Of a text encoder's config.json, or of one of a whole CLIP, which has it inside."""
    return CLIPTextConfig.from_dict(settings.get("text_config") or settings)


def load_tokenizer(config: ModelConfig, part: str = "tokenizer") -> CLIPTokenizer:
    """The tokenizer of `part`, no longer than its text encoder's positions. Raises RecipeError."""
    text_encoder = part.replace("tokenizer", "text_encoder")
    source, settings = read_settings(config, text_encoder)
    try:
        positions = text_config(settings).max_position_embeddings
    except Exception as error:  # transformers checks it with errors of its own
        source.cannot_load(text_encoder, f"its configuration does not describe one ({one_line(error)})", error)
    tokenizer = source_of(config, part).tokenizer(part)
    if tokenizer.model_max_length > positions:  # transformers' "unlimited", where tokenizer_config.json gives none
        logger.info("The tokenizer's length is the text encoder's: %d tokens.", positions)
        tokenizer.model_max_length = positions
    return tokenizer


def known_tokenizer() -> CLIPTokenizer:
    """The one that comes with the package, of Stable Diffusion 1: all of its models cut captions into these tokens."""
    folder = assets.CONFIGURATIONS[1] / "tokenizer"
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return CLIPTokenizer.from_pretrained(str(assets.CLIP_TOKENIZER), **settings)


def in_chunks(text_encoder: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, n * L) int64, maybe in host memory, to (B * n, L) on the text model's device: each chunk is encoded alone."""
    length = min(input_ids.shape[1], text_encoder.config.max_position_embeddings)
    return input_ids.reshape(-1, length).to(text_encoder.device, non_blocking=True)


class Fit:
    """Checks that a model's parts belong together, whose messages name the place and the way out."""

    def __init__(self, config: ModelConfig) -> None:
        self.from_scratch = config.train_from_scratch
        self.clip_skip = config.clip_skip
        self.place = "the model's unet/config.json" if self.from_scratch else "the model's parts do not fit"
        if config.unet_config:
            self.place = f"--unet_config {config.unet_config}"

    def check_channels(self, unet: Any, vae: Any) -> None:
        """Of the UNet's and the VAE's configurations. Raises RecipeError."""
        if not unet.in_channels == unet.out_channels == vae.latent_channels:
            way_out = self.way_out("in_channels and out_channels", vae.latent_channels)
            raise RecipeError(
                f"{self.place}: the UNet takes {unet.in_channels} and gives {unet.out_channels} channels, the VAE's "
                f"latents have {vae.latent_channels}: {way_out}"
            )

    def check_text_states(self, unet: Any, width: int, of: str) -> None:
        """Raises RecipeError unless the UNet attends to states of that width."""
        if unet.cross_attention_dim != width:
            raise RecipeError(
                f"{self.place}: cross_attention_dim is {unet.cross_attention_dim}, {of} have {width} values: "
                f"{self.way_out('cross_attention_dim', width)}"
            )

    def check_no_other_condition(self, unet: Any, *names: str) -> None:
        """Raises RecipeError for a UNet that asks for one of these."""
        for name in names:
            if unet.get(name) is not None:
                raise RecipeError(
                    f"{self.place}: {name} asks for a condition besides the caption, and there is none: "
                    + ("drop it" if self.from_scratch else "choose a model without it")
                )

    def check_vocabulary(self, tokenizer: CLIPTokenizer | None, text_encoder: Any) -> None:
        """Raises RecipeError for a tokenizer that knows more tokens than the text encoder, given its configuration."""
        if tokenizer is not None and len(tokenizer) > text_encoder.vocab_size:
            raise RecipeError(
                f"the tokenizer has {len(tokenizer)} tokens, and the text encoder knows {text_encoder.vocab_size}: use "
                "the two of one model"
            )

    def check_clip_skip(self, num_layers: int) -> None:
        """Raises RecipeError if more are to be left out than these layers of a text encoder."""
        if self.clip_skip is not None and self.clip_skip > num_layers:
            raise RecipeError(
                f"--clip_skip {self.clip_skip} is more than the {num_layers} layers of the model's text encoder that "
                f"can be left out: use at most {num_layers}, or drop it"
            )

    def way_out(self, setting: str, value: int) -> str:
        if self.from_scratch:
            return f"set {setting} to {value}"
        return "its parts are of different models, so choose a model, --vae or --base that belong together"
