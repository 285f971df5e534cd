"""Runs of SDXL: both text models, resumed to the bit, cached, and drawn by stock diffusers as here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from launching import finish, flags_of, start, torchrun
from outside import draw, draw_as_validation, exported, loss_of_pictures
from safetensors.torch import load_file, save_file
from shortages import shorten
from training_runs import Run, assert_equal, build, fit_from, forget_accelerator, train, weights

from sd_recipes.commands.cache import fill_cache
from sd_recipes.commands.of_run import load_model, merge_loras
from sd_recipes.errors import RecipeError
from sd_recipes.model.lora_files import LORA_FILE
from sd_recipes.recipe import Recipe
from sd_recipes.training.build_parts import UNET_WEIGHTS

TEXT: dict[str, Any] = {"train_text_encoder": True, "use_ema": True, "caption_dropout": 0.3}
LORA: dict[str, Any] = {"lora_rank": 4, "lora_targets": ["all"], "lora_text_encoder": True}
WITHOUT_EFFECT = ("encoder.layers.1.", "final_layer_norm.")  # of the first text encoder


def without_effect(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith(WITHOUT_EFFECT)}


def state_of(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    return run.state.state_dict().tensors


@pytest.mark.parametrize("changes", [
    {**TEXT, "random_flip": True, "gradient_accumulation_steps": 2, "train_batch_size": 2},
    {**LORA, "mixed_precision": "bf16", "gradient_checkpointing": True},
], ids=["full", "lora-bf16"])  # fmt: skip
def test_a_run_goes_on_to_the_bit(xl_settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = {**xl_settings, **changes, "checkpointing_steps": 2, "max_train_steps": 3}
    whole = train(settings, output_dir=str(tmp_path / "whole"))
    torch.manual_seed(99)
    resumed = train(settings, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    first, second = state_of(whole), state_of(resumed)
    assert first.keys() == second.keys()
    for file, named in first.items():
        assert_equal(named, second[file])
    suffix = "_lora" if "lora_rank" in changes else ""
    assert list(whole.state.parts) == [f"{part}{suffix}" for part in ("unet", "text_encoder", "text_encoder_2")]
    assert [name for name in whole.state.parameters if without_effect({name.partition("/")[2]: torch.zeros(1)})] == [
        name for name in whole.state.parameters if name.startswith("text_encoder_2") and "final_layer_norm" in name[:32]
    ]


def test_all_that_matters_moves_and_stock_diffusers_has_and_draws_it(
    xl_settings: dict[str, Any], tiny_xl_pipeline: Path
) -> None:
    base = StableDiffusionXLPipeline.from_pretrained(tiny_xl_pipeline)
    run = train(xl_settings, **TEXT, learning_rate=1e-2, max_train_steps=3, mixed_precision="bf16")
    stock = exported(run, tiny_xl_pipeline)
    assert isinstance(stock, StableDiffusionXLPipeline)
    assert stock.config.force_zeros_for_empty_prompt is True
    assert_equal(stock.vae.state_dict(), base.vae.state_dict())
    of_first = without_effect(stock.text_encoder.state_dict())
    assert len(of_first) == 18
    assert_equal(of_first, without_effect(base.text_encoder.state_dict()))
    for part in ("unet", "text_encoder", "text_encoder_2"):
        before, after = (getattr(each, part).state_dict() for each in (base, stock))
        still = {name for name, value in before.items() if torch.equal(value, after[name])}
        assert still == (set(of_first) if part == "text_encoder" else set()), part
    for part in ("text_encoder", "text_encoder_2"):
        saved = load_file(run.output_dir / "checkpoint-3" / f"{part}_ema" / "model.safetensors")
        assert_equal(saved, getattr(stock, part).state_dict())
    # The model in the checkpoint is the exported one: nothing is missing in its folders, and nothing is left over.
    loaded = load_model(str(run.output_dir / "checkpoint-3"), None, {}).components
    assert_equal(loaded.text_encoder.state_dict(), stock.text_encoder.state_dict())


def with_layers_without_effect(file: Path) -> Path:
    tensors = load_file(file)
    for kind, shape in (("A", (4, 24)), ("B", (24, 4))):
        tensors[f"text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_{kind}.weight"] = torch.zeros(shape)
    save_file(tensors, file.with_name("more.safetensors"))
    return file.with_name("more.safetensors")


@pytest.mark.parametrize("changes", [{"use_ema": True}, LORA], ids=["full", "lora"])
def test_stock_diffusers_draws_the_validations_pixels(
    xl_settings: dict[str, Any], tiny_xl_pipeline: Path, changes: dict[str, Any]
) -> None:
    run = train(xl_settings, learning_rate=2e-2, max_train_steps=3, **changes)
    stock, own = exported(run, tiny_xl_pipeline), draw_as_validation(run)
    np.testing.assert_allclose(draw(stock), own, atol=1e-3)  # a quarter of a gray level
    assert np.abs(draw(StableDiffusionXLPipeline.from_pretrained(tiny_xl_pipeline)) - own).max() > 0.02
    if "lora_rank" in changes:
        again = build(xl_settings, lora_weights=str(run.output_dir), lora_text_encoder=True)
        np.testing.assert_allclose(draw_as_validation(again), own, atol=1e-3)
        # diffusers' script has layers in its files that the UNet does not see, and that nothing changed.
        file = with_layers_without_effect(run.output_dir / LORA_FILE)
        more = build(xl_settings, lora_weights=str(file), lora_text_encoder=True)
        assert list(more.state.parameters) == list(again.state.parameters)
        merged = load_model(str(run.output_dir), None, {})
        merge_loras(merged, [])
        np.testing.assert_allclose(draw(merged.family.build_pipeline(merged.components)), own, atol=1e-3)


def test_moments_that_are_kept_leave_the_run_as_it_is(xl_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**xl_settings, "center_crop": True, "random_flip": True, "max_train_steps": 3, "caption_dropout": 0.3}
    kept = {"cache_latents": "disk", "latent_cache_dir": str(tmp_path / "latents")}
    first = train(settings, **kept, output_dir=str(tmp_path / "first"))
    second = train(settings, **kept, output_dir=str(tmp_path / "second"))  # all rows are there
    assert_equal(weights(first), weights(second))
    batch = next(second.batches(0, 1))[0]
    assert len(batch.to_encode) == 0
    assert batch.original_size.tolist() == [[32, 40]] * 4
    assert batch.crop_corner.tolist() == [[0, 4]] * 4


@pytest.mark.parametrize(("cropping", "corner"), [("center", [0, 4]), ("none", [0, 0])])
def test_the_crop_of_moments_that_are_data_is_the_one_that_they_were_made_with(
    xl_settings: dict[str, Any], tmp_path: Path, cropping: str, corner: list[int]
) -> None:
    """Whatever this run's --crop is, in training and in validation, which crops pictures in the center."""
    forget_accelerator()
    folder = fill_cache(Recipe(**xl_settings, crop=cropping, latent_cache_dir=str(tmp_path / "latents")))
    rows = {"train_data_dir": None, "dataset_name": str(folder / "*.arrow")}
    run = build({**xl_settings, **rows}, validation_split="train")
    for builder in (run.batches.builder, run.validator.samples["held_out"].builder):
        batch = builder[next(run.batches.plans(0, None))]
        assert batch.original_size.tolist() == [[32, 40]] * 4
        assert batch.crop_corner.tolist() == [corner] * 4


