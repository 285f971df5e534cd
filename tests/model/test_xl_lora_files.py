"""SDXL's LoRAs in diffusers' keys and kohya's: read alike whoever wrote them, and drawn alike by stock diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from safetensors.torch import save_file
from test_lora_files import assert_same_change, in_memory
from tiny_models import build_tiny_pipeline
from xl_loras import drawn_merged, drawn_with, load, picture, random_lora

from sd_recipes.model.lora_files import (
    diffusers_tensors,
    kohya_tensors,
    layer_shapes,
    lora_parts,
    read_lora,
    with_alpha_of_ranks,
)
from sd_recipes.model.weight_files import UnfittingWeights, open_weights


@pytest.fixture(scope="module")
def model(tiny_xl_pipeline: Path) -> Path:
    return tiny_xl_pipeline


def write(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def read(file: Path, pipeline: Any) -> Any:
    return read_lora(
        open_weights(file, file.name, allow_pickle=False), layer_shapes(lora_parts(pipeline)), pipeline.unet.config
    )


@pytest.mark.parametrize("parts", [(), ("text_encoder_2",), ("unet",)])
def test_what_is_written_draws_in_stock_diffusers_and_is_read_again(
    model: Path, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    """Every layer of the UNet and of both text encoders, also in the UNet's ends, which kohya's keys name otherwise."""
    pipeline = load(model)
    lora = random_lora(pipeline, *parts)
    expected = drawn_merged(model, lora)
    assert np.abs(expected - picture(pipeline)).max() > 0.03
    written = {
        "diffusers": diffusers_tensors(with_alpha_of_ranks(lora)),
        "kohya": kohya_tensors(lora, pipeline.unet.config),
    }
    for name, tensors in written.items():
        file = write(tensors, tmp_path / f"{name}.safetensors")
        np.testing.assert_allclose(drawn_with(model, file), expected, atol=2e-5)
        assert_same_change(read(file, pipeline), lora)


def test_kohyas_keys_are_those_of_its_own_scripts(model: Path) -> None:
    pipeline = load(model)
    names = {name.partition(".")[0] for name in kohya_tensors(random_lora(pipeline), pipeline.unet.config)}
    assert {
        "lora_unet_input_blocks_0_0",
        "lora_unet_input_blocks_2_0_op",
        "lora_unet_input_blocks_3_0_in_layers_2",
        "lora_unet_input_blocks_3_1_proj_in",
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn1_to_out_0",
        "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_output_blocks_1_2_conv",
        "lora_unet_time_embed_0",
        "lora_unet_label_emb_0_2",
        "lora_unet_out_2",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_2_mlp_fc1",
    } <= names
    assert not any("down_blocks" in name or "lora_te_" in name for name in names)


def test_the_other_naming_of_kohyas_keys_is_read_too(model: Path, tmp_path: Path) -> None:
    """That of diffusers' blocks, which OneTrainer and diffusers' converter write."""
    pipeline = load(model)
    lora = with_alpha_of_ranks(random_lora(pipeline))
    theirs = convert_state_dict_to_kohya(diffusers_tensors(lora))
    assert any("lora_unet_down_blocks" in name for name in theirs)
    assert {name.partition("_text")[0] for name in theirs if "_te" in name[:8]} == {"lora_te1", "lora_te2"}
    assert_same_change(read(write(theirs, tmp_path / "x.safetensors"), pipeline), lora)


def test_a_lora_of_peft_keeps_the_alphas_of_all_three_models(model: Path, tmp_path: Path) -> None:
    pipeline, alphas = load(model), {"unet": 6, "text_encoder": 1, "text_encoder_2": 2}
    for part, module in lora_parts(pipeline).items():
        targets = ["to_q", "to_k"] if part == "unet" else ["q_proj", "fc1"]
        config = LoraConfig(r=4, lora_alpha=alphas[part], target_modules=targets, init_lora_weights=False)
        module.add_adapter(config)
    layers = {f"{part}_lora_layers": adapter_of(module) for part, module in lora_parts(pipeline).items()}
    stated = {
        f"{part}_lora_adapter_metadata": module.peft_config["default"].to_dict()
        for part, module in lora_parts(pipeline).items()
    }
    pipeline.save_lora_weights(tmp_path, **layers, **stated)
    found = read(tmp_path / "pytorch_lora_weights.safetensors", load(model))
    assert {part: {layer.alpha for layer in found[part].values()} for part in found} == {
        part: {alpha} for part, alpha in alphas.items()
    }
    np.testing.assert_allclose(drawn_merged(model, found), picture(pipeline), atol=2e-5)


def adapter_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.replace(".default", ""): value for name, value in module.state_dict().items() if "lora_" in name}


def test_a_lora_of_the_other_family_is_refused_for_what_it_is(model: Path, tmp_path: Path) -> None:
    xl, sd = load(model), StableDiffusionPipeline.from_pretrained(build_tiny_pipeline(tmp_path / "sd"))
    for part in ("unet", "text_encoder_2"):
        file = write(kohya_tensors(random_lora(xl, part), xl.unet.config), tmp_path / "x.safetensors")
        with pytest.raises(
            UnfittingWeights, match="a LoRA of another model: of Stable Diffusion XL, and this one is not"
        ):
            read(file, sd)
    reads = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    of_sd = in_memory({f"{reads}.lora_down.weight": torch.zeros(2, 768), f"{reads}.lora_up.weight": torch.zeros(64, 2)})
    with pytest.raises(UnfittingWeights, match="of Stable Diffusion 1, and this one is Stable Diffusion XL"):
        read_lora(of_sd, layer_shapes(lora_parts(xl)), xl.unet.config)
