"""What a folder or file is, said before anything is loaded: in one line that is true and has a way out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from single_files import config_of, original_unet, original_vae, part_of, single_file

from sd_recipes.errors import RecipeError
from sd_recipes.model.families import family_of
from sd_recipes.model.sources import source_of
from sd_recipes.recipe import ModelConfig


def refused(name: Path | str, **flags: Any) -> str:
    with pytest.raises(RecipeError) as error:
        family_of(ModelConfig(pretrained_model_name_or_path=str(name), **flags))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"--pretrained_model_name_or_path {name}")
    return str(error.value).removeprefix(f"--pretrained_model_name_or_path {name}")


CONV = "model.diffusion_model.input_blocks.0.0.weight"
PARTS_OF_SD1 = {
    "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
}
LABEL = "model.diffusion_model.label_emb.0.0.weight"
PARTS_OF_XL = {
    "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
    "conditioner.embedders.1.model.ln_final.weight": (1280,),
}
LORA = "a LoRA (small changes to a model, not a model): name the model that it was trained on"


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({CONV: (320, 9, 3, 3), **PARTS_OF_SD1}, "an inpainting model (its UNet takes 9 channels"),
        ({CONV: (320, 8, 3, 3), **PARTS_OF_SD1}, "an instruct-pix2pix model (its UNet takes 8 channels"),
        ({CONV: (320, 5, 3, 3), **PARTS_OF_SD1}, "a depth-to-image model"),
        ({CONV: (256, 7, 3, 3), **PARTS_OF_SD1}, "an upscaling model"),
        ({CONV: (320, 4, 3, 3), "embedder.model.visual.proj": (1, 1)}, "an image-variation model (unCLIP)"),
        ({CONV: (384, 4, 3, 3), "conditioner.embedders.0.model.ln_final.weight": (1280,)}, "the refiner of SDXL"),
        ({"conv_in.weight": (384, 4, 3, 3), "add_embedding.linear_1.weight": (1536, 2560)}, "the refiner of SDXL"),
        ({CONV: (320, 9, 3, 3), LABEL: (1280, 2816), **PARTS_OF_XL}, "an inpainting model"),
        ({CONV: (320, 8, 3, 3), LABEL: (1280, 2816), **PARTS_OF_XL}, "an instruct-pix2pix model"),
        ({CONV: (320, 4, 3, 3), LABEL: (1280, 2816), **PARTS_OF_XL, "edm_mean": (4,)}, "a variant of SDXL that was"),
        ({CONV: (320, 4, 3, 3), LABEL: (1280, 2816), "model.diffusion_model.time_embed.cond_proj.weight": (320, 256)},
         "a latent consistency model (LCM), distilled to draw in a few steps"),
        ({"conv_in.weight": (320, 4, 3, 3), "time_embedding.cond_proj.weight": (320, 256)}, "a latent consistency"),
        ({CONV: (320, 8, 3, 3), LABEL: (1280, 768), "conditioner.embedders.0.open_clip.model.x": (1,),
          "model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight": (320,)}, "an instruct-pix2pix"),
        ({CONV: (320, 4, 3, 3), "embedder.model.visual.proj": (1, 1), LABEL: (1280, 2048)}, "an image-variation model"),
        ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (9, 9)}, "Stable Diffusion 3"),
        ({"transformer_blocks.0.norm1_context.linear.weight": (9, 9)}, "Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.qkv.weight": (9, 9), "single_blocks.0.linear1.weight": (9, 9)}, "Flux"),
        ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (9, 9)}, "Flux"),
        ({"single_transformer_blocks.0.attn.to_q.weight": (9, 9)}, "Flux"),
        ({"model.diffusion_model.blocks.0.attn.w": (9, 9)}, "a diffusion model without Stable Diffusion's UNet"),
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 9)}, LORA),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": (), "lora_unet_x.hada_w1_a": (2, 2)}, "a LoRA"),
        ({"unet.down_blocks.0.attentions.0.to_q.lora.down.weight": (4, 9)}, LORA),
        ({"unet.down_blocks.0.attn1.processor.to_q_lora.down.weight": (4, 9)}, LORA),
        ({"base_model.model.down_blocks.0.attn1.to_q.lora_A.weight": (4, 9)}, LORA),
        ({"emb_params": (2, 768)}, "a textual-inversion embedding (vectors for a new word, not a model)"),
        ({"<my-cat>": (1, 768)}, "a textual-inversion embedding"),
        ({"<my-cat>": (768,)}, "a textual-inversion embedding"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "a textual-inversion embedding"),
        ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "a ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": (9, 3, 3, 3), "conv_in.weight": (320, 4, 3, 3)}, "a ControlNet"),
        ({"image_proj.proj.weight": (9, 9), "ip_adapter.1.to_k_ip.weight": (9, 9)}, "an IP-Adapter"),
        ({"down_blocks.0.motion_modules.0.norm.weight": (9,), "x.weight": (9,)}, "a motion module"),
        ({"first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3)}, "a VAE alone: give it as --vae"),
        ({"encoder.mid.block_1.conv1.weight": (8, 8, 3, 3)}, "a VAE alone: give it as --vae"),
        ({"decoder.up_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "a VAE alone: give it as --vae"),
        ({"layers.0.weight": (9, 9)}, "no model that is known here (1 tensors, such as layers.0.weight)"),
        ({"model_ema.diffusion_modelout0weight": (3,), **PARTS_OF_SD1}, "a checkpoint that holds the UNet only as"),
        ({}, "a file without tensors"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_file_of_another_kind_is_named(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], words: str, wrapper: str
) -> None:
    file = tmp_path / "downloaded.safetensors"
    save_file({f"{wrapper}{name}": torch.zeros(shape) for name, shape in shapes.items()}, file)
    said = refused(file).replace(f"{wrapper}layers", "layers")
    assert said.startswith(f" is {words}")
    assert re.search(r": .*(name|choose|give)", said)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (("unet",), "is a UNet alone and lacks vae, text encoder, tokenizer, scheduler: add --base NAME"),
        (("unet", "text_encoder"), "is a UNet and a text encoder and lacks vae: add --vae NAME"),
        (("text_encoder",), "is a text encoder alone and lacks unet, vae, scheduler: add --base NAME"),
    ],
)
def test_what_a_file_lacks_is_named(tiny_pipeline: Path, tmp_path: Path, parts: tuple[str, ...], words: str) -> None:
    file = single_file(tmp_path / "m.safetensors", tiny_pipeline, parts=parts)
    config = ModelConfig(pretrained_model_name_or_path=str(file))
    with pytest.raises(RecipeError, match=words):
        source_of(config, "vae")
    lora = tmp_path / "lora.safetensors"
    save_file({"x.lora_A.weight": torch.zeros(2)}, lora)
    with pytest.raises(RecipeError, match=f"--base {re.escape(str(lora))} is a LoRA"):
        source_of(config.model_copy(update={"base": str(lora)}), "vae")
    unet = single_file(tmp_path / "unet.safetensors", tiny_pipeline, parts=("unet",))
    with pytest.raises(RecipeError, match=f"--vae {re.escape(str(unet))} is a UNet alone: name a VAE"):
        source_of(config.model_copy(update={"vae": str(unet)}), "vae")
    with pytest.raises(RecipeError, match=f"; --base {re.escape(str(unet))} is a UNet alone and has none either"):
        source_of(config.model_copy(update={"base": str(unet)}), "vae")


# ---------------------------------------------------------------------------------------- folders


@pytest.fixture
def model(tiny_pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CLIP = ["transformers", "CLIPTextModelWithProjection"]
OF_XL = {"addition_embed_type": "text_time"}


@pytest.mark.parametrize(
    ("index", "unet", "words"),
    [
        ({"text_encoder": [None, None], "text_encoder_2": CLIP}, {}, "the refiner of SDXL"),
        ({}, {**OF_XL, "projection_class_embeddings_input_dim": 2560}, "the refiner of SDXL"),
        ({}, {"time_cond_proj_dim": 256}, "a latent consistency model (LCM)"),
        ({"_class_name": "StableDiffusionInpaintPipeline"}, {"in_channels": 9}, "an inpainting model"),
        ({}, {"in_channels": 9}, "an inpainting model"),
        ({}, {"in_channels": 8}, "an instruct-pix2pix model"),
        ({}, {"class_embed_type": "projection"}, "an image-variation model"),
        (
            {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}, {},
            "a model of another family (FluxPipeline)",
        ),
    ],
)  # fmt: skip
def test_a_pipeline_of_another_kind_is_named(model: Path, index: dict, unet: dict, words: str) -> None:
    change(model / "model_index.json", **index)
    change(model / "unet" / "config.json", **unet)
    said = refused(model)
    assert said.startswith(f" is {words}")
    assert "choose" in said
    assert "set " not in said, "no advice to edit the configuration of pretrained weights"


def test_an_inpainting_pipeline_around_a_plain_unet_is_a_plain_model(model: Path) -> None:
    change(model / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    family_of(ModelConfig(pretrained_model_name_or_path=str(model)))


def test_a_new_unet_may_take_the_other_parts_of_any_model(model: Path, tmp_path: Path) -> None:
    change(model / "unet" / "config.json", in_channels=9)
    (tmp_path / "unet.json").write_text("{}")
    flags = {"train_from_scratch": True, "unet_config": str(tmp_path / "unet.json")}
    family_of(ModelConfig(pretrained_model_name_or_path=str(model), **flags))
    source_of(ModelConfig(pretrained_model_name_or_path="x/y", vae=str(model)), "vae")


def test_a_folder_around_or_inside_the_pipeline_leads_to_it(model: Path, tmp_path: Path) -> None:
    assert refused(tmp_path).endswith(f"is a folder around a pipeline: name the pipeline: {model}")
    hub = tmp_path / "cache" / "models--someone--model"
    shutil.copytree(model, hub / "snapshots" / "0123")
    assert refused(hub).endswith(f"name the pipeline: {hub / 'snapshots' / '0123'}")
    config = ModelConfig(pretrained_model_name_or_path=str(model / "unet"))
    with pytest.raises(RecipeError, match=f"is a UNet alone, of the pipeline above it: name that one, {model}"):
        source_of(config, "vae")


def test_folders_that_hold_something_else(model: Path, tmp_path: Path) -> None:
    empty, files, lora, strange = (tmp_path / name for name in ("empty", "files", "lora", "strange"))
    for folder in (empty, files, lora, strange):
        folder.mkdir()
    (strange / "notes.txt").touch()
    save_file({"x.lora_A.weight": torch.zeros(2)}, lora / "pytorch_lora_weights.safetensors")
    for name in ("b.safetensors", "a.ckpt"):
        (files / name).touch()
    assert "is an empty folder: a pipeline in diffusers format has a model_index.json" in refused(empty)
    assert "is a folder without a model: a pipeline in diffusers format" in refused(strange)
    assert "is the folder of a LoRA: name the model that it was trained on" in refused(lora)
    assert f"is a folder of single files: name the file: {files / 'a.ckpt'} (or another of its 2" in refused(files)
    assert "is a VAE alone: give it as --vae" in refused(model / "vae")
    change(model / "vae" / "config.json", _class_name="ControlNetModel")
    assert "is a ControlNet, which works next to a model: name the model itself" in refused(model / "vae")
    (model / "model_index.json").write_text("{")
    assert "model_index.json is no JSON file" in refused(model)


def test_a_pipeline_without_its_index_is_one(model: Path) -> None:
    (model / "model_index.json").unlink()
    family_of(ModelConfig(pretrained_model_name_or_path=str(model)))
    shutil.rmtree(model / "scheduler")
    with pytest.raises(RecipeError, match="lacks the folder scheduler/: add --base NAME"):
        source_of(ModelConfig(pretrained_model_name_or_path=str(model)), "scheduler")


# ------------------------------------------------------------------------------------------ names


def test_a_name_that_is_nowhere(model: Path, tmp_path: Path) -> None:
    near = single_file(tmp_path / "dreamer_v8.safetensors", model)
    assert f"no such file (nearest: {near})" in refused(tmp_path / "dreamer_v7.safetensors")
    assert ": no such folder (nearest: " in refused(f"{tmp_path}/modl")
    assert ": no such file: there is no folder absent either" in refused("absent/m.safetensors")
    assert "folders are separated by /, not by \\" in refused(r"C:\models\m.safetensors")
    assert "folders are separated by /, not by \\" in refused(r"C:\models\sd15")
    with pytest.raises(RecipeError, match="--vae is empty: name a folder, a file or a Hub id"):
        source_of(ModelConfig(pretrained_model_name_or_path=str(model), vae=" "), "vae")
    assert "write the whole path" in refused("~nobody-of-this-name/model")
    assert "is an address: download the file" in refused("https://example.com/api/download/models/1234")
    address = "https://huggingface.co/someone/model"
    assert refused(address).endswith("is an address: name someone/model")
    assert "`hf download someone/model m.safetensors --local-dir .`" in refused(f"{address}/blob/main/m.safetensors")
    assert "`hf download someone/model m.ckpt --local-dir .`" in refused(f"{address}/resolve/main/m.ckpt?download=true")


def test_the_home_folder_and_spaces_in_names(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my models").mkdir()
    single_file(tmp_path / "my models" / "a model.safetensors", model)
    for name in ("~/model", "~/my models/a model.safetensors"):
        family_of(ModelConfig(pretrained_model_name_or_path=name))
    assert "is not a regular file" in refused("/dev/null")


def test_a_base_that_is_not_needed_is_mentioned(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    family_of(ModelConfig(pretrained_model_name_or_path=str(model), base="someone/model"))
    assert "--base someone/model is not used" in caplog.text


def test_parts_in_files_are_told_apart(tiny_pipeline: Path, tmp_path: Path) -> None:
    """By what the files of a real pipeline hold, in both layouts."""
    unet, vae = part_of(tiny_pipeline, "unet"), part_of(tiny_pipeline, "vae")
    kinds = {
        "a UNet alone": [unet, original_unet(unet, config_of(tiny_pipeline, "unet"))],
        "a VAE alone": [vae, original_vae(vae, config_of(tiny_pipeline, "vae"))],
        "a text encoder alone": [part_of(tiny_pipeline, "text_encoder")],
    }
    for words, files in kinds.items():
        for tensors in files:
            save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "part.safetensors")
            config = ModelConfig(pretrained_model_name_or_path=str(tmp_path / "part.safetensors"))
            with pytest.raises(RecipeError, match=words):
                source_of(config, "scheduler")
