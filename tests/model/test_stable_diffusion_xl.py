"""SDXL's family: what its UNet is conditioned on, its parts of full size, and a VAE that overflows in float16."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from tiny_models import tiny_vae, tiny_xl_tokenizers
from training_runs import build
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sd_recipes.assets import CONFIGURATIONS
from sd_recipes.data.latent_store import provenance_of
from sd_recipes.errors import RecipeError
from sd_recipes.memory.step import TracedStep
from sd_recipes.model import latents as latents_module
from sd_recipes.model.components import load_scheduler
from sd_recipes.model.conditioning import CachedText, unet_arguments
from sd_recipes.model.families import family_of
from sd_recipes.model.latents import LatentEncoder, bearable_dtype, decode_latents, decode_without_autocast
from sd_recipes.model.stable_diffusion_xl import StableDiffusionXL
from sd_recipes.recipe import CaptionConfig, ModelConfig, Recipe

CAPTIONS = ["disc number 2", "", "a caption of many more letters than there is room for"]


def load(folder: Path, **flags: Any) -> Any:
    config = ModelConfig(pretrained_model_name_or_path=str(folder), **flags)
    family = family_of(config)
    return family, family.load(config, load_scheduler(config), family.load_tokenizers(config))


@torch.no_grad()
def expected_text(folder: Path, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one caption by transformers alone, in float64: (L, 56) penultimate states and the (20,) projection."""
    first = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").double()
    second = CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2").double()
    (ids, padded), length = tiny_xl_tokenizers(), 16
    one, two = (
        model(torch.tensor([each(caption, padding="max_length", truncation=True, max_length=length).input_ids]),
              output_hidden_states=True)
        for model, each in ((first, ids), (second, padded))
    )  # fmt: skip
    states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)[0]
    ids = padded(caption, padding="max_length", truncation=True, max_length=length).input_ids
    end = ids.index(padded.eos_token_id)
    last = second.text_model.final_layer_norm(two.hidden_states[-1])[0, end]
    projection = second.text_projection.weight @ last
    torch.testing.assert_close(projection, two.text_embeds[0])
    return states, projection


def drawn_with(folder: Path, caption: str) -> dict[str, Any]:
    """The keyword arguments that a stock pipeline calls its UNet with."""
    pipeline, given = StableDiffusionXLPipeline.from_pretrained(folder), {}
    pipeline.unet.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    pipeline(
        caption, height=32, width=32, original_size=(32, 40), crops_coords_top_left=(0, 4), num_inference_steps=1,
        guidance_scale=1.0, output_type="latent",
    )  # fmt: skip
    return given


