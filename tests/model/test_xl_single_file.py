"""SDXL in one file: every tensor of both text models, the UNet and the VAE, as stock diffusers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from single_files import config_of, original_unet, part_of, single_file
from tiny_models import build_tiny_pipeline, build_tiny_xl_pipeline
from training_runs import assert_equal, train

from sd_recipes import assets
from sd_recipes.errors import RecipeError
from sd_recipes.model.components import load_scheduler, load_vae
from sd_recipes.model.families import family_of
from sd_recipes.model.sources import source_of
from sd_recipes.model.stable_diffusion_xl import StableDiffusionXL
from sd_recipes.recipe import ModelConfig

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def model(tiny_xl_pipeline: Path) -> Path:
    return tiny_xl_pipeline


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same shapes, with other weights."""
    return build_tiny_xl_pipeline(tmp_path_factory.mktemp("xl") / "other", seed=1)


def file_of(path: Path, model: Path, **options: Any) -> Path:
    return single_file(path, model, generation="XL", **options)


def load(file: Path, **flags: Any) -> Any:
    config = ModelConfig(pretrained_model_name_or_path=str(file), **{name: str(flags[name]) for name in flags})
    family = family_of(config)
    return family.load(config, load_scheduler(config), family.load_tokenizers(config))


def test_every_tensor_is_the_one_that_diffusers_reads(model: Path, other: Path, tmp_path: Path) -> None:
    file = file_of(tmp_path / "m.safetensors", model)
    components = load(file, base=other)
    stock = StableDiffusionXLPipeline.from_single_file(str(file), config=str(model), local_files_only=True)
    for part in PARTS:
        assert_equal(getattr(components, part).state_dict(), part_of(model, part))
        assert_equal(getattr(stock, part).state_dict(), part_of(model, part))


def test_a_file_of_full_size_needs_no_other(tmp_path: Path) -> None:
    """Its configuration, its schedule and its two tokenizers come along, of which the second pads with 0."""
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "first_stage_model.x": (1,),
        "conditioner.embedders.0.transformer.x": (1,),
        "conditioner.embedders.1.model.ln_final.weight": (1280,),
    }
    file = tmp_path / "m.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    config = ModelConfig(pretrained_model_name_or_path=str(file))
    family = family_of(config)
    assert isinstance(family, StableDiffusionXL)
    first, second = family.load_tokenizers(config)
    padded = [each("a cat", padding="max_length").input_ids[:6] for each in (first, second)]
    assert padded == [[49406, 320, 2368, 49407, 49407, 49407], [49406, 320, 2368, 49407, 0, 0]]
    outline = family.load(config, load_scheduler(config), (), weights=False)
    assert sum(each.numel() for each in outline.unet.parameters()) == 2_567_463_684
    assert (outline.vae.config.scaling_factor, type(outline.sampler).__name__) == (0.13025, "EulerDiscreteScheduler")
    with pytest.raises(RecipeError, match=r"cannot load text_encoder: .* 196 of its 196 tensors are missing"):
        family.load(config, load_scheduler(config), (first, second))


