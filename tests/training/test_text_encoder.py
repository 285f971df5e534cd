"""The text encoder as a trained part: it learns, is saved, averaged, frozen when it is due, resumed and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from launching import finish, flags_of, start, torchrun
from outside import draw, draw_as_validation, exported, loss_of_pictures
from safetensors.torch import load_file
from tiny_models import UNET_CONFIG, build_tiny_pipeline
from training_runs import Run, assert_equal, build, losses, train

from sd_recipes.errors import RecipeError
from sd_recipes.flags import load_recipe
from sd_recipes.training.build_parts import WEIGHTS
from sd_recipes.training.loop import backward

TEXT: dict[str, Any] = {"train_text_encoder": True, "use_ema": True}


def text_weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in run.state.parts["text_encoder"].module.state_dict().items()}


def averaged(run: Run, part: str = "text_encoder") -> dict[str, torch.Tensor]:
    average = run.state.parts[part].average
    assert average is not None
    return {name: each.clone() for name, each in average.named_tensors().items()}


def test_eight_pictures_are_learned_and_stock_diffusers_has_and_draws_what_was_learned(
    settings: dict[str, Any], tiny_pipeline: Path, image_folder: Path
) -> None:
    base = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    run = train(settings, **TEXT, max_train_steps=35, train_batch_size=8, learning_rate=3e-3, cache_latents="memory",
                center_crop=True)  # fmt: skip
    pipeline = exported(run, tiny_pipeline)
    assert loss_of_pictures(pipeline, image_folder, tiny_pipeline) < 0.5 * loss_of_pictures(
        base, image_folder, tiny_pipeline
    )
    assert_equal(dict(pipeline.text_encoder.state_dict()), averaged(run))
    embedding = "embeddings.token_embedding.weight"
    assert not torch.equal(text_weights(run)[embedding], base.text_encoder.state_dict()[embedding])
    np.testing.assert_allclose(draw(pipeline), draw_as_validation(run), atol=1e-3)  # a quarter of a gray level


def test_it_has_gradients_of_its_own_and_its_own_learning_rate(settings: dict[str, Any]) -> None:
    run = build(settings, train_text_encoder=True, text_encoder_learning_rate=1e-5, scale_lr=True)
    assert [group["lr"] for group in run.state.optimizer.param_groups] == [4e-3, 4e-5]
    backward(next(run.batches(0, 1)), run.model, None, run.accelerator)
    gradients = {name: each.grad for name, each in run.state.parameters.items() if name.startswith("text_encoder/")}
    assert gradients
    # The embeddings of words that no caption has get none.
    assert [name for name, each in gradients.items() if each is None or not each.any()] == []


@pytest.mark.parametrize("changes", [
    {"checkpointing_steps": 3}, pytest.param({"checkpointing_steps": 4}, marks=pytest.mark.slow),
    {"checkpointing_steps": 2, "mixed_precision": "bf16", "gradient_checkpointing": True, "optimizer": "sgd"},
], ids=str)  # fmt: skip
def test_it_is_frozen_after_its_steps_and_a_run_resumes_across_that_to_the_bit(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Checkpoints before, at and after the boundary, which is 3."""
    settings |= {**TEXT, "text_encoder_steps": 3, "gradient_accumulation_steps": 2, "train_batch_size": 2,
                 "max_train_steps": 5, **changes}  # fmt: skip
    whole = train(settings, output_dir=str(tmp_path / "whole"))
    checkpoint = tmp_path / "whole" / f"checkpoint-{changes['checkpointing_steps']}"
    resumed = train(settings, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(checkpoint))
    first, second = (run.state.state_dict() for run in (whole, resumed))
    assert first.values == second.values
    for file, named in first.tensors.items():
        assert_equal(named, second.tensors[file])
    frozen = train(settings, output_dir=str(tmp_path / "three"), max_train_steps=3)
    assert_equal(text_weights(whole), text_weights(frozen))
    # Its average goes on, towards what the UNet is trained with.
    before, after, goal = averaged(frozen), averaged(whole), text_weights(whole)
    distances = [sum(float((each[name] - goal[name]).abs().sum()) for name in goal) for each in (before, after)]
    assert 0 < distances[1] < distances[0]