def test_a_batchs_conditioning_is_that_of_the_paper(xl_settings: dict[str, Any], tiny_xl_pipeline: Path) -> None:
    """Written out from the rows: text states, pooled state and time ids; zeros for a dropped caption."""
    run = build(xl_settings, center_crop=True, caption_dropout=0.5, random_flip=True, train_batch_size=8)
    batch = next(run.batches(0, 1))[0]
    conditioning = run.model.family.conditioning(run.model.encode_text(batch.input_ids), batch)
    first_ids = batch.input_ids.chunk(2, dim=1)[0]
    captions = run.model.components.tokenizer.batch_decode(first_ids, skip_special_tokens=True)
    assert 0 < captions.count("") < 8
    for place, caption in enumerate(captions):
        states, projection = expected_text(tiny_xl_pipeline, caption)
        if not caption:
            states, projection = torch.zeros_like(states), torch.zeros_like(projection)
        torch.testing.assert_close(conditioning["encoder_hidden_states"][place].double(), states, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(conditioning["text_embeds"][place].double(), projection, rtol=1e-5, atol=1e-5)
    # Original size, crop corner and target size (Podell et al. 2023, section 2.2) of pictures of 40 x 32 pixels: the
    # whole height, and the middle of the width.
    assert conditioning["time_ids"].tolist() == [[32, 40, 0, 4, 32, 32]] * 8
    # And what stock diffusers draws with, of the same caption and sizes.
    place = next(place for place, caption in enumerate(captions) if caption)
    one = {name: each[place : place + 1] for name, each in conditioning.items()}
    given = drawn_with(tiny_xl_pipeline, captions[place])
    torch.testing.assert_close(given["encoder_hidden_states"], one["encoder_hidden_states"], rtol=1e-5, atol=1e-5)
    assert given["added_cond_kwargs"].keys() == unet_arguments(one)["added_cond_kwargs"].keys()
    for name, value in given["added_cond_kwargs"].items():
        torch.testing.assert_close(value, one[name], rtol=1e-5, atol=1e-5)
    assert conditioning["time_ids"].dtype == torch.float32


def test_chunks_are_encoded_apart_and_the_first_ones_projection_counts(tiny_xl_pipeline: Path) -> None:
    family, components = load(tiny_xl_pipeline)
    tokenizers = (components.tokenizer, components.tokenizer_2)
    chunked = CaptionConfig(long_captions="chunk", caption_chunks=2)
    ids = family.tokenize(tokenizers, CAPTIONS, chunked)
    assert ids.shape == (3, 2 * 2 * 16)
    found = family.encode_text(components, ids)
    assert found["encoder_hidden_states"].shape == (3, 32, 56)
    plain = family.encode_text(components, family.tokenize(tokenizers, CAPTIONS, CaptionConfig()))
    torch.testing.assert_close(found["encoder_hidden_states"][:, :16], plain["encoder_hidden_states"])
    torch.testing.assert_close(found["text_embeds"], plain["text_embeds"])
    assert not found["encoder_hidden_states"][1].any(), "an empty caption, all of its chunks"
    rest = "".join(CAPTIONS[2].split())[14:]
    second = family.encode_text(components, family.tokenize(tokenizers, [rest], CaptionConfig()))
    assert found["encoder_hidden_states"][2, 16:].shape == second["encoder_hidden_states"][0].shape


def test_kept_text_states_are_those_of_the_caption(tiny_xl_pipeline: Path) -> None:
    family, components = load(tiny_xl_pipeline)
    ids = family.tokenize((components.tokenizer, components.tokenizer_2), CAPTIONS, CaptionConfig())
    cached = CachedText(lambda input_ids: family.encode_text(components, input_ids))
    first, again = cached(ids), cached(ids.flip(0))
    assert all(torch.equal(first[name], again[name].flip(0)) for name in ("encoder_hidden_states", "text_embeds"))


def test_a_model_without_zeros_for_the_empty_caption_has_none(tiny_xl_pipeline: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_xl_pipeline, tmp_path / "model"))
    change(model / "model_index.json", force_zeros_for_empty_prompt=False)
    family, components = load(model)
    ids = family.tokenize((components.tokenizer, components.tokenizer_2), [""], CaptionConfig())
    assert family.encode_text(components, ids)["text_embeds"].any()
    family.build_pipeline(components).save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is False


def test_parts_of_the_published_size() -> None:
    config = ModelConfig(pretrained_model_name_or_path=str(CONFIGURATIONS["XL"]))
    family = family_of(config)
    assert isinstance(family, StableDiffusionXL)
    components = family.load(config, load_scheduler(config), (), weights=False)
    sizes = {
        name: sum(each.numel() for each in getattr(components, name).parameters())
        for name in ("unet", "vae", *family.text_models)
    }
    assert sizes == {
        "unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840,
    }  # fmt: skip
    assert family.without_effect(components)["text_encoder"][0] == "encoder.layers.11."