def test_what_is_missing_and_left_over_is_counted(model: Path, tmp_path: Path) -> None:
    whole = load_file(file_of(tmp_path / "m.safetensors", model))
    prefix = "conditioner.embedders.1.model."
    broken = {
        f"{prefix}text_projection": (
            "text_encoder_2",
            "1 of its 53 tensors are missing (such as text_projection.weight",
        ),
        f"{prefix}transformer.resblocks.1.attn.in_proj_weight": ("text_encoder_2", "3 of its 53 tensors are missing"),
        "model.diffusion_model.label_emb.0.2.bias": ("unet", "missing (such as add_embedding.linear_2.bias"),
    }
    for name, (part, words) in broken.items():
        file = tmp_path / "broken.safetensors"
        save_file({each: value for each, value in whole.items() if each != name}, file)
        with pytest.raises(RecipeError) as error:
            load(file, base=model)
        assert f"cannot load {part}: " in str(error.value)
        assert words in str(error.value)
    file = tmp_path / "more.safetensors"
    save_file({**whole, "model.diffusion_model.label_emb.0.4.bias": torch.zeros(3)}, file)
    with pytest.raises(RecipeError, match=r"1 of the file's \d+ are left over \(such as label_emb.0.4.bias\)"):
        load(file, base=model)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_unet_alone_is_filled_in_from_a_base_of_its_kind(
    model: Path, other: Path, tmp_path: Path, layout: str
) -> None:
    unet, file = part_of(other, "unet"), tmp_path / "unet.safetensors"
    save_file(original_unet(unet, config_of(other, "unet")) if layout == "original" else unet, file)
    with pytest.raises(RecipeError, match=r"is a UNet of SDXL alone and lacks .*text encoder 2.*: add --base NAME"):
        load(file)
    components = load(file, base=model)
    assert_equal(components.unet.state_dict(), unet)
    assert_equal(components.text_encoder_2.state_dict(), part_of(model, "text_encoder_2"))
    sd = build_tiny_pipeline(tmp_path / "sd")
    whole = file_of(tmp_path / "whole.safetensors", model)
    for name, base in ((file, sd), (whole, sd), (single_file(tmp_path / "sd.safetensors", sd), model)):
        with pytest.raises(RecipeError, match="name a base of its own kind"):
            load(name, base=base)


def test_its_vae_has_the_scale_of_its_own_family(model: Path, other: Path, tmp_path: Path) -> None:
    file = file_of(tmp_path / "m.safetensors", other)
    vae = load_vae(ModelConfig(pretrained_model_name_or_path=str(model), vae=str(file)))
    assert_equal(vae.state_dict(), part_of(other, "vae"))
    assert vae.config.scaling_factor == 0.13025
    sd = ModelConfig(pretrained_model_name_or_path=str(build_tiny_pipeline(tmp_path / "sd")), vae=str(file))
    assert source_of(sd, "vae").read_config("vae")["scaling_factor"] == 0.13025


@pytest.mark.parametrize(
    ("keys", "metadata", "expected"),
    [
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}, ("v_prediction", True)),
        ({}, {"modelspec.predict_key": "v"}, ("v_prediction", False)),
        ({}, {}, ("epsilon", False)),
    ],
)
def test_what_a_file_says_of_its_prediction_counts(
    model: Path, tmp_path: Path, keys: dict[str, torch.Tensor], metadata: dict[str, str], expected: tuple[str, bool]
) -> None:
    file = file_of(tmp_path / "m.safetensors", model, metadata=metadata or None, **keys)
    scheduler = load_scheduler(ModelConfig(pretrained_model_name_or_path=str(file), base=str(model)))
    assert (scheduler.config.prediction_type, scheduler.config.rescale_betas_zero_snr) == expected


def test_its_configuration_is_the_published_one() -> None:
    config = config_of(assets.CONFIGURATIONS["XL"], "unet")
    assert config["transformer_layers_per_block"] == [1, 2, 10]
    assert config["projection_class_embeddings_input_dim"] == 1280 + 6 * config["addition_time_embed_dim"]


@pytest.mark.slow
def test_a_run_from_one_file_is_that_from_the_folder_to_the_bit(
    xl_settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """Of all that is trained: memory is laid out the same, so that sums are rounded the same."""
    file = file_of(tmp_path / "m.safetensors", model)
    changes = {"train_text_encoder": True, "max_train_steps": 2}
    first = train(xl_settings, **changes, output_dir=str(tmp_path / "folder"))
    second = train({**xl_settings, "pretrained_model_name_or_path": str(file), "base": str(model)}, **changes)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        one, other = (getattr(each.model.components, part).state_dict() for each in (first, second))
        assert_equal(one, other)
        assert not all(torch.equal(value, part_of(model, part)[name]) for name, value in one.items())
