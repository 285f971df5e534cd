"""What must never change, through the real build and the real loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build_image_folder, training_scheduler
from training_runs import assert_equal, average, build, fit_from, losses, train, weights

from sd_recipes.model.latents import encode_pixels
from sd_recipes.model.stable_diffusion import hidden_states
from sd_recipes.training.build_parts import UNET_WEIGHTS


def test_accumulation_is_one_big_batch(settings: dict[str, Any], tmp_path: Path) -> None:
    """4x1 = 2x2 = 1x4, over 6 rows: a whole global batch and a partial one in each epoch."""
    settings["train_data_dir"] = str(build_image_folder(tmp_path / "six", num_images=6))
    # SGD, as Adam's division by the gradient's own size would amplify rounding where it is near 0.
    settings |= {"optimizer": "sgd", "learning_rate": 1e-2}
    runs = [
        train(settings, train_batch_size=size, gradient_accumulation_steps=steps, output_dir=str(tmp_path / f"{size}"))
        for size, steps in ((4, 1), (2, 2), (1, 4))
    ]
    for other in runs[1:]:
        np.testing.assert_allclose(losses(runs[0]), losses(other), rtol=1e-5)
        for name, value in weights(runs[0]).items():
            torch.testing.assert_close(value, weights(other)[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "score"])
def test_the_loop_equals_a_float64_run_of_the_algorithm(settings: dict[str, Any], prediction_type: str) -> None:
    """Two SGD steps written out in float64 from the rows, with draws as the only thing shared."""
    settings |= {
        "optimizer": "sgd", "sgd_momentum": 0.0, "adam_weight_decay": 0.0, "learning_rate": 1e-2, "max_train_steps": 2,
        "max_grad_norm": 1e9, "train_batch_size": 2, "gradient_accumulation_steps": 3,
        "prediction_type": prediction_type,
    }  # fmt: skip
    training = train(settings)
    components = build(settings).model.components  # fresh weights
    scheduler = training_scheduler(Path(settings["pretrained_model_name_or_path"]))
    a = scheduler.alphas_cumprod.double()
    for module in (components.unet, components.vae, components.text_encoder):
        module.double()
    expected_losses = []
    windows = list(training.batches(0, 2))
    for window in windows:
        components.unet.zero_grad()
        window_losses = []
        for batch in window:
            moments = encode_pixels(components.vae, batch.pixels.double() / 127.5 - 1).double()
            mean, logvar = moments.chunk(2, dim=1)
            latents = (
                mean + (0.5 * logvar).exp() * batch.posterior_noise.double()
            ) * components.vae.config.scaling_factor
            states = hidden_states(components.text_encoder, batch.input_ids)
            t = a[batch.timesteps][:, None, None, None]
            noise = batch.noise.double()
            noisy = t.sqrt() * latents + (1 - t).sqrt() * noise
            velocity = t.sqrt() * noise - (1 - t).sqrt() * latents
            score = -noise / (1 - t).sqrt()
            target = {"epsilon": noise, "v_prediction": velocity, "sample": latents, "score": score}[prediction_type]
            prediction = components.unet(noisy, batch.timesteps, states).sample
            if prediction_type == "score":  # λ = σ_t²
                prediction, target = (1 - t).sqrt() * prediction, (1 - t).sqrt() * target
            window_losses += list((prediction - target).square().mean(dim=(1, 2, 3)))
        mean_loss = torch.stack(window_losses).mean()
        mean_loss.backward()
        expected_losses.append(mean_loss.item())
        with torch.no_grad():
            for parameter in components.unet.parameters():
                parameter -= 1e-2 * parameter.grad
    assert [[len(batch.timesteps) for batch in window] for window in windows] == [
        [2, 2, 2],
        [2],
    ]  # of 8 rows: 6, then 2
    np.testing.assert_allclose(losses(training), expected_losses, rtol=1e-5)
    for name, value in components.unet.state_dict().items():
        torch.testing.assert_close(weights(training)[name].double(), value, rtol=1e-4, atol=1e-6)


def test_one_seed_repeats_bit_for_bit_and_another_differs(settings: dict[str, Any]) -> None:
    one, again, other = (weights(train(settings, seed=seed, random_flip=True)) for seed in (5, 5, 6))
    assert_equal(one, again)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_loader_workers_change_nothing(settings: dict[str, Any], num_workers: int) -> None:
    assert_equal(weights(train(settings)), weights(train(settings, dataloader_num_workers=num_workers)))


def test_every_trainable_parameter_moves_and_no_frozen_one(settings: dict[str, Any]) -> None:
    training = build(settings)
    parts = {name: getattr(training.model.components, name) for name in ("unet", "vae", "text_encoder")}
    before = {name: {key: value.clone() for key, value in part.named_parameters()} for name, part in parts.items()}
    fit_from(training)
    moved = {
        name: {key for key, value in part.named_parameters() if not torch.equal(value, before[name][key])}
        for name, part in parts.items()
    }
    assert moved["unet"] == set(before["unet"])
    assert moved["vae"] == moved["text_encoder"] == set()
    in_optimizer = sum(len(group["params"]) for group in training.state.optimizer.param_groups)
    assert in_optimizer == len(before["unet"])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd", "adafactor"])
def test_resumed_is_uninterrupted_to_the_bit(settings: dict[str, Any], tmp_path: Path, optimizer: str) -> None:
    settings |= {
        "optimizer": optimizer, "use_ema": True, "lr_scheduler": "cosine", "max_train_steps": 7, "train_batch_size": 3,
        "checkpointing_steps": 4, "random_flip": True, "caption_dropout": 0.3, "noise_offset": 0.1,
    }  # fmt: skip
    uninterrupted = train(settings, output_dir=str(tmp_path / "uninterrupted"))
    # 8 rows in threes: step 4 stands in the middle of the second epoch.
    resumed = train(
        settings,
        output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(tmp_path / "uninterrupted/checkpoint-4"),
    )
    assert_equal(weights(uninterrupted), weights(resumed))
    assert_equal(average(uninterrupted).named_tensors(), average(resumed).named_tensors())
    assert uninterrupted.state.schedule.get_last_lr() == resumed.state.schedule.get_last_lr()
    assert losses(uninterrupted)[4:] == losses(resumed)


def test_resuming_a_finished_run_trains_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    finished = train(settings, checkpointing_steps=4, output_dir=str(tmp_path / "finished"))
    checkpoint = str(tmp_path / "finished" / "checkpoint-4")
    for max_train_steps in (4, 3):
        again = train(settings, resume_from_checkpoint=checkpoint, max_train_steps=max_train_steps)
        assert_equal(weights(finished), weights(again))


def test_ema_leaves_training_alone_and_is_the_average(settings: dict[str, Any]) -> None:
    plain, averaged = train(settings), train(settings, use_ema=True, ema_decay=0.5)
    assert_equal(weights(plain), weights(averaged))
    expected = {name: value.double() for name, value in weights(build(settings)).items()}
    for step in range(1, settings["max_train_steps"] + 1):
        decay = min(0.5, step / (9 + step)) if step > 1 else 0.0  # diffusers' rule
        now = weights(train(settings, max_train_steps=step))
        expected = {name: decay * expected[name] + (1 - decay) * now[name].double() for name in expected}
    for name, value in average(averaged).named_tensors().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [
    {"gradient_checkpointing": True}, {"channels_last": "never"}, {"use_ema": True, "offload_ema": True},
])  # fmt: skip
def test_what_only_places_the_model_leaves_the_loss_alone(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    plain = losses(train(settings))
    np.testing.assert_allclose(losses(train(settings, **changes)), plain, rtol=1e-4)


@pytest.mark.parametrize("changes", [
    {"prediction_type": "v_prediction", "snr_gamma": 5.0}, {"prediction_type": "sample"}, {"prediction_type": "score"},
    {"noise_offset": 0.1}, {"input_perturbation": 0.1}, {"dream_training": True}, {"mixed_precision": "bf16"},
    {"scale_lr": True},
])  # fmt: skip
def test_every_objective_trains_and_differs_from_the_plain_one(
    settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    changed = train(settings, **changes)
    assert np.isfinite(losses(changed)).all()
    assert losses(changed) != losses(train(settings))


@pytest.mark.slow
def test_it_can_learn(settings: dict[str, Any]) -> None:
    """8 pictures, a few hundred steps: the loss falls far below that of predicting nothing."""
    changes = {"max_train_steps": 300, "train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 50}
    curve = losses(train(settings, **changes))
    assert curve[0] > 0.8
    assert curve[-1] < 0.35 * curve[0]


def test_schedule_counts_optimizer_steps(settings: dict[str, Any]) -> None:
    training = train(
        settings, lr_scheduler="linear", max_train_steps=4, gradient_accumulation_steps=2, train_batch_size=2
    )
    lines = (Path(settings["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["lr"] for line in lines]
    np.testing.assert_allclose(rates, [7.5e-4, 5e-4, 2.5e-4, 0.0])
    assert training.state.schedule.last_epoch == 4


def test_from_scratch_starts_anew_and_trains_the_given_unet(
    settings: dict[str, Any], tiny_pipeline: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_pipeline / "unet" / "config.json").read_text())
    config["block_out_channels"] = [16, 32]
    (tmp_path / "unet.json").write_text(json.dumps(config))
    training = train(settings, train_from_scratch=True, unet_config=str(tmp_path / "unet.json"))
    assert training.model.components.unet.config.block_out_channels == [16, 32]
    same_shape = train(settings, train_from_scratch=True, max_train_steps=1, learning_rate=0.0)
    pretrained = load_file(tiny_pipeline / "unet" / UNET_WEIGHTS)
    assert not torch.equal(weights(same_shape)["conv_in.weight"], pretrained["conv_in.weight"])