# ------------------------------------------------------------------------------------------ bad input


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("unet/config.json", {"projection_class_embeddings_input_dim": 2560}, "is the refiner of SDXL"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 60}, "input_dim is 60, six sizes of 8 values"),
        ("unet/config.json", {"time_cond_proj_dim": 8}, "is a latent consistency model (LCM), distilled to draw"),
        ("unet/config.json", {"in_channels": 9}, "is an inpainting model"),
        ("unet/config.json", {"addition_embed_type": None}, "addition_embed_type is None, and an SDXL UNet takes"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type asks for a condition besides"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "is of EDM, which knows no betas"),
        ("model_index.json", {"text_encoder": [None, None]}, "is the refiner of SDXL"),
        ("text_encoder_2/config.json", {"max_position_embeddings": 12}, "tokenizers take 16 and 12 tokens"),
    ],
)  # fmt: skip
def test_what_is_no_sdxl_base_model_is_refused_by_what_it_is(
    tiny_xl_pipeline: Path, tmp_path: Path, file: str, values: dict[str, Any], words: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_xl_pipeline.rglob("*"):
        if path.is_file():
            (model / path.relative_to(tiny_xl_pipeline)).parent.mkdir(exist_ok=True)
            shutil.copy(path, model / path.relative_to(tiny_xl_pipeline))
    change(model / file, **values)
    with pytest.raises(RecipeError) as error:
        load_without_weights(model)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert "choose" in str(error.value) or "set it" in str(error.value)


def load_without_weights(folder: Path) -> None:
    config = ModelConfig(pretrained_model_name_or_path=str(folder))
    family = family_of(config)
    family.load(config, load_scheduler(config), family.load_tokenizers(config), weights=False)


def test_other_names_of_diffusers_flags() -> None:
    data = {"pretrained_model_name_or_path": "m", "train_data_dir": "d"}
    recipe = Recipe(**data, pretrained_vae_model_name_or_path="v", proportion_empty_prompts=0.1)
    assert (recipe.vae, recipe.caption_dropout) == ("v", 0.1)
    with pytest.raises(ValueError, match="v is another name of --vae, which is w: drop one"):
        Recipe(**data, pretrained_vae_model_name_or_path="v", vae="w")


# ------------------------------------------------------------------------------------------ float16


def overflowing_vae() -> AutoencoderKL:
    """In float32 the same as a tiny one: what its decoder's first convolution makes large, the next norm takes back."""
    vae = tiny_vae().eval().requires_grad_(False)
    vae.decoder.conv_in.weight.mul_(1e6)
    return vae


def test_a_vae_that_overflows_in_float16_runs_in_float32(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents_module, "TRIAL_SIDE", 16)  # a CPU's float16 is slow
    torch.manual_seed(0)
    cpu, recipe = torch.device("cpu"), Recipe(pretrained_model_name_or_path="m", train_data_dir="d")
    with caplog.at_level(logging.WARNING):
        assert bearable_dtype(tiny_vae(), torch.float16, cpu) == torch.float16
        assert [each.name for each in caplog.records if each.name.startswith("sd_recipes")] == []
        caplog.clear()
        vae = overflowing_vae()
        assert bearable_dtype(vae, torch.bfloat16, cpu) == torch.bfloat16
        dtype = bearable_dtype(vae, torch.float16, cpu)
    assert dtype == torch.float32
    assert caplog.messages[-1].startswith("This VAE's values overflow in fp16")
    assert provenance_of(recipe, vae, dtype)["vae_dtype"] == "float32"
    assert vae.dtype == torch.float32, "it was tried on a copy"
    latents = torch.randn(1, 4, 8, 8)
    expected = decode_latents(vae, latents)
    encoder = LatentEncoder(vae, cpu, dtype)
    decode_without_autocast(vae)
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(decode_latents(encoder.vae, latents), expected)


def test_a_plan_in_float16_counts_the_vae_in_float32(tiny_pipeline: Path, tiny_xl_pipeline: Path) -> None:
    """Of SDXL, unless its configuration says that it does not overflow."""
    found = {}
    for folder in (tiny_pipeline, tiny_xl_pipeline):
        recipe = Recipe(pretrained_model_name_or_path=str(folder), train_data_dir="d", mixed_precision="fp16",
                        resolution=32, lora_rank=2)  # fmt: skip
        found[folder] = TracedStep(recipe, "cuda", passes=False).model.encoder.dtype
    assert found == {tiny_pipeline: torch.float16, tiny_xl_pipeline: torch.float32}
