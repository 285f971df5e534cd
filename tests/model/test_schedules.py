"""Zero terminal SNR, and a model that gets another prediction type: training, export and sampling agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from training_runs import build, train

from sd_recipes.errors import RecipeError
from sd_recipes.export.pipeline import export_pipeline

CLIPS = {DDIMScheduler: {"clip_sample": False}, DDPMScheduler: {"clip_sample": False}}  # where there is a clip


@pytest.mark.parametrize(
    "sampler", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler]
)
def test_zero_terminal_snr_is_trained_exported_and_sampled(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, sampler: type
) -> None:
    model = shutil.copytree(settings["pretrained_model_name_or_path"], tmp_path / "model")
    config = DDIMScheduler.load_config(model, subfolder="scheduler")
    del config["clip_sample"]  # as PNDM has none
    sampler.from_config(config, **CLIPS.get(sampler, {})).save_pretrained(model / "scheduler")
    zero = {"pretrained_model_name_or_path": str(model), "rescale_betas_zero_snr": True, "max_train_steps": 1}
    run = train(settings | zero, prediction_type="v_prediction")
    assert ("PNDM cannot sample from pure noise" in caplog.text) == (sampler is PNDMScheduler)
    words = "The model predicts epsilon and is trained to predict v_prediction from here on"
    assert words in caplog.text

    schedule = run.model.objective.schedule
    assert (schedule.signal[-1], schedule.sigma[-1], schedule.snr[-1]) == (0, 1, 0)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    trained = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    # Algorithm 1 in float64, and diffusers' own function.
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    np.testing.assert_allclose(schedule.signal.numpy(), root, rtol=2e-4, atol=1e-6)
    by_diffusers = torch.cumprod(1 - rescale_zero_terminal_snr(trained.betas), 0)
    torch.testing.assert_close(run.model.components.scheduler.alphas_cumprod, by_diffusers, rtol=0, atol=0)

    export_pipeline(run.model.family, run.model.components, tmp_path / "pipeline")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    config = pipeline.scheduler.config
    assert (config.rescale_betas_zero_snr, config.timestep_spacing) == (True, "trailing")
    assert config.prediction_type == "v_prediction"
    assert not config.get("clip_sample", False)
    assert isinstance(pipeline.scheduler, DDIMScheduler if sampler is PNDMScheduler else sampler)
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps[0] == 999
    assert pipeline.scheduler.alphas_cumprod[-1] < 1e-6
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline("a", num_inference_steps=4, height=32, width=32, output_type="np").images
    assert np.isfinite(pictures).all()
    assert pictures.std() > 0


def test_zero_terminal_snr_is_refused_with_epsilon_and_told_where_weights_leave_the_last_timestep_out(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RecipeError, match="this model's epsilon tells nothing: add --prediction_type v_prediction"):
        build(settings, rescale_betas_zero_snr=True)
    model = tmp_path / "model"
    shutil.copytree(settings["pretrained_model_name_or_path"], model)
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    with pytest.raises(RecipeError, match=r"rescale_betas_zero_snr in its scheduler_config\.json"):
        build(settings, pretrained_model_name_or_path=str(model))
    build(settings, rescale_betas_zero_snr=True, prediction_type="v_prediction", snr_gamma=5.0, max_timestep=900)
    assert "--snr_gamma gives weight 0 to the last timestep of --rescale_betas_zero_snr" in caplog.text
    assert "--max_timestep may leave out the last timestep" in caplog.text


def test_defect_a_prediction_that_the_models_file_does_not_name_outlives_a_new_schedule(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Stable Diffusion 1's file does not say what the model predicts, and diffusers then takes its classes' default."""
    model = shutil.copytree(settings["pretrained_model_name_or_path"], tmp_path / "model")
    path = model / "scheduler" / "scheduler_config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != "prediction_type"}
    path.write_text(json.dumps(config | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}))
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    run = build(settings, pretrained_model_name_or_path=str(model), **changes)
    components = run.model.components
    assert {each.config.prediction_type for each in (components.scheduler, components.sampler)} == {"v_prediction"}


@pytest.mark.parametrize("prediction_type", ["epsilon", "score"])
def test_what_says_nothing_of_pure_noise_is_refused_with_it(
    settings: dict[str, Any], tmp_path: Path, prediction_type: str
) -> None:
    words = f"pure noise, of which {prediction_type} tells nothing: use --prediction_type v_prediction, or drop it"
    with pytest.raises(ValueError, match=words):
        build(settings, rescale_betas_zero_snr=True, prediction_type=prediction_type)
    model = shutil.copytree(settings["pretrained_model_name_or_path"], tmp_path / "model")
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": prediction_type}))
    words = f"of which this model's {prediction_type} tells nothing: add --prediction_type v_prediction"
    with pytest.raises(RecipeError, match=words):
        build(settings, pretrained_model_name_or_path=str(model), rescale_betas_zero_snr=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    with pytest.raises(RecipeError, match=rf"scheduler_config\.json\), of which {prediction_type} tells nothing"):
        build(settings, pretrained_model_name_or_path=str(model))


def test_a_score_without_noise_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    model = shutil.copytree(settings["pretrained_model_name_or_path"], tmp_path / "model")
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_start": 0.0}))
    with pytest.raises(RecipeError, match=r"adds no noise at the first timestep .*: use --prediction_type epsilon"):
        build(settings, pretrained_model_name_or_path=str(model), prediction_type="score")
    build(settings, pretrained_model_name_or_path=str(model))


def test_another_prediction_is_told_once_and_not_of_a_unet_that_has_learned_nothing(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    v = settings | {"prediction_type": "v_prediction", "max_train_steps": 1}
    train(v)
    assert "The exported scheduler says v_prediction" in caplog.text
    caplog.clear()
    run = build(v, resume_from_checkpoint="latest")
    assert run.model.components.sampler.config.prediction_type == "v_prediction"
    build(settings, prediction_type="epsilon")
    build(settings, prediction_type="v_prediction", train_from_scratch=True)
    assert "is trained to predict" not in caplog.text
