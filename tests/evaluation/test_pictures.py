"""Pictures of prompts: fixed noise with every sampler, whatever else is drawn, and scores drawn as the ε they mean."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image
from training_runs import build, train

from sd_recipes.errors import RecipeError
from sd_recipes.evaluation.pictures import draw_pictures, drawing_pipeline
from sd_recipes.flags import load_recipe
from sd_recipes.recipe import SAMPLERS_BY_NAME
from sd_recipes.training.run import Run

PROMPTS = ["a disc", "a red disc", "disc number 3"]
DRAWN = {"validation_prompts": PROMPTS, "validation_inference_steps": 3, "validation_steps": 4}


@pytest.fixture
def drawing(settings: dict[str, Any]) -> Run:
    return build(settings, **DRAWN)


def draw(run: Run, sampler: str | None, numbers: list[int], at_once: int, **changes: Any) -> np.ndarray:
    pipeline = drawing_pipeline(run.model.family, run.model.components, sampler)
    recipe = run.recipe.model_copy(update=changes)
    ask = partial(run.model.family.prompt_arguments, run.model.components)
    pictures = draw_pictures(pipeline, ask, PROMPTS, recipe, (32, 32), numbers, at_once)
    return np.stack([np.asarray(picture).astype(int) for picture in pictures])


@pytest.mark.parametrize("sampler", [None, *SAMPLERS_BY_NAME])
def test_a_picture_does_not_depend_on_what_else_is_drawn_nor_on_other_generators(
    drawing: Run, sampler: str | None
) -> None:
    together = draw(drawing, sampler, [0, 1, 2], at_once=3)
    torch.manual_seed(99)
    alone = draw(drawing, sampler, [2], at_once=1)
    assert abs(together[2] - alone[0]).max() <= 1  # in other batches sums are rounded otherwise
    assert together.std() > 5
    other_seed = draw(drawing, sampler, [2], at_once=1, seed=6)
    assert abs(other_seed - alone).max() > 5


def test_samplers_draw_different_pictures_of_the_same_noise(drawing: Run) -> None:
    """Each name is another sampler, and noise that one adds at every step is not the first step's again."""
    pictures = {name: draw(drawing, name, [0], at_once=1) for name in SAMPLERS_BY_NAME}
    alike = [
        (one, other)
        for one in pictures
        for other in pictures
        if one < other and np.array_equal(pictures[one], pictures[other])
    ]
    assert set(alike) <= {("ddpm", "euler_a")}, "these two are one sampler, up to rounding"


@pytest.mark.parametrize("sampler", [None, "euler", "dpmsolver++", "euler_a"])
def test_a_score_is_drawn_as_the_same_network_of_noise_would_be(settings: dict[str, Any], sampler: str | None) -> None:
    """With guidance, through the pipeline: a UNet that gives -ε / σ_t for the ε of another."""
    of_noise = build(settings, **DRAWN)
    expected = draw(of_noise, sampler, [0, 1], at_once=2)
    of_scores = build(settings, **DRAWN, prediction_type="score")
    components = of_scores.model.components
    assert components.sampler.config.prediction_type == "score"
    components.unet.load_state_dict(of_noise.model.components.unet.state_dict())
    ratios = ((1 - components.scheduler.alphas_cumprod) / components.scheduler.alphas_cumprod).sqrt().numpy()

    def divide(unet: Any, inputs: tuple, outputs: tuple) -> tuple:
        ratio = np.interp(float(inputs[1]), np.arange(1000), ratios)
        return (-outputs[0] / (ratio / (1 + ratio**2) ** 0.5),)

    components.unet.register_forward_hook(divide)
    found = draw(of_scores, sampler, [0, 1], at_once=2)
    assert abs(found - expected).max() <= 1


def test_validations_use_the_sampler_and_the_export_keeps_its_own(settings: dict[str, Any]) -> None:
    grids = []
    for sampler in (None, "ddim", "EulerAncestralDiscreteScheduler"):
        changes = {"validation_sampler": sampler, "output_dir": f"{settings['output_dir']}-{sampler}"}
        run = train(settings, **DRAWN, **changes)
        assert type(run.model.components.sampler).__name__ == "DDIMScheduler"
        grids.append(np.asarray(Image.open(Path(run.recipe.output_dir) / "samples" / "step-000004.png")))
    assert np.array_equal(grids[0], grids[1]), "DDIM is its own"
    assert not np.array_equal(grids[0], grids[2])


def test_the_pipelines_own_sampler_is_not_changed_by_drawing(drawing: Run) -> None:
    pipeline = drawing_pipeline(drawing.model.family, drawing.model.components, "euler_a")
    assert isinstance(pipeline.scheduler, EulerAncestralDiscreteScheduler)
    assert type(drawing.model.family.build_pipeline(drawing.model.components).scheduler).__name__ == "DDIMScheduler"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dimm", r".* \(nearest: ddim\): give one of ddim, ddpm, .*, or diffusers' class of one \(it is 'dimm'\)$"),
        ("DPM++ 2M Karras", r".* \(nearest: dpm\+\+_2m\)"),
        ("EulerDiscretScheduler", r".* \(nearest: eulerdiscretescheduler\)"),
        ("LCMScheduler", r".* \(it is 'LCMScheduler'\)$"),
        ("FlowMatchEulerDiscreteScheduler", "there is no such sampler for Stable Diffusion's noise schedule"),
        ("EDMEulerScheduler", "there is no such sampler"),
        ("", "there is no such sampler for Stable Diffusion's noise schedule: give one of"),
    ],
)
def test_a_sampler_that_does_not_fit_is_one_line_before_anything_is_loaded(name: str, words: str) -> None:
    flags = ["--pretrained_model_name_or_path", "no/such", "--train_data_dir", str(ROOT / "none")]
    with pytest.raises(RecipeError, match=f"^--validation_sampler: {words}") as error:
        load_recipe([*flags, "--validation_sampler", name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"validation_sampler": "euler_a", "prediction_type": "sample"},
            "--validation_sampler euler_a: EulerAncestralDiscreteScheduler cannot draw from predictions of sample",
        ),
        (
            {"validation_sampler": "heun", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            "--validation_sampler heun: HeunDiscreteScheduler cannot begin with pure noise",
        ),
        (
            {"validation_inference_steps": 1000},
            "the model's scheduler: DDIMScheduler cannot draw from predictions of epsilon in 1000 steps",
        ),
        (
            {"validation_sampler": "euler", "validation_inference_steps": 1001},
            "--validation_inference_steps 1001 is over the model's 1000 timesteps: lower it",
        ),
    ],
)
def test_what_a_sampler_cannot_draw_is_one_line_before_the_first_step(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    if "validation_sampler" in changes:  # which needs neither data nor weights
        monkeypatch.setattr("sd_recipes.training.build.load_training_data", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(RecipeError, match=f"^{words}") as error:
        build(settings, **{**DRAWN, **changes})
    assert "\n" not in str(error.value)
