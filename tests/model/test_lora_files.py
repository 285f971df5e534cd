"""LoRA files of peft, diffusers and kohya: read alike, merged as peft merges them, and written for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from training_runs import assert_equal

from sd_recipes.model.lora_files import (
    diffusers_tensors,
    generation_of_lora,
    is_lora,
    kohya_tensors,
    layer_shapes,
    merge_lora,
    read_lora,
    with_alpha_of_ranks,
)
from sd_recipes.model.recognise import of_tensors
from sd_recipes.model.weight_files import UnfittingWeights, UnreadableWeights, Weights, open_weights

UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "conv_in", "time_emb_proj"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


def load(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pixels: np.ndarray = pipeline(
        "disc number 2", num_inference_steps=2, height=32, width=32, output_type="np",
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]  # fmt: skip
    return pixels


def written_by_peft(folder: Path, model: Path, **options: Any) -> tuple[Path, np.ndarray]:
    """A LoRA of both models, with random changes, as diffusers' examples save it; and what peft draws with it."""
    pipeline = load(model)
    torch.manual_seed(3)
    layers = {}
    for name, targets in (("unet", UNET_LAYERS), ("text_encoder", TEXT_LAYERS)):
        module = getattr(pipeline, name)
        patterns = {
            pattern: {layer: value for layer, value in values.items() if layer in targets}
            for pattern, values in options.items()
            if pattern.endswith("_pattern")
        }
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **{**options, **patterns})
        inject_adapter_in_model(config, module)
        for parameter_name, parameter in module.named_parameters():
            if "magnitude" in parameter_name:
                parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
            elif "lora_" in parameter_name:
                parameter.data.normal_(std=0.1)
        layers[name] = get_peft_model_state_dict(module)
        layers[f"{name}_config"] = config.to_dict()
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=layers["unet_config"],
        text_encoder_lora_adapter_metadata=layers["text_encoder_config"],
    )
    return folder / "pytorch_lora_weights.safetensors", picture(pipeline)


def read(file: Path, pipeline: StableDiffusionPipeline) -> Any:
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    return read_lora(open_weights(file, file.name, allow_pickle=False), layer_shapes(parts), pipeline.unet.config)


