"""--clip_skip: text states of an earlier layer wherever there are text states, as stock diffusers makes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from tiny_models import build_tiny_xl_pipeline
from training_runs import assert_equal, build, forget_accelerator, train, weights
from transformers import CLIPTextModel

from sd_recipes.commands.evaluate import recipe_of
from sd_recipes.commands.evaluate_settings import read_settings as read_evaluate_settings
from sd_recipes.commands.export import export
from sd_recipes.commands.export_settings import read_settings as read_export_settings
from sd_recipes.commands.of_run import find_target
from sd_recipes.commands.sample import sample
from sd_recipes.commands.sample_settings import read_settings
from sd_recipes.commands.train import run as run_whole
from sd_recipes.data.captions import tokenize
from sd_recipes.errors import RecipeError
from sd_recipes.evaluation.pictures import draw_pictures, drawing_pipeline
from sd_recipes.export.hub import write_model_card
from sd_recipes.export.lora import origin_of
from sd_recipes.model.families import family_of
from sd_recipes.model.stable_diffusion import StableDiffusion
from sd_recipes.model.stable_diffusion_xl import StableDiffusionXL
from sd_recipes.recipe import CaptionConfig, ModelConfig, Recipe
from sd_recipes.training.description import describe
from sd_recipes.training.run import Run

PROMPTS = ["disc number 1", "a disc"]
LAST, FIRST = "encoder.layers.1.", "encoder.layers.0."


@pytest.fixture(autouse=True)
def stock_can_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name that diffusers 0.42 looks for, and transformers from 5.6 on does not have."""
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda text_model: text_model), raising=False)


def stock_pictures(folder: Path, clip_skip: int | None, seed: int, **settings: Any) -> list[np.ndarray]:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()  # of several pictures at once the VAE's rounding is another
    generators = [torch.Generator("cpu").manual_seed(seed + number) for number in range(len(PROMPTS))]
    drawn = pipeline(PROMPTS, generator=generators, height=32, width=32, clip_skip=clip_skip, num_inference_steps=3,
                     **settings).images  # fmt: skip
    return [np.asarray(picture) for picture in drawn]


def assert_drawn_alike(one: Sequence[Any], other: Sequence[Any]) -> None:
    """But for a gray level of rounding: a run's UNet may be laid out in another way than it is loaded."""
    for drawn, expected in zip(one, other, strict=True):
        np.testing.assert_allclose(np.asarray(drawn).astype(int), np.asarray(expected).astype(int), atol=1)


@pytest.mark.parametrize("clip_skip", [None, 1, 2])
def test_training_and_its_pictures_have_stock_diffusers_text_states(
    settings: dict[str, Any], tiny_pipeline: Path, clip_skip: int | None
) -> None:
    run = build(settings, clip_skip=clip_skip, validation_prompts=PROMPTS, validation_inference_steps=3)
    model, recipe = run.model, run.recipe
    stock = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    ids = tokenize(stock.tokenizer, PROMPTS, CaptionConfig())
    with torch.no_grad():
        expected, _ = stock.encode_prompt(PROMPTS, "cpu", 1, False, clip_skip=clip_skip)
        assert torch.equal(model.encode_text(ids)["encoder_hidden_states"], expected)
        drawn = draw_pictures(
            drawing_pipeline(model.family, model.components), partial(model.family.prompt_arguments, model.components),
            PROMPTS, recipe, (32, 32), range(2), 2,
        )  # fmt: skip
    assert recipe.seed is not None
    as_stock = stock_pictures(tiny_pipeline, clip_skip, recipe.seed)
    assert_drawn_alike(drawn, as_stock)
    others = stock_pictures(tiny_pipeline, None if clip_skip else 1, recipe.seed)
    assert not any(map(np.array_equal, as_stock, others))
    assert ("draw with clip_skip=1 in diffusers, Clip skip 2 in A1111" in describe(run)) == (clip_skip == 1)


def test_kept_text_states_change_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"clip_skip": 1, "max_train_steps": 2}
    plain = train(settings)
    kept = train(settings, cache_text=True, output_dir=str(tmp_path / "kept"))
    assert_equal(weights(plain), weights(kept))


def text_weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in run.model.components.text_encoder.state_dict().items()}


