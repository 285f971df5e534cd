"""Models in one file: every tensor is the one that was given, and what a run exports is an ordinary pipeline."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from single_files import (
    WEIGHTS,
    config_of,
    original_text,
    original_unet,
    original_vae,
    part_of,
    single_file,
)
from tiny_models import build_tiny_pipeline
from training_runs import assert_equal, assert_leaves_as_it_came, forget_accelerator
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sd_recipes import assets
from sd_recipes.commands.train import run
from sd_recipes.errors import RecipeError
from sd_recipes.model.components import Components, load_sampler, load_scheduler, load_vae
from sd_recipes.model.families import family_of
from sd_recipes.model.loading import HARMLESS
from sd_recipes.model.original_layout import original_tensors, take_part
from sd_recipes.model.weight_files import Weights
from sd_recipes.recipe import ModelConfig, Recipe


def config_for(model: Path, **flags: Any) -> ModelConfig:
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    return ModelConfig(pretrained_model_name_or_path=str(model), **flags)


def load(model: Path, **flags: Any) -> Components:
    config = config_for(model, **flags)
    family = family_of(config)
    return family.load(config, load_scheduler(config), family.load_tokenizers(config))


def assert_parts_of(components: Components, pipeline: Path, *parts: str) -> None:
    for part in parts or ("unet", "vae", "text_encoder"):
        assert_equal(getattr(components, part).state_dict(), part_of(pipeline, part))


@pytest.fixture(scope="module")
def other_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same shapes as the tiny one, with other weights."""
    return build_tiny_pipeline(tmp_path_factory.mktemp("other") / "pipeline", seed=1)


# --------------------------------------------------------------------------------- against diffusers


def test_the_layout_is_the_one_that_diffusers_reads(tiny_pipeline: Path, tmp_path: Path) -> None:
    file = str(single_file(tmp_path / "model.safetensors", tiny_pipeline))
    for part, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        theirs = cls.from_single_file(file, config=str(tiny_pipeline), subfolder=part, local_files_only=True)
        assert_equal(theirs.state_dict(), part_of(tiny_pipeline, part))