def test_a_step_without_memory_is_done_again_in_parts(xl_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**xl_settings, "max_train_steps": 2, "train_text_encoder": True}
    expected = train(settings, micro_batch=2, output_dir=str(tmp_path / "expected"))
    run = build(settings)
    shorten(run, "forward", fits=2)
    fit_from(run)
    assert run.state.progress.micro_batch == 2
    for file, named in state_of(expected).items():
        assert_equal(named, state_of(run)[file])


def test_what_does_not_fit_the_family_is_told(
    xl_settings: dict[str, Any], settings: dict[str, Any], tiny_xl_pipeline: Path, tmp_path: Path
) -> None:
    def told(settings: dict[str, Any], **changes: Any) -> str:
        with pytest.raises(RecipeError) as error:
            build(settings, **changes, output_dir=str(tmp_path / "refused"))
        assert "\n" not in str(error.value)
        return str(error.value)

    run = train(settings, lora_rank=2, max_train_steps=1)
    exported(run, Path(settings["pretrained_model_name_or_path"]))
    assert "is a LoRA of " in told(xl_settings, lora_weights=str(run.output_dir))
    unet = {"pretrained_model_name_or_path": f"{tiny_xl_pipeline}/unet"}
    base = settings["pretrained_model_name_or_path"]
    assert f"--base {base} is a StableDiffusion model and --pretrained" in told({**settings, **unet}, base=base)
    assert f"is a UNet alone, of the pipeline above it: name that one, {tiny_xl_pipeline}" in told({**settings, **unet})


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {}, {"train_text_encoder": True}, {**LORA, "lora_rank": 16, "learning_rate": 1e-2, "max_train_steps": 60},
], ids=["full", "text", "lora"])  # fmt: skip
def test_eight_pictures_are_learned_as_seen_from_outside(
    xl_settings: dict[str, Any], tiny_xl_pipeline: Path, image_folder: Path, changes: dict[str, Any]
) -> None:
    usual = {"max_train_steps": 40, "train_batch_size": 8, "learning_rate": 3e-3, "cache_latents": "memory",
             "center_crop": True}  # fmt: skip
    run = train(xl_settings, **{**usual, **changes})
    before = loss_of_pictures(
        StableDiffusionXLPipeline.from_pretrained(tiny_xl_pipeline), image_folder, tiny_xl_pipeline
    )
    assert loss_of_pictures(exported(run, tiny_xl_pipeline), image_folder, tiny_xl_pipeline) < 0.5 * before


@pytest.mark.slow
def test_two_processes_train_as_one(xl_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**xl_settings, "train_text_encoder": True, "optimizer": "sgd", "learning_rate": 1e-2}
    one = train(settings, output_dir=str(tmp_path / "one"))
    two = tmp_path / "two"
    finish(start(torchrun(2), *flags_of(settings | {"train_batch_size": 2, "output_dir": two})))
    for part, file in (("unet", UNET_WEIGHTS), ("text_encoder", "model.safetensors"), ("text_encoder_2", None)):
        saved = load_file(two / "checkpoint-4" / part / (file or "model.safetensors"))
        for name, value in one.state.parts[part].tensors().items():
            torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6, msg=f"{part}/{name}")