def with_lora(model: Path, file: Path) -> np.ndarray:
    """What stock diffusers draws with it."""
    pipeline = load(model)
    pipeline.load_lora_weights(str(file))
    return picture(pipeline)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 6, "alpha_pattern": {"to_q": 1, "fc1": 3}, "rank_pattern": {"to_k": 2}},
        {"lora_alpha": 4, "use_rslora": True},
        {"lora_alpha": 4, "use_dora": True},
    ],
    ids=["patterns", "rslora", "dora"],
)
def test_a_lora_of_peft_is_read_merged_and_written(
    tiny_pipeline: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Also where diffusers' own reader takes one α for all layers, which kohya's keys then have."""
    file, expected = written_by_peft(tmp_path, tiny_pipeline, **options)
    assert np.abs(expected - picture(load(tiny_pipeline))).max() > 0.05
    pipeline = load(tiny_pipeline)
    lora = read(file, pipeline)
    written = {"diffusers": diffusers_tensors(with_alpha_of_ranks(lora)), "kohya": kohya_tensors(lora)}
    for name, tensors in written.items():
        assert is_lora(tensors)
        assert "a LoRA" in of_tensors({key: tuple(value.shape) for key, value in tensors.items()}).words
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
        if not (options.get("use_dora") and name == "kohya"):  # diffusers 0.42 leaves DoRA in kohya's keys out
            np.testing.assert_allclose(with_lora(tiny_pipeline, tmp_path / f"{name}.safetensors"), expected, atol=2e-4)
        again = read(tmp_path / f"{name}.safetensors", pipeline)
        assert_same_change(again, lora)
    merge_lora({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}, lora)
    np.testing.assert_allclose(picture(pipeline), expected, atol=2e-4)


def assert_same_change(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert {part: layers.keys() for part, layers in one.items()} == {part: other[part].keys() for part in other}
    for part, layers in one.items():
        for name, layer in layers.items():
            weight = torch.ones(layer.up.shape[0], *layer.down.shape[1:])
            torch.testing.assert_close(layer.merged(weight), other[part][name].merged(weight), rtol=1e-4, atol=1e-6)


def test_kohyas_keys_of_a_plain_lora_are_those_of_diffusers_converter(tiny_pipeline: Path, tmp_path: Path) -> None:
    """But for those of the text encoder, which it names as SDXL's."""
    file, _ = written_by_peft(tmp_path, tiny_pipeline, lora_alpha=4)
    ours, theirs = kohya_tensors(read(file, load(tiny_pipeline))), convert_state_dict_to_kohya(load_file(file))
    of_unet = {name: value.float() for name, value in theirs.items() if name.startswith("lora_unet_")}
    assert_equal({name: value for name, value in ours.items() if name.startswith("lora_unet_")}, of_unet)
    assert {name for name in ours if not name.startswith("lora_unet_")} == {
        name.replace("lora_te1_", "lora_te_text_model_") for name in theirs.keys() - of_unet.keys()
    }


def test_every_name_that_files_have_for_a_layer(tiny_pipeline: Path) -> None:
    """The same numbers under names of earlier versions, of kohya, of both layouts, of ComfyUI, and of peft."""
    place = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    text = "encoder.layers.0.self_attn"
    pipeline = load(tiny_pipeline)
    for down, up in (
        (f"unet.{place}.to_q.lora_A.weight", f"unet.{place}.to_q.lora_B.weight"),
        (f"unet.{place}.to_q.lora_A.default.weight", f"unet.{place}.to_q.lora_B.default.weight"),
        (f"base_model.model.unet.{place}.to_q.lora_A.weight", f"base_model.model.unet.{place}.to_q.lora_B.weight"),
        (f"unet.{place}.to_q.lora.down.weight", f"unet.{place}.to_q.lora.up.weight"),
        (f"unet.{place}.processor.to_q_lora.down.weight", f"unet.{place}.processor.to_q_lora.up.weight"),
        (f"unet.{place}.processor.to_out_lora.down.weight", f"unet.{place}.processor.to_out_lora.up.weight"),
        (f"lora_unet_{place.replace('.', '_')}_to_out_0.lora_down.weight",
         f"lora_unet_{place.replace('.', '_')}_to_out_0.lora_up.weight"),
        ("lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
         "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q.lora_up.weight"),
        ("diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.lora_down.weight",
         "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.lora_up.weight"),
        (f"text_encoders.clip_l.transformer.text_model.{text}.q_proj.lora_down.weight",
         f"text_encoders.clip_l.transformer.text_model.{text}.q_proj.lora_up.weight"),
        (f"text_encoder.text_model.{text}.to_q_lora.down.weight",
         f"text_encoder.text_model.{text}.to_q_lora.up.weight"),
        (f"text_encoder.{text}.q_proj.lora_linear_layer.down.weight",
         f"text_encoder.{text}.q_proj.lora_linear_layer.up.weight"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
         "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
         "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"),
    ):  # fmt: skip
        width = 32 if down.startswith(("text_encoder", "lora_te")) else 64
        weights = in_memory({down: torch.ones(2, width), up: torch.ones(width, 2)})
        parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
        ((part, layers),) = read_lora(weights, layer_shapes(parts), pipeline.unet.config).items()
        (name,) = layers
        assert part == ("text_encoder" if width == 32 else "unet"), down
        assert name.startswith(text if width == 32 else place), down
        assert name.endswith("to_out.0" if "to_out" in down else "q_proj" if width == 32 else "to_q"), down


def in_memory(tensors: dict[str, torch.Tensor], **metadata: str) -> Weights:
    return Weights("file", {name: tuple(each.shape) for name, each in tensors.items()}, tensors.__getitem__, metadata)


@pytest.mark.parametrize(
    ("tensors", "metadata", "told"),
    [
        ({"lora_unet_conv_in.hada_w1_a": (2, 2)}, {}, "is a LoHa: only LoRA and DoRA are read"),
        (
            {"lora_unet_conv_in.lora_mid.weight": (2, 2, 3, 3), "lora_unet_conv_in.alpha": ()},
            {},
            "only LoRA and DoRA are read",
        ),
        ({"lora_unet_conv_in.lora_down.weight": (2, 4, 3, 3)}, {}, "is not whole: conv_in has no up matrix"),
        ({"lora_unet_conv_in.alpha": ()}, {}, "is not whole: conv_in has no down matrix"),
        (
            {"lora_unet_conv_in.lora_down.weight": (2, 4, 3, 3), "lora_unet_conv_in.lora_up.weight": (32, 3, 1, 1)},
            {},
            "is damaged: conv_in has a rank of 2 and of 3",
        ),
        (
            {"lora_unet_conv_in.lora_down.weight": (2, 4, 3, 3), "lora_unet_conv_in.lora_up.weight": (320, 2, 1, 1)},
            {},
            "of another model: it changes conv_in by 320 x 36 values, and this one has 32 x 36 there",
        ),
        (
            {"transformer.blocks.0.to_q.lora_A.weight": (2, 2), "transformer.blocks.0.to_q.lora_B.weight": (2, 2)},
            {},
            "of another model: 2 of its 2 tensors are of layers that this one lacks",
        ),
        (
            {"unet.conv_in.lora_A.weight": (2, 4, 3, 3), "unet.conv_in.lora_B.weight": (32, 2, 1, 1)},
            {"lora_adapter_metadata": "[1]"},
            "that is no JSON of settings",
        ),
        ({}, {}, "is not a LoRA, but a file without tensors"),
    ],
)
def test_what_is_no_lora_of_this_model(
    tiny_pipeline: Path, tensors: dict[str, tuple[int, ...]], metadata: dict[str, str], told: str
) -> None:
    pipeline = load(tiny_pipeline)
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    weights = in_memory({name: torch.zeros(shape) for name, shape in tensors.items()}, **metadata)
    with pytest.raises(UnreadableWeights, match=told) as error:
        read_lora(weights, layer_shapes(parts), pipeline.unet.config)
    assert isinstance(error.value, UnfittingWeights) == ("another model" in told)


def test_the_generation_is_told_by_the_text_that_a_lora_reads() -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
    assert [generation_of_lora({module: (4, width)}) for width in (768, 1024)] == [1, 2]
    dotted = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    assert generation_of_lora({dotted: (4, 1024)}) == 2
    assert generation_of_lora({"lora_te_text_model_x.lora_down.weight": (4, 1024)}) is None
    second, flux = "lora_te2_text_model_x.lora_down.weight", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    assert [generation_of_lora(dict.fromkeys(names, (4, 9))) for names in ([second], [second, flux])] == ["XL", None]
    deep = "input_blocks.7.1.transformer_blocks.1.ff.net.2.lora_A.weight"
    assert generation_of_lora({f"diffusion_model.{deep}": (4, 9)}) == "XL"
    assert generation_of_lora({"diffusion_model.transformer_blocks.1.attn.to_q.lora_A.weight": (4, 9)}) is None