def test_under_autocast_its_weights_are_float32_and_the_vae_leaves_as_it_came(
    settings: dict[str, Any], tiny_pipeline: Path
) -> None:
    run = train(settings, train_text_encoder=True, mixed_precision="bf16")
    components = run.model.components
    assert {each.dtype for each in components.text_encoder.parameters()} == {torch.float32}
    assert {each.dtype for each in components.vae.parameters()} == {torch.bfloat16}
    pipeline, base = exported(run, tiny_pipeline), StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    assert_equal(dict(pipeline.vae.state_dict()), dict(base.vae.state_dict()))
    assert_equal(dict(pipeline.text_encoder.state_dict()), text_weights(run))


def test_gradient_checkpointing_leaves_the_loss_alone(settings: dict[str, Any]) -> None:
    plain = losses(train(settings, train_text_encoder=True))
    settings["output_dir"] += "-checkpointed"
    np.testing.assert_allclose(
        losses(train(settings, train_text_encoder=True, gradient_checkpointing=True)), plain, rtol=1e-5
    )


def test_the_best_weights_take_its_place_and_leave_it_as_it_was(settings: dict[str, Any]) -> None:
    run = build(settings, train_text_encoder=True)
    before = text_weights(run)
    others = {name: each + 1 for name, each in before.items()}
    with run.state.replaced(run.model.components, {"text_encoder": others}):
        assert_equal(dict(run.model.components.text_encoder.state_dict()), others)
    assert_equal(text_weights(run), before)
    with (
        pytest.raises(RuntimeError, match="state_dict of text_encoder"),
        run.state.replaced(run.model.components, {"text_encoder": {"other": torch.zeros(1)}}),
    ):
        pass


def test_a_run_resumes_to_the_bit_where_the_models_themselves_have_dropout(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    base = build_tiny_pipeline(tmp_path / "dropping", unet_config={**UNET_CONFIG, "dropout": 0.2})
    config = base / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.1}))
    settings |= {"pretrained_model_name_or_path": str(base), "train_text_encoder": True, "checkpointing_steps": 2}
    whole = train(settings, output_dir=str(tmp_path / "whole"))
    torch.manual_seed(99)
    resumed = train(settings, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(text_weights(whole), text_weights(resumed))
    assert losses(whole)[2:] == losses(resumed)
    assert build(settings, seed=6, output_dir=str(tmp_path / "other")).model.dropout_seed == 6


@pytest.mark.parametrize(("flags", "message"), [
    (["--text_encoder_steps", "5"], "--text_encoder_steps 5 is of a text encoder that is trained, .* --train_text_enc"),
    (["--text_encoder_learning_rate", "1e-6", "--lora_rank", "4"], "add --lora_text_encoder, or drop --text_encoder_l"),
    (["--train_text_encoder", "--cache_text"], "--cache_text keeps what the text encoder says .* drop it"),
    (["--train_text_encoder", "--lora_rank", "4"], "--train_text_encoder trains the whole .* use --lora_text_encoder"),
    (["--train_text_encoder", "--text_encoder_steps", "0"], "--text_encoder_steps: .* greater than or equal to 1"),
])  # fmt: skip
def test_what_contradicts_it_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", *flags])


def test_a_run_that_trained_it_does_not_go_on_without(settings: dict[str, Any]) -> None:
    train(settings, train_text_encoder=True, checkpointing_steps=2)
    with pytest.raises(RecipeError, match=r"this run trains unet, and .* is of one that trains unet, text_encoder"):
        train(settings, resume_from_checkpoint="latest", max_train_steps=6)


@pytest.mark.slow
def test_two_processes_train_it_as_one_does(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {**TEXT, "optimizer": "sgd", "learning_rate": 1e-2, "text_encoder_steps": 3, "train_batch_size": 4}
    one = train(settings, output_dir=str(tmp_path / "one"))
    two = tmp_path / "two"
    finish(start(torchrun(2), *flags_of(settings | {"train_batch_size": 2, "output_dir": two})))
    saved = load_file(two / "checkpoint-4" / "text_encoder" / WEIGHTS)
    for name, value in text_weights(one).items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6, msg=name)
