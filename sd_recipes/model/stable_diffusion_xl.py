"""SDXL (Podell et al. 2023): two CLIP text models, and sizes as conditions of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sd_recipes.data.captions import tokenize
from sd_recipes.errors import RecipeError
from sd_recipes.model.clip import Fit, in_chunks, load_tokenizer, text_config
from sd_recipes.model.components import Components, load_part, load_sampler, load_unet, load_vae
from sd_recipes.model.conditioning import Conditioning, TextStates
from sd_recipes.model.family import Family
from sd_recipes.model.sources import source_of
from sd_recipes.recipe import CaptionConfig, ModelConfig

if TYPE_CHECKING:
    from sd_recipes.data.batches import Batch

NUM_TIME_IDS = 6  # height and width of the original, top and left of the crop, height and width of the target


@dataclass
class StableDiffusionXLComponents(Components):
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer | None  # None in an outline without weights, as the second
    tokenizer_2: CLIPTokenizer | None
    # Whether sampling without a caption is with zeros for text states, as model_index.json says.
    zeros_for_empty: bool


class StableDiffusionXL(Family):
    pipeline_class = StableDiffusionXLPipeline
    text_models = ("text_encoder", "text_encoder_2")
    folders = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    vae_overflows = True
    text_layer = 2

    def load_tokenizers(self, config: ModelConfig) -> tuple[CLIPTokenizer, ...]:
        first, second = load_tokenizer(config), load_tokenizer(config, "tokenizer_2")
        if first.model_max_length != second.model_max_length:
            raise RecipeError(
                f"the model's tokenizers take {first.model_max_length} and {second.model_max_length} tokens, whose "
                "states cannot be put side by side: choose a model whose two text encoders have the same length"
            )
        return first, second

    def tokenize(self, tokenizers: Sequence[CLIPTokenizer], captions: list[str], config: CaptionConfig) -> torch.Tensor:
        """(B, 2 * L): the ids of both, since they pad differently."""
        return torch.cat([tokenize(tokenizer, captions, config) for tokenizer in tokenizers], dim=1)

    def load(
        self,
        config: ModelConfig,
        scheduler: DDPMScheduler,
        tokenizers: Sequence[CLIPTokenizer],
        *,
        weights: bool = True,
    ) -> StableDiffusionXLComponents:
        builders: dict[str, Callable[[dict[str, Any]], Any]] = {
            "text_encoder": lambda settings: CLIPTextModel(text_config(settings)),
            "text_encoder_2": lambda settings: CLIPTextModelWithProjection(text_config(settings)),
        }
        text_models = {part: load_part(config, part, build, weights=weights) for part, build in builders.items()}
        components = StableDiffusionXLComponents(
            vae=load_vae(config, weights=weights),
            unet=load_unet(config, weights=weights),
            scheduler=scheduler,
            sampler=load_sampler(config, scheduler),
            **{part: model.requires_grad_(False).eval() for part, model in text_models.items()},
            **dict(zip(("tokenizer", "tokenizer_2"), tokenizers or (None, None), strict=True)),
            clip_skip=config.clip_skip,
            zeros_for_empty=source_of(config, "text_encoder_2").pipeline_settings.get(
                "force_zeros_for_empty_prompt", True
            ),
        )
        _check_fit(components, config)
        return components

    def encode_text(self, components: Components, input_ids: torch.Tensor) -> TextStates:
        """The penultimate hidden states of both text models side by side, and the projection of the second's last one.

        With --clip_skip those of so many layers before the penultimate, as diffusers' pipeline has them.

        Of a caption in chunks the projection is that of the first. Of an empty caption both are zeros where the model
        is sampled so: that is what it was trained with in their place (`force_zeros_for_empty_prompt`).
        """
        assert isinstance(components, StableDiffusionXLComponents)
        of_both = input_ids.chunk(2, dim=1)
        models = (components.text_encoder, components.text_encoder_2)
        outputs = [
            model(in_chunks(model, ids), output_hidden_states=True) for model, ids in zip(models, of_both, strict=True)
        ]
        states = torch.cat(
            [output.hidden_states[-self.encoder_layer(components.clip_skip or 0)] for output in outputs], dim=-1
        )
        pooled = outputs[1].text_embeds
        states = states.reshape(len(input_ids), -1, states.shape[-1])
        pooled = pooled.reshape(len(input_ids), -1, pooled.shape[-1])[:, 0]
        if components.zeros_for_empty and components.tokenizer is not None:
            is_empty = (of_both[0][:, 1] == components.tokenizer.eos_token_id).to(states.device, non_blocking=True)
            states = states.masked_fill(is_empty[:, None, None], 0)
            pooled = pooled.masked_fill(is_empty[:, None], 0)
        return {"encoder_hidden_states": states, "text_embeds": pooled}

    def without_effect(self, components: Components) -> Mapping[str, tuple[str, ...]]:
        """What follows the first text model's states; the second's are all needed for its projection."""
        assert isinstance(components, StableDiffusionXLComponents)
        num_layers = components.text_encoder.config.num_hidden_layers
        left_out = range(num_layers + 1 - self.encoder_layer(components.clip_skip or 0), num_layers)
        return {"text_encoder": (*(f"encoder.layers.{number}." for number in left_out), "final_layer_norm.")}

    def prompt_arguments(self, components: Components, prompts: list[str]) -> dict[str, Any]:
        return {"prompt": prompts, "clip_skip": components.clip_skip}

    def a1111_clip_skip(self, clip_skip: int) -> int | None:
        return None  # it ignores its Clip skip for SDXL

    def conditioning(self, states: TextStates, batch: Batch) -> Conditioning:
        """With the time ids (B, 6), float32: original size, crop corner and target size (section 2.2), in pixels.

        Not in the type of the mixed precision: bfloat16 would round 1023 to 1024.
        """
        sizes = torch.cat([batch.original_size, batch.crop_corner, batch.target_size], dim=1)
        return {**states, "time_ids": sizes.to(states["text_embeds"].device, torch.float32)}

    def build_pipeline(self, components: Components) -> StableDiffusionXLPipeline:
        assert isinstance(components, StableDiffusionXLComponents)
        return StableDiffusionXLPipeline(
            vae=components.vae,
            text_encoder=components.text_encoder,
            text_encoder_2=components.text_encoder_2,
            tokenizer=components.tokenizer,
            tokenizer_2=components.tokenizer_2,
            unet=components.unet,
            scheduler=copy.deepcopy(components.sampler),  # sampling leaves state in it
            force_zeros_for_empty_prompt=components.zeros_for_empty,
        )


def _check_fit(components: StableDiffusionXLComponents, config: ModelConfig) -> None:
    unet, fit = components.unet.config, Fit(config)
    first, second = components.text_encoder.config, components.text_encoder_2.config
    fit.check_channels(unet, components.vae.config)
    fit.check_text_states(unet, first.hidden_size + second.hidden_size, "the two text encoders' states together")
    fit.check_no_other_condition(unet, "class_embed_type", "num_class_embeds", "time_cond_proj_dim", "encoder_hid_dim")
    fit.check_clip_skip(min(first.num_hidden_layers, second.num_hidden_layers) - 1)
    if unet.addition_embed_type != "text_time":
        raise RecipeError(
            f"{fit.place}: addition_embed_type is {unet.addition_embed_type}, and an SDXL UNet takes sizes and a "
            f"second text state: {'set it to text_time' if fit.from_scratch else 'choose an SDXL model'}"
        )
    width = NUM_TIME_IDS * unet.addition_time_embed_dim + second.projection_dim
    if unet.projection_class_embeddings_input_dim != width:
        raise RecipeError(
            f"{fit.place}: projection_class_embeddings_input_dim is {unet.projection_class_embeddings_input_dim}, six "
            f"sizes of {unet.addition_time_embed_dim} values and the second text encoder's {second.projection_dim} are "
            f"{width}: {fit.way_out('projection_class_embeddings_input_dim', width)}"
        )
    fit.check_vocabulary(components.tokenizer, first)
    fit.check_vocabulary(components.tokenizer_2, second)
