"""Stable Diffusion 1 and 2: one CLIP text model, whose hidden states condition the UNet."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        input_ids = self.tokenize([components.tokenizer], prompts, CaptionConfig())
        return {"prompt_embeds": hidden_states(components.text_encoder, input_ids, components.clip_skip)}

    def without_effect(self, components: Components) -> Mapping[str, tuple[str, ...]]:
        """The layers that --clip_skip leaves out."""
        assert isinstance(components, StableDiffusionComponents)
        num_layers = components.text_encoder.config.num_hidden_layers
        left_out = range(num_layers - (components.clip_skip or 0), num_layers)
        return {"text_encoder": tuple(f"encoder.layers.{number}." for number in left_out)}

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
    chunks = in_chunks(text_encoder, input_ids)
    if clip_skip is None:
        states = text_encoder(chunks, return_dict=False)[0]
    else:
        states = text_encoder(chunks, output_hidden_states=True).hidden_states[-1 - clip_skip]
        states = text_encoder.final_layer_norm(states)
    return states.reshape(len(input_ids), -1, states.shape[-1])


def _check_fit(components: StableDiffusionComponents, config: ModelConfig) -> None:
    unet, text_encoder, fit = components.unet.config, components.text_encoder.config, Fit(config)
    fit.check_channels(unet, components.vae.config)
    fit.check_text_states(unet, text_encoder.hidden_size, "the text encoder's states")
    fit.check_no_other_condition(
        unet, "class_embed_type", "num_class_embeds", "addition_embed_type", "time_cond_proj_dim"
    )
    fit.check_vocabulary(components.tokenizer, text_encoder)
    fit.check_clip_skip(text_encoder.num_hidden_layers)
