"""A pipeline that predicts scores: diffusers loads it and refuses to sample, and what is said of drawing is true."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from training_runs import build, forget_accelerator

from sd_recipes.commands.sample import sample
from sd_recipes.commands.sample_settings import read_settings
from sd_recipes.commands.train import run
from sd_recipes.errors import RecipeError
from sd_recipes.evaluation.pictures import drawing_pipeline
from sd_recipes.export.hub import write_model_card
from sd_recipes.model.samplers import drawing_sampler
from sd_recipes.model.stable_diffusion import StableDiffusion
from sd_recipes.recipe import Recipe

SCORE = {"prediction_type": "score", "max_train_steps": 2}
DRAWN = {"num_inference_steps": 3, "height": 32, "width": 32}


@pytest.fixture(autouse=True)
def _no_accelerator_is_left() -> Iterator[None]:
    yield
    forget_accelerator()


def train(settings: dict[str, Any], **changes: Any) -> Path:
    forget_accelerator()
    recipe = Recipe(**{**settings, **SCORE, **changes})
    run(recipe)
    return Path(recipe.output_dir)


def loaded(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiffusionPipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipeline("a disc", generator=generator, output_type="np", **DRAWN).images[0]


def test_what_is_exported_is_refused_by_diffusers_and_drawn_as_the_last_lines_say(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = train(settings, validation_prompts=["a disc"], validation_inference_steps=2, use_ema=True)
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "score"
    assert (folder / "samples.png").is_file()
    assert "trained to predict score from here on" in caplog.text

    pipeline = loaded(folder)
    with pytest.raises(ValueError, match="prediction_type given as score must be one of"):
        draw(pipeline)
    told = capsys.readouterr().out
    command = re.search(r"to draw +sd-recipes sample (.*)", told)
    assert command is not None
    drawn = folder / "drawn"
    sample(read_settings([*shlex.split(command[1]), "--steps", "2", "--device", "cpu", "--output_dir", str(drawn)]))
    assert (drawn / "00000-0.png").is_file()
    said = re.search(r"diffusers .*: pipeline\.scheduler = (\S+)\.(\w+)\(pipeline\.scheduler\)", told)
    assert said is not None
    assert said.groups() == (drawing_sampler.__module__, drawing_sampler.__name__)
    pipeline.scheduler = drawing_sampler(pipeline.scheduler)
    picture = draw(pipeline)
    assert np.isfinite(picture).all()
    assert picture.std() > 0


def test_the_cards_code_draws_with_diffusers_alone(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(settings)
    recipe = Recipe(**settings, validation_prompts=["a disc"])
    write_model_card(folder, str(folder), recipe, StableDiffusion(), "score")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        StableDiffusionPipeline, "__call__", lambda *args, call=StableDiffusionPipeline.__call__, **options: call(
            *args, **options, **DRAWN, generator=torch.Generator().manual_seed(0)
        ),
    )  # fmt: skip
    exec(code, {})
    monkeypatch.undo()
    pipeline = loaded(folder)
    pipeline.scheduler = drawing_sampler(pipeline.scheduler)
    expected = pipeline.numpy_to_pil(draw(pipeline)[None])[0]
    found = Image.open(folder / "image.png")
    assert abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int)).max() <= 1

    write_model_card(folder, str(folder), recipe, StableDiffusion(), "epsilon")
    assert "sigmas" not in (folder / "README.md").read_text()


def test_it_is_resumed_and_fine_tuned_without_a_word_and_turned_back_with_one(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = train(settings, checkpointing_steps=1)
    train(settings, max_train_steps=3)  # the same folder: it resumes
    caplog.clear()
    tuned = {"pretrained_model_name_or_path": str(folder), "output_dir": str(tmp_path / "tuned")}
    of_it = build(settings | tuned)
    assert of_it.model.objective.prediction_type == "score"
    assert "is trained to predict" not in caplog.text
    pipeline = drawing_pipeline(of_it.model.family, of_it.model.components)
    pipeline.set_progress_bar_config(disable=True)
    stock = loaded(folder)
    stock.scheduler = drawing_sampler(stock.scheduler)
    np.testing.assert_allclose(draw(pipeline), draw(stock), atol=1e-4)

    forget_accelerator()
    back = build(settings | tuned, prediction_type="epsilon")
    assert back.model.components.sampler.config.prediction_type == "epsilon"
    assert "The model predicts score and is trained to predict epsilon" in caplog.text
    forget_accelerator()
    with pytest.raises(RecipeError, match=r"--prediction_type is epsilon and was score"):
        train(settings, prediction_type="epsilon", max_train_steps=4)


def test_a_dry_run_shows_it(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    train(settings, dry_run=True, validation_prompts=["a disc"], validation_sampler="ddpm")
    said = capsys.readouterr().out
    assert re.search(r"predicts +score", said)
    assert "prediction_type: score" in said
    assert "validation_sampler: ddpm" in said