def of_full_size(generation: assets.Generation) -> dict[str, Any]:
    """The parts that have weights, by the configurations that come along, without memory."""
    folder = assets.CONFIGURATIONS[generation]
    with init_empty_weights():
        parts = {
            "unet": UNet2DConditionModel.from_config(config_of(folder, "unet")),
            "vae": AutoencoderKL.from_config(config_of(folder, "vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(config_of(folder, "text_encoder"))),
        }
        if generation == "XL":
            config = CLIPTextConfig.from_dict(config_of(folder, "text_encoder_2"))
            parts["text_encoder_2"] = CLIPTextModelWithProjection(config)
    return parts


@pytest.mark.parametrize(
    ("generation", "num_parameters", "num_tensors"),
    [
        (1, 859_520_964, [686, 248, 196]),
        (2, 865_910_724, [686, 248, 372]),
        ("XL", 2_567_463_684, [1680, 248, 196, 517]),
    ],
)
def test_the_configurations_that_come_along_fit_checkpoints_of_full_size(
    generation: assets.Generation, num_parameters: int, num_tensors: list[int]
) -> None:
    """By names and shapes, with no memory: our names into the original layout, diffusers' converters out of it."""
    parts = of_full_size(generation)
    # As counted in the checkpoints themselves.
    assert [len(module.state_dict()) for module in parts.values()] == num_tensors
    assert sum(parameter.numel() for parameter in parts["unet"].parameters()) == num_parameters

    original = {
        part: original_tensors(part, module.state_dict(), module.config, generation) for part, module in parts.items()
    }
    converted = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(original["unet"], parts["unet"].config),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(original["vae"], parts["vae"].config),
    }
    if generation == "XL":
        converted["text_encoder_2"] = single_file_utils.convert_open_clip_checkpoint(
            parts["text_encoder_2"], original["text_encoder_2"], prefix="conditioner.embedders.1.model."
        )
    for part, module in parts.items():
        shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        if part in converted:
            assert {name: tuple(value.shape) for name, value in converted[part].items()} == shapes
        in_file = Weights("file", {name: tuple(value.shape) for name, value in original[part].items()}, {}.__getitem__)
        taken = take_part(in_file, part, module.config, shapes).shapes
        if part == "text_encoder" and generation != 2:
            taken = {name.removeprefix("text_model."): shape for name, shape in taken.items()}
        left_over = {name for name in taken.keys() - shapes.keys() if not HARMLESS[part].match(name)}
        assert not left_over
        assert {name: taken[name] for name in shapes} == {
            name: taken[name] if "attentions" in name and part == "vae" else shape for name, shape in shapes.items()
        }


@pytest.mark.parametrize("generation", [1, 2, "XL"])
def test_what_is_written_of_full_size_has_every_tensor_of_the_originals(generation: assets.Generation) -> None:
    """Against the tests' own writer: names and shapes, and OpenCLIP's last layer, which programs look for."""
    parts = of_full_size(generation)
    tensors = {part: module.state_dict() for part, module in parts.items()}
    expected = original_unet(tensors["unet"], parts["unet"].config) | original_vae(tensors["vae"], parts["vae"].config)
    expected |= original_text(generation, tensors["text_encoder"], tensors.get("text_encoder_2"))
    written: dict[str, torch.Tensor] = {}
    for part, module in parts.items():
        written |= original_tensors(part, tensors[part], module.config, generation)
    assert {name: value.shape for name, value in written.items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert len(written) == {
        1: 686 + 248 + 197, 2: 686 + 248 + 24 * 12 + 6, "XL": 1680 + 248 + 197 + 32 * 12 + 6
    }[generation]  # fmt: skip


def test_the_tokenizer_that_comes_along_is_clips(tmp_path: Path) -> None:
    for generation, pad in ((1, 49407), (2, 0)):
        model = {"cond_stage_model.model.token_embedding.weight": torch.zeros(1)} if generation == 2 else {}
        model |= {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}
        model |= {"first_stage_model.x": torch.zeros(1), "cond_stage_model.transformer.x": torch.zeros(1)}
        save_file(model, tmp_path / f"{generation}.safetensors")
        config = config_for(tmp_path / f"{generation}.safetensors")
        (tokenizer,) = family_of(config).load_tokenizers(config)
        assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
        assert tokenizer("It's naïve, 日本! 🙂").input_ids[1:6] == [585, 568, 1097, 35689, 563]
        assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.model_max_length) == (49408, pad, 77)


# ------------------------------------------------------------------------------------------ what is loaded


@pytest.mark.parametrize("generation", [1, 2])
def test_every_tensor_of_a_file_is_loaded(
    tiny_pipeline: Path, other_pipeline: Path, tmp_path: Path, generation: int, caplog: pytest.LogCaptureFixture
) -> None:
    file = single_file(tmp_path / "my model.safetensors", tiny_pipeline, generation=generation)
    with caplog.at_level(logging.INFO, logger="sd_recipes"):
        components = load(file, base=other_pipeline)
    assert_parts_of(components, tiny_pipeline)
    assert f"is a checkpoint of Stable Diffusion {generation} in one file" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_files_of_lower_precision_are_trained_in_float32(
    tiny_pipeline: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    components = load(single_file(tmp_path / "m.safetensors", tiny_pipeline, dtype=dtype), base=tiny_pipeline)
    rounded = {name: value.to(dtype).float() for name, value in part_of(tiny_pipeline, "unet").items()}
    assert_equal(components.unet.state_dict(), rounded)


def test_averaged_weights_in_a_file_are_left_alone_and_mentioned(
    tiny_pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    averaged = {"model_ema.decay": torch.zeros(()), "model_ema.diffusion_modelout0weight": torch.zeros(3)}
    file = single_file(tmp_path / "m.safetensors", tiny_pipeline, **averaged, alphas_cumprod=torch.zeros(9))
    with caplog.at_level(logging.INFO, logger="sd_recipes"):
        assert_parts_of(load(file, base=tiny_pipeline), tiny_pipeline)
    assert "also holds averaged weights" in caplog.text


@pytest.mark.parametrize("layout", ["original", "without a prefix", "diffusers"])
def test_a_unet_alone_is_filled_in_from_the_base(
    tiny_pipeline: Path, other_pipeline: Path, tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    file, unet = tmp_path / "unet.safetensors", part_of(other_pipeline, "unet")
    if layout != "diffusers":
        unet = original_unet(unet, config_of(other_pipeline, "unet"))
    if layout == "without a prefix":
        unet = {name.removeprefix("model.diffusion_model."): value for name, value in unet.items()}
    save_file({name: value.contiguous() for name, value in unet.items()}, file)
    with pytest.raises(
        RecipeError, match="is a UNet alone and lacks vae, text encoder, tokenizer, scheduler: add --base NAME"
    ):
        load(file)
    with caplog.at_level(logging.INFO, logger="sd_recipes"):
        components = load(file, base=tiny_pipeline)
    assert f"vae, text_encoder, tokenizer, scheduler of --base {tiny_pipeline} is used" in caplog.text
    assert_parts_of(components, other_pipeline, "unet")
    assert_parts_of(components, tiny_pipeline, "vae", "text_encoder")


def test_a_base_may_be_a_single_file(tiny_pipeline: Path, other_pipeline: Path, tmp_path: Path) -> None:
    """One of full size would bring its configuration; here the VAE's comes from a folder."""
    base = single_file(tmp_path / "base.safetensors", tiny_pipeline, parts=("unet", "vae"))
    vae = load_vae(config_for(other_pipeline, vae=base))
    assert_equal(vae.state_dict(), part_of(tiny_pipeline, "vae"))


def test_folders_of_one_part_are_filled_in_too(tiny_pipeline: Path, other_pipeline: Path, tmp_path: Path) -> None:
    """As checkpoints of trainers have them: `checkpoint-500/unet` and an optimizer."""
    checkpoint = tmp_path / "checkpoint-500"
    shutil.copytree(other_pipeline / "unet", checkpoint / "unet")
    (checkpoint / "optimizer.bin").write_bytes(b"\x80")
    for folder in (checkpoint, checkpoint / "unet"):
        with pytest.raises(RecipeError, match="add --base NAME"):
            load(folder)
        components = load(folder, base=tiny_pipeline)
        assert_parts_of(components, other_pipeline, "unet")
        assert_parts_of(components, tiny_pipeline, "vae", "text_encoder")


@pytest.mark.parametrize("form", ["pipeline", "folder of the part", "single file", "VAE file", "diffusers file"])
def test_another_vae_takes_the_place_of_the_models(
    tiny_pipeline: Path, other_pipeline: Path, tmp_path: Path, form: str
) -> None:
    vae = {
        "pipeline": other_pipeline,
        "folder of the part": other_pipeline / "vae",
        "single file": tmp_path / "m.safetensors",
        "VAE file": tmp_path / "my vae.safetensors",
        "diffusers file": other_pipeline / "vae" / WEIGHTS["vae"],
    }[form]
    if form == "single file":
        single_file(vae, other_pipeline)
    elif form == "VAE file":
        original = original_vae(part_of(other_pipeline, "vae"), config_of(other_pipeline, "vae"))
        plain = {name.removeprefix("first_stage_model."): value.contiguous() for name, value in original.items()}
        save_file({**plain, "loss.logvar": torch.zeros(())}, vae)
    components = load(tiny_pipeline, vae=vae)
    assert_parts_of(components, other_pipeline, "vae")
    assert_parts_of(components, tiny_pipeline, "unet", "text_encoder")


def test_a_run_from_one_file_exports_a_pipeline(
    settings: dict[str, Any], tiny_pipeline: Path, other_pipeline: Path, tmp_path: Path
) -> None:
    """Also from a file that was saved from within a compiled module; the names that are exported are plain."""
    unet = original_unet(part_of(other_pipeline, "unet"), config_of(other_pipeline, "unet"))
    file = tmp_path / "unet.safetensors"
    save_file({f"_orig_mod.{name}": value for name, value in unet.items()}, file)
    forget_accelerator()
    flags = {"pretrained_model_name_or_path": str(file), "base": str(tiny_pipeline), "learning_rate": 0.0}
    run(Recipe(**{**settings, **flags, "adam_weight_decay": 0.0}))
    folder = Path(settings["output_dir"])
    assert_leaves_as_it_came(folder, tiny_pipeline)
    assert_equal(part_of(folder, "unet"), part_of(other_pipeline, "unet"))
    for path in folder.rglob("*.json"):
        assert str(tmp_path) not in path.read_text() or "checkpoint" in str(path), path


def test_a_new_unet_needs_only_the_other_parts_of_a_file(tiny_pipeline: Path, tmp_path: Path) -> None:
    file = single_file(tmp_path / "m.safetensors", tiny_pipeline, parts=("vae", "text_encoder"))
    components = load(file, base=tiny_pipeline, train_from_scratch=True)
    assert_parts_of(components, tiny_pipeline, "vae", "text_encoder")
    assert components.unet.config.block_out_channels == [32, 64]


# ------------------------------------------------------------------------------- what the weights say of training


@pytest.mark.parametrize(
    ("keys", "metadata", "generation", "expected"),
    [
        ({}, {}, 1, ("epsilon", False)),
        ({"v_pred": torch.zeros(0)}, {}, 1, ("v_prediction", False)),
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}, 1, ("v_prediction", True)),
        ({}, {"modelspec.prediction_type": "v"}, 1, ("v_prediction", False)),
        ({}, {"modelspec.prediction_type": "epsilon"}, 2, ("epsilon", False)),
        ({"global_step": torch.tensor(875000)}, {}, 2, ("epsilon", False)),
        ({"global_step": torch.tensor(110000)}, {}, 2, ("v_prediction", False)),
    ],
)
def test_what_a_file_says_of_its_prediction_counts(
    tiny_pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    keys: dict[str, torch.Tensor], metadata: dict[str, str], generation: int, expected: tuple[str, bool],
) -> None:  # fmt: skip
    file = single_file(
        tmp_path / "m.safetensors", tiny_pipeline, generation=generation, metadata=metadata or None, **keys
    )
    config = config_for(file, base=tiny_pipeline)
    with caplog.at_level(logging.INFO, logger="sd_recipes"):
        scheduler = load_scheduler(config)
    assert (scheduler.config.prediction_type, scheduler.config.rescale_betas_zero_snr) == expected
    sampler = load_sampler(config, scheduler)
    assert type(sampler) is DDIMScheduler
    assert (sampler.config.prediction_type, sampler.config.rescale_betas_zero_snr) == expected
    assert ("says of itself" in caplog.text) == bool(keys or metadata)


def test_stable_diffusion_2_predicts_v_if_nothing_says_otherwise(
    tiny_pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(single_file(tmp_path / "m.safetensors", tiny_pipeline, generation=2))
    with caplog.at_level(logging.INFO, logger="sd_recipes"):
        assert load_scheduler(config).config.prediction_type == "v_prediction"
    assert "--prediction_type epsilon" in caplog.text


def test_a_base_in_one_file_says_what_its_models_predict(tiny_pipeline: Path, tmp_path: Path) -> None:
    unet = single_file(tmp_path / "unet.safetensors", tiny_pipeline, parts=("unet",))
    base = single_file(tmp_path / "base.safetensors", tiny_pipeline, v_pred=torch.zeros(0))
    assert load_scheduler(config_for(unet, base=base)).config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "settings_of_scheduler",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_data": 0.5, "prediction_type": "epsilon"},
        {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"},
        {"_class_name": "DPMSolverMultistepScheduler", "beta_start": 0.1, "use_flow_sigmas": True},
        {"_class_name": "DDIMScheduler", "beta_start": 0.1, "prediction_type": "flow_prediction"},
    ],
)
def test_a_schedule_that_training_cannot_follow_is_refused(
    tiny_pipeline: Path, tmp_path: Path, settings_of_scheduler: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings_of_scheduler))
    with pytest.raises(RecipeError, match=r"cannot load scheduler: its \w+ .*Training would not continue what"):
        load(folder)
