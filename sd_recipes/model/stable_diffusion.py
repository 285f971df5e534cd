"""Stable Diffusion 1 and 2: one CLIP text model, whose last hidden states condition the UNet."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from sd_recipes.data.captions import tokenize
from sd_recipes.model.clip import Fit, in_chunks, load_tokenizer, text_config
from sd_recipes.model.components import Components, load_part, load_sampler, load_unet, load_vae
from sd_recipes.model.conditioning import Conditioning, TextStates
from sd_recipes.model.family import Family
from sd_recipes.recipe import CaptionConfig, ModelConfig

if TYPE_CHECKING:
    from sd_recipes.data.batches import Batch


@dataclass
class StableDiffusionComponents(Components):
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer | None  # None in an outline without weights


class StableDiffusion(Family):
    pipeline_class = StableDiffusionPipeline
    text_models = ("text_encoder",)
    folders = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    def load_tokenizers(self, config: ModelConfig) -> tuple[CLIPTokenizer, ...]:
        return (load_tokenizer(config),)

    def tokenize(self, tokenizers: Sequence[CLIPTokenizer], captions: list[str], config: CaptionConfig) -> torch.Tensor:
        (tokenizer,) = tokenizers
        return tokenize(tokenizer, captions, config)

    def load(
        self,
        config: ModelConfig,
        scheduler: DDPMScheduler,
        tokenizers: Sequence[CLIPTokenizer],
        *,
        weights: bool = True,
    ) -> StableDiffusionComponents:
        text_encoder = load_part(
            config, "text_encoder", lambda settings: CLIPTextModel(text_config(settings)), weights=weights
        )
        components = StableDiffusionComponents(
            vae=load_vae(config, weights=weights),
            unet=load_unet(config, weights=weights),
            scheduler=scheduler,
            sampler=load_sampler(config, scheduler),
            text_encoder=text_encoder.requires_grad_(False).eval(),
            tokenizer=next(iter(tokenizers), None),
        )
        _check_fit(components, config)
        return components

    def encode_text(self, components: Components, input_ids: torch.Tensor) -> TextStates:
        assert isinstance(components, StableDiffusionComponents)
        return {"encoder_hidden_states": last_hidden_states(components.text_encoder, input_ids)}

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


def last_hidden_states(text_encoder: CLIPTextModel, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, n * L) int64 to the text model's last hidden states (B, n * L, D), each chunk of L encoded separately.

    The ids may be in host memory; the states are on the text model's device. They have a graph if it is trained.
    """
    states = text_encoder(in_chunks(text_encoder, input_ids), return_dict=False)[0]
    return states.reshape(len(input_ids), -1, states.shape[-1])


def _check_fit(components: StableDiffusionComponents, config: ModelConfig) -> None:
    unet, text_encoder, fit = components.unet.config, components.text_encoder.config, Fit(config)
    fit.check_channels(unet, components.vae.config)
    fit.check_text_states(unet, text_encoder.hidden_size, "the text encoder's states")
    fit.check_no_other_condition(
        unet, "class_embed_type", "num_class_embeds", "addition_embed_type", "time_cond_proj_dim"
    )
    fit.check_vocabulary(components.tokenizer, text_encoder)
