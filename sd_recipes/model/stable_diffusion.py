"""Stable Diffusion 1 and 2: one CLIP text model, whose hidden states condition the UNet."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sd_recipes.data.captions import tokenize
from sd_recipes.errors import RecipeError, one_line
from sd_recipes.model.components import Components, load_part, load_sampler, load_unet, load_vae, read_settings
from sd_recipes.model.conditioning import Conditioning, TextStates
from sd_recipes.model.family import Family
from sd_recipes.model.sources import source_of
from sd_recipes.recipe import CaptionConfig, ModelConfig

if TYPE_CHECKING:
    from sd_recipes.data.batches import Batch

logger = logging.getLogger(__name__)


@dataclass
class StableDiffusionComponents(Components):
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer | None  # None in an outline without weights


class StableDiffusion(Family):
    pipeline_class = StableDiffusionPipeline
    text_models = ("text_encoder",)
    folders = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    def load_tokenizer(self, config: ModelConfig) -> CLIPTokenizer:
        source, settings = read_settings(config, "text_encoder")
        try:
            positions = _text_config(settings).max_position_embeddings
        except Exception as error:  # transformers checks it with errors of its own
            source.cannot_load("text_encoder", f"its configuration does not describe one ({one_line(error)})", error)
        tokenizer = source_of(config, "tokenizer").tokenizer()
        if tokenizer.model_max_length > positions:  # transformers' "unlimited", where tokenizer_config.json gives none
            logger.info("The tokenizer's length is the text encoder's: %d tokens.", positions)
            tokenizer.model_max_length = positions
        return tokenizer

    def tokenize(self, tokenizer: CLIPTokenizer, captions: list[str], config: CaptionConfig) -> torch.Tensor:
        return tokenize(tokenizer, captions, config)

    def load(
        self,
        config: ModelConfig,
        scheduler: DDPMScheduler,
        tokenizer: CLIPTokenizer | None,
        *,
        weights: bool = True,
    ) -> StableDiffusionComponents:
        text_encoder = load_part(
            config, "text_encoder", lambda settings: CLIPTextModel(_text_config(settings)), weights=weights
        )
        components = StableDiffusionComponents(
            vae=load_vae(config, weights=weights),
            unet=load_unet(config, weights=weights),
            scheduler=scheduler,
            sampler=load_sampler(config, scheduler),
            text_encoder=text_encoder.requires_grad_(False).eval(),
            tokenizer=tokenizer,
            clip_skip=config.clip_skip,
        )
        _check_fit(components, config)
        return components

    def encode_text(self, components: Components, input_ids: torch.Tensor) -> TextStates:
        assert isinstance(components, StableDiffusionComponents)
        return {"encoder_hidden_states": hidden_states(components.text_encoder, input_ids, components.clip_skip)}

    @torch.no_grad()
    def prompt_arguments(self, components: Components, prompts: list[str]) -> dict[str, Any]:
        """With --clip_skip the text states are made here, as diffusers' pipeline makes them from its `clip_skip`.

        That fails with transformers from 5.6 on (huggingface/diffusers#14124). It means the prompts alone: what they
        are guided away from is encoded by all layers.
        """
        assert isinstance(components, StableDiffusionComponents)
        if components.clip_skip is None:
            return super().prompt_arguments(components, prompts)
        assert components.tokenizer is not None
        input_ids = self.tokenize(components.tokenizer, prompts, CaptionConfig())
        return {"prompt_embeds": hidden_states(components.text_encoder, input_ids, components.clip_skip)}

    def conditioning(self, states: TextStates, batch: Batch) -> Conditioning:
        return states

    def build_pipeline(self, components: Components) -> StableDiffusionPipeline:
        assert isinstance(components, StableDiffusionComponents)
        return StableDiffusionPipeline(
            vae=components.vae,
            text_encoder=components.text_encoder,
            tokenizer=components.tokenizer,
            unet=components.unet,
            scheduler=copy.deepcopy(components.sampler),  # sampling leaves state in it
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def hidden_states(text_encoder: CLIPTextModel, input_ids: torch.Tensor, clip_skip: int | None = None) -> torch.Tensor:
    """(B, n * L) int64 to the text model's last hidden states (B, n * L, D), each chunk of L encoded separately.

    Or to those of `clip_skip` layers before the last, through the same final norm.

    The ids may be in host memory; the states are on the text model's device. They have a graph if it is trained.
    """
    length = min(input_ids.shape[1], text_encoder.config.max_position_embeddings)
    chunks = input_ids.reshape(-1, length).to(text_encoder.device, non_blocking=True)
    if clip_skip is None:
        states = text_encoder(chunks, return_dict=False)[0]
    else:
        states = text_encoder(chunks, output_hidden_states=True).hidden_states[-1 - clip_skip]
        states = text_encoder.final_layer_norm(states)
    return states.reshape(len(input_ids), -1, states.shape[-1])


def _text_config(settings: dict[str, Any]) -> CLIPTextConfig:
    """Of a text encoder's config.json, or of one of a whole CLIP, which has it inside."""
    return CLIPTextConfig.from_dict(settings.get("text_config") or settings)


def _check_fit(components: StableDiffusionComponents, config: ModelConfig) -> None:
    unet, vae, text_encoder = components.unet.config, components.vae.config, components.text_encoder.config
    place = "the model's unet/config.json" if config.train_from_scratch else "the model's parts do not fit"
    place = f"--unet_config {config.unet_config}" if config.unet_config else place

    def way_out(setting: str, value: int) -> str:
        if config.train_from_scratch:
            return f"set {setting} to {value}"
        return "its parts are of different models, so choose a model, --vae or --base that belong together"

    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise RecipeError(
            f"{place}: the UNet takes {unet.in_channels} and gives {unet.out_channels} channels, the VAE's latents "
            f"have {vae.latent_channels}: {way_out('in_channels and out_channels', vae.latent_channels)}"
        )
    if unet.cross_attention_dim != text_encoder.hidden_size:
        raise RecipeError(
            f"{place}: cross_attention_dim is {unet.cross_attention_dim}, the text encoder's states have "
            f"{text_encoder.hidden_size} values: {way_out('cross_attention_dim', text_encoder.hidden_size)}"
        )
    for name in ("class_embed_type", "num_class_embeds", "addition_embed_type", "time_cond_proj_dim"):
        if unet.get(name) is not None:
            raise RecipeError(
                f"{place}: {name} asks for a condition besides the caption, and there is none: "
                + ("drop it" if config.train_from_scratch else "choose a model without it")
            )
    if config.clip_skip is not None and config.clip_skip > text_encoder.num_hidden_layers:
        raise RecipeError(
            f"--clip_skip {config.clip_skip} leaves out more layers than the {text_encoder.num_hidden_layers} that the "
            f"model's text encoder has: use 1, which A1111 calls 2, or up to {text_encoder.num_hidden_layers - 1}"
        )
    if components.tokenizer is not None and len(components.tokenizer) > text_encoder.vocab_size:
        raise RecipeError(
            f"the tokenizer has {len(components.tokenizer)} tokens, and the text encoder knows "
            f"{text_encoder.vocab_size}: use the two of one model"
        )
