"""An SDXL pipeline of random weights for the benchmarks, of its published size or tiny."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What a tiny one has otherwise than the published configuration, by part.
TINY_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
             "projection_dim": 64}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "block_out_channels": [32, 64, 64], "attention_head_dim": [2, 4, 4], "cross_attention_dim": 128,
        "transformer_layers_per_block": [1, 2, 2], "norm_num_groups": 8, "sample_size": 8, "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + 6 * 8,
    },
    "vae": {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8, "sample_size": 64},
    "text_encoder": TINY_TEXT,
    "text_encoder_2": TINY_TEXT,
}  # fmt: skip
XL_SHAPES: dict[str, dict[str, dict[str, Any]]] = {"sdxl": {}, "tiny_sdxl": TINY}


def build_xl_model(shape: str, folder: Path) -> None:
    """A pipeline folder of that shape, in float16 to be half as large."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from sd_recipes.assets import CLIP_TOKENIZER, CONFIGURATIONS

    published = CONFIGURATIONS["XL"]

    def config_of(part: str, file: str = "config.json") -> dict[str, Any]:
        return {**json.loads((published / part / file).read_text()), **XL_SHAPES[shape].get(part, {})}

    torch.manual_seed(0)
    tokenizers = {
        part: CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER), **config_of(part, "tokenizer_config.json"))
        for part in ("tokenizer", "tokenizer_2")
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        StableDiffusionXLPipeline(
            vae=AutoencoderKL.from_config(config_of("vae")),
            text_encoder=CLIPTextModel(CLIPTextConfig.from_dict(config_of("text_encoder"))),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config_of("text_encoder_2"))),
            unet=UNet2DConditionModel.from_config(config_of("unet")),
            scheduler=EulerDiscreteScheduler.from_config(config_of("scheduler", "scheduler_config.json")),
            **tokenizers,
        ).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
