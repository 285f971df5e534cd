"""Tiny models and data sets, built on the spot: real classes, random weights, seconds to train."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

UNET_CONFIG = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}

# As SDXL's: no attention at the highest resolution, deeper transformers below, linear projections around them; the
# text encoders' states are 24 and 32 wide, the pooled one 20, and each of the six time ids becomes 8 values.
XL_UNET_CONFIG = {
    **UNET_CONFIG,
    "cross_attention_dim": 56,
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
}


def tiny_tokenizer(max_length: int = 16) -> CLIPTokenizer:
    """Knows the letters and digits, so that every caption has its own tokens."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,-"
    vocab = ["<|startoftext|>", "<|endoftext|>", *characters, *(character + "</w>" for character in characters)]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocab)}, merges=[], model_max_length=max_length
    )


def tiny_xl_tokenizers(max_length: int = 16) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Of one vocabulary in CLIP's order: `!` is first, with which the second pads, and the end token is last."""
    characters = "!abcdefghijklmnopqrstuvwxyz0123456789.,-"
    words = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(words)}
    first = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=max_length)
    return first, CLIPTokenizer(vocab=vocab, merges=[], model_max_length=max_length, pad_token="!")


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[16, 16, 32],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def build_tiny_pipeline(
    folder: Path, prediction_type: str = "epsilon", unet_config: dict | None = None, seed: int = 0
) -> Path:
    """A StableDiffusionPipeline folder with a factor-4 VAE: 32 pixels a side are 8 latents."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    vae = tiny_vae()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**(unet_config or UNET_CONFIG)),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def build_tiny_xl_pipeline(folder: Path, unet_config: dict | None = None, seed: int = 0) -> Path:
    """A StableDiffusionXLPipeline folder with a factor-4 VAE: 32 pixels a side are 8 latents."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = tiny_xl_tokenizers()
    common = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": 0,  # wrong, as in the published files
        "eos_token_id": 2,  # "the highest id is the end token"
        "pad_token_id": 1,
    }
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=0.13025, force_upcast=True)
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, projection_dim=24,
                **common,
            )
        ),
        text_encoder_2=CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, projection_dim=20,
                hidden_act="gelu", **common,
            )
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=UNet2DConditionModel(**(unet_config or XL_UNET_CONFIG)),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            timestep_spacing="leading",
        ),
        force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def build_image_folder(folder: Path, num_images: int = 8, size: tuple[int, int] = (40, 32)) -> Path:
    """An imagefolder with metadata.jsonl: coloured discs with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(num_images):
        y, x = np.mgrid[: size[1], : size[0]]
        centre = rng.uniform(0.3, 0.7, 2) * size
        disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < (0.25 * min(size)) ** 2
        pixels = np.where(disc[..., None], rng.integers(0, 256, 3), rng.integers(0, 256, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "text": f"disc number {number}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def training_scheduler(folder: Path) -> DDPMScheduler:
    return DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