@pytest.mark.parametrize("changes", [
    {"train_text_encoder": True, "use_ema": True},
    pytest.param({"lora_rank": 2, "lora_text_encoder": True, "optimizer": "adamw8bit"},
                 marks=pytest.mark.slow),
    pytest.param({"train_text_encoder": True, "gradient_checkpointing": True, "mixed_precision": "bf16"},
                 marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_layers_that_are_left_out_are_not_trained_and_a_run_resumes_to_the_bit(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings |= {"clip_skip": 1, "checkpointing_steps": 2, **changes}
    before = text_weights(build(settings))
    whole = train(settings, output_dir=str(tmp_path / "whole"))
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = train(settings, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=checkpoint)
    first, second = (run.state.state_dict() for run in (whole, resumed))
    for file, named in first.tensors.items():
        assert_equal(named, second.tensors[file])
    changed = {name for name, each in text_weights(whole).items() if not torch.equal(each, before[name])}
    assert any(name.startswith(FIRST) for name in changed)
    assert not any(name.startswith(LAST) for name in changed)
    with pytest.raises(RecipeError, match="clip_skip"):
        train(settings, clip_skip=None, output_dir=settings["output_dir"], resume_from_checkpoint=checkpoint)


@pytest.fixture(scope="module")
def trained(tiny_pipeline: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is done."""
    folder = tmp_path_factory.mktemp("skipping") / "run"
    forget_accelerator()
    run_whole(
        Recipe(
            pretrained_model_name_or_path=str(tiny_pipeline), train_data_dir=str(image_folder), resolution=32,
            train_batch_size=4, max_train_steps=2, learning_rate=3e-3, lr_warmup_steps=0, device="cpu", seed=5,
            report_to="none", validation_split="0.4", validation_samples=8, validation_pictures=0, clip_skip=1,
            checkpointing_steps=1, output_dir=str(folder),
        )
    )  # fmt: skip
    return folder


def sampled(model: Path, output_dir: Path, *words: str) -> tuple[list[np.ndarray], str]:
    """The pictures, and what the first one says of itself."""
    flags = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(output_dir), "--steps", "3", "--device",
             "cpu", "--prompts", *PROMPTS, *words]  # fmt: skip
    sample(read_settings(flags))
    pictures = [Image.open(path) for path in sorted(output_dir.glob("0*.png"))]
    return [np.asarray(picture) for picture in pictures], pictures[0].text["parameters"]


def test_a_run_is_drawn_with_as_it_was_trained_and_anything_as_it_is_asked_for(
    trained: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    for model, words, clip_skip in (
        (trained, (), 1), (trained, ("--clip_skip", "2"), 2), (tiny_pipeline, (), None),
        (tiny_pipeline, ("--clip_skip", "1"), 1),
    ):  # fmt: skip
        pictures, text = sampled(model, tmp_path / f"{model.name}-{clip_skip}", *words)
        expected = stock_pictures(model, clip_skip, 0, negative_prompt=[""] * 2, guidance_scale=7.5)
        assert all(map(np.array_equal, pictures, expected)), (model, words)
        said = re.search(r"Clip skip: (\d+)", text)
        assert (said and int(said[1])) == (clip_skip and clip_skip + 1)  # A1111 counts the last layer too
    # A checkpoint has it from its run.
    newest, _ = sampled(trained / "checkpoint-2", tmp_path / "checkpoint")
    assert all(map(np.array_equal, newest, stock_pictures(trained, 1, 0)))


def test_page_and_card_say_how_to_draw_and_the_card_s_lines_do(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        "Draw with clip_skip=1 in diffusers, Clip skip 2 in A1111 (which has none for SDXL)."
        in (trained / "report.html").read_text()
    )
    recipe = Recipe(pretrained_model_name_or_path="m", train_data_dir="d", clip_skip=1, validation_prompts=["a disc"])
    write_model_card(tmp_path, str(trained), recipe, StableDiffusion(), "epsilon")
    card = (tmp_path / "README.md").read_text()
    assert "Draw with clip_skip=1 in diffusers, Clip skip 2 in A1111." in card
    assert card.rstrip().endswith("--prompts 'a disc' --clip_skip 1")
    monkeypatch.delattr(CLIPTextModel, "text_model")
    monkeypatch.chdir(tmp_path)
    try:
        exec(
            re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0].replace(
                "clip_skip=1", "clip_skip=1, num_inference_steps=2"
            )
        )
    finally:
        del CLIPTextModel.text_model  # which the lines have added
    assert (tmp_path / "image.png").is_file()


def test_what_is_exported_says_it_in_a1111_s_count_and_who_draws_with_it_is_told(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for kind, output in (("single_file", "model.safetensors"), ("kohya_lora", "lora.safetensors")):
        words = [str(trained), "--to", kind, "--output", str(tmp_path / output), "--dtype", "fp32"]
        export(read_export_settings([*words, *(["--rank", "2"] if kind == "kohya_lora" else [])]))
        with safe_open(tmp_path / output, "pt") as file:
            assert file.metadata()["modelspec.encoder_layer"] == "2"
    for clip_skip in (1, None):
        assert "--clip_skip" not in caplog.text
        family_of(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "model.safetensors"), clip_skip=clip_skip))
    assert "text states of layer 2 from the end (modelspec.encoder_layer): --clip_skip 1 uses these." in caplog.text


def test_of_sdxl_words_and_files_count_from_the_penultimate_layer(tmp_path: Path) -> None:
    recipe = Recipe(pretrained_model_name_or_path="m", train_data_dir="d", clip_skip=1)
    assert origin_of(StableDiffusionXL(), recipe)["modelspec.encoder_layer"] == "3"
    write_model_card(tmp_path, "a/b", recipe, StableDiffusionXL(), "epsilon")
    assert "Draw with clip_skip=1 in diffusers, for which A1111 has no setting." in (tmp_path / "README.md").read_text()


def test_a_run_is_evaluated_as_it_was_trained_and_another_model_as_the_first_run(
    trained: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    config = read_evaluate_settings([str(trained), str(tiny_pipeline)])
    targets = [find_target(name, "evaluated") for name in config.targets]
    assert [recipe_of(target, targets, config).clip_skip for target in targets] == [1, 1]
    config = read_evaluate_settings([str(trained), str(tiny_pipeline), "--clip_skip", "2"])
    assert [recipe_of(target, targets, config).clip_skip for target in targets] == [2, 2]


def test_more_than_there_are_layers_is_refused(settings: dict[str, Any]) -> None:
    message = "--clip_skip 3 is more than the 2 layers of the model's text encoder that can be left out: use at most 2"
    with pytest.raises(RecipeError, match=message) as error:
        build(settings, clip_skip=3)
    assert "\n" not in str(error.value)


def test_of_sdxl_it_counts_from_the_penultimate_layer_as_stock_diffusers_does(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    base = build_tiny_xl_pipeline(tmp_path / "xl")
    settings["pretrained_model_name_or_path"] = str(base)
    run = build(
        settings, clip_skip=1, train_text_encoder=True, validation_prompts=PROMPTS, validation_inference_steps=3
    )
    assert "without the last 2 layers of each text encoder: draw with clip_skip=1 in diffusers, for" in describe(run)
    model, recipe = run.model, run.recipe
    stock = StableDiffusionXLPipeline.from_pretrained(base)
    stock.set_progress_bar_config(disable=True)
    stock.vae.enable_slicing()
    ids = model.family.tokenize((stock.tokenizer, stock.tokenizer_2), PROMPTS, CaptionConfig())
    pipeline = drawing_pipeline(model.family, model.components)
    with torch.no_grad():
        states = model.encode_text(ids)
        expected, _, pooled, _ = stock.encode_prompt(
            PROMPTS, device="cpu", do_classifier_free_guidance=False, clip_skip=1
        )
        ask = partial(model.family.prompt_arguments, model.components)
        drawn = draw_pictures(pipeline, ask, PROMPTS, recipe, (32, 32), range(2), 2)
    assert torch.equal(states["encoder_hidden_states"], expected)
    assert torch.equal(states["text_embeds"], pooled)
    assert recipe.seed is not None
    generators = [torch.Generator("cpu").manual_seed(recipe.seed + number) for number in range(2)]
    sizes = {"height": 32, "width": 32, "guidance_scale": recipe.validation_guidance_scale}
    pictures = stock(PROMPTS, generator=generators, clip_skip=1, num_inference_steps=3, **sizes).images
    assert_drawn_alike(drawn, pictures)
    trained = {name for name in run.state.parameters if name.startswith("text_encoder/encoder.layers")}
    num_layers = stock.text_encoder.config.num_hidden_layers
    assert {int(name.split(".")[2]) for name in trained} == set(range(num_layers - 2))
    with pytest.raises(RecipeError, match=f"--clip_skip {num_layers} is more than the {num_layers - 1} layers"):
        build(settings, clip_skip=num_layers, output_dir=str(tmp_path / "refused"))
