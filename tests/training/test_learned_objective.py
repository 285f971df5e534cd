"""What an objective learns: the uncertainty u(t), and the errors by which timesteps are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import finish, flags_of, start, torchrun
from PIL import Image
from safetensors.torch import load_file
from test_objective import SHAPE, TIMESTEPS, fake_unet, scheduler
from tiny_models import build_image_folder
from training_runs import assert_equal, assert_leaves_as_it_came, build, losses, train, weights

from sd_recipes.errors import RecipeError
from sd_recipes.export.pipeline import export_pipeline
from sd_recipes.recipe import ObjectiveConfig
from sd_recipes.runtime.trackers import read_metrics
from sd_recipes.training.build_parts import UNET_WEIGHTS
from sd_recipes.training.objective import DenoisingLoss
from sd_recipes.training.timestep_errors import TimestepErrors
from sd_recipes.training.uncertainty import LEARNING_RATE, Uncertainty


def test_learned_uncertainty_divides_the_loss_and_is_least_at_its_logarithm() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    plain = DenoisingLoss(scheduler(), ObjectiveConfig(), torch.device("cpu"))
    uncertainty = Uncertainty(plain.schedule)
    loss = DenoisingLoss(scheduler(), ObjectiveConfig(), torch.device("cpu"), uncertainty)
    arguments = (fake_unet, latents, {"encoder_hidden_states": torch.ones(1)}, TIMESTEPS, noise)
    torch.testing.assert_close(loss(*arguments), plain(*arguments), rtol=0, atol=0)  # u begins at 0
    with torch.no_grad():
        uncertainty.weight += torch.linspace(-1, 1, len(uncertainty.weight))
    u = uncertainty.by_timestep(uncertainty.weight.detach())[TIMESTEPS]
    assert u.std() > 0.1
    torch.testing.assert_close(loss(*arguments), plain(*arguments) * torch.exp(-u) + u)

    # Losses that depend on the timestep, with an exponential distribution around their mean.
    mean_loss = 0.02 + 0.9 * torch.exp(-torch.arange(1000) / 150)
    optimizer = torch.optim.AdamW(uncertainty.parameters(), lr=LEARNING_RATE)
    for _ in range(1500):
        timesteps = torch.randint(1000, (16,), generator=generator)
        drawn = mean_loss[timesteps] * torch.empty(16).exponential_(generator=generator)
        u = uncertainty(timesteps)
        (drawn * torch.exp(-u) + u).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = uncertainty.by_timestep(uncertainty.weight.detach())
    assert (found - mean_loss.log()).abs().mean() < 0.1, "of a range of log(50) = 3.9"


def test_learned_uncertainty_belongs_to_the_run_and_not_to_the_pipeline(
    settings: dict[str, Any], tmp_path: Path, tiny_pipeline: Path
) -> None:
    both = settings | {"learned_uncertainty": True, "use_ema": True}
    whole = train(both)
    part = whole.state.parts["uncertainty"]
    assert part.module.weight.abs().max() > 0
    assert part.average is not None
    folder = tmp_path / "resumed"
    train(both, output_dir=str(folder), max_train_steps=2)
    (folder / "uncertainty.png").unlink()  # as it was at step 2
    resumed = train(both, output_dir=str(folder), resume_from_checkpoint="latest")
    assert_equal(weights(whole), weights(resumed))
    assert torch.equal(part.module.weight, resumed.state.parts["uncertainty"].module.weight)
    assert_equal(part.average.named_tensors(), resumed.state.parts["uncertainty"].average.named_tensors())
    picture = Image.open(folder / "uncertainty.png")
    assert np.asarray(picture.convert("L")).std() > 1

    with whole.state.evaluated(whole.model.components):
        export_pipeline(whole.model.family, whole.model.components, tmp_path / "pipeline")
    assert not list((tmp_path / "pipeline").rglob("*uncertainty*"))
    assert_leaves_as_it_came(tmp_path / "pipeline", tiny_pipeline)

    with pytest.raises(RecipeError, match="--learned_uncertainty is False and was True"):
        build(settings, output_dir=str(folder), resume_from_checkpoint="latest")


def test_learned_uncertainty_is_no_part_of_the_held_out_loss(settings: dict[str, Any], tmp_path: Path) -> None:
    """Before the first step, where the UNet is the same, whatever u has become."""
    found = []
    for learned in (False, True):
        run = build(
            settings, output_dir=str(tmp_path / f"{learned}"), validation_split="train", learned_uncertainty=learned
        )
        if learned:
            torch.nn.init.ones_(run.state.parts["uncertainty"].module.weight)
        run.validator(run.state, run.tracker)
        found.append(read_metrics(run.tracker.path)[0]["validation_loss"])
    assert found[0] == found[1]


def errors_with(mean_losses: list[float], **settings: Any) -> TimestepErrors:
    """As they are after a step with these losses in ten bins."""
    errors = TimestepErrors(1000, ObjectiveConfig(**settings), torch.device("cpu"))
    errors.add(errors.edges[:-1], torch.tensor(mean_losses), torch.ones(10))
    errors.step(lambda tensor: tensor)
    return errors


def test_timesteps_by_error_come_in_proportion_and_their_weights_undo_it() -> None:
    mean_losses = [9.0, 5.0, 3.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.0]
    errors = errors_with(mean_losses)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    timesteps = errors.timesteps(u)
    assert (timesteps.diff() >= 0).all(), "strata stay strata"
    shares = torch.bincount(timesteps // 100, minlength=10) / len(u)
    expected = 0.01 + 0.9 * torch.tensor(mean_losses) / sum(mean_losses)
    torch.testing.assert_close(shares, expected, atol=1e-4, rtol=0)
    within = torch.bincount(timesteps[timesteps < 100])
    assert within.max() - within.min() <= 1, "uniform within a bin"
    # Any function of the timestep: its weighted mean over the draws is its mean over all timesteps.
    function = torch.sin(torch.arange(1000) / 70.0).double() + 2
    weighted = (errors.weights(timesteps).double() * function[timesteps]).mean()
    assert weighted.item() == pytest.approx(function.mean().item(), rel=1e-4)
    assert errors.weights(timesteps).max() <= 10


def test_timesteps_by_error_are_uniform_until_all_bins_were_met_and_within_the_range() -> None:
    errors = TimestepErrors(1000, ObjectiveConfig(min_timestep=995), torch.device("cpu"))
    u = torch.tensor([0.0, 0.19, 0.2, 0.5, 0.99999], dtype=torch.float64)
    errors.add(torch.tensor([995, 996, 997]), torch.tensor([100.0, 1.0, 1.0]), torch.ones(3))
    errors.step(lambda tensor: tensor)
    assert errors.timesteps(u).tolist() == [995, 995, 996, 997, 999]
    assert errors.weights(errors.timesteps(u)).tolist() == [1.0] * 5
    # Rows that do not count, and losses that are not finite, are no error of any bin.
    errors.add(torch.tensor([998, 999]), torch.tensor([1.0, torch.nan]), torch.tensor([0.0, 1.0]))
    errors.step(lambda tensor: tensor)
    assert errors.weights(errors.timesteps(u)).tolist() == [1.0] * 5
    errors.add(torch.tensor([998, 999]), torch.tensor([1.0, 1.0]), torch.ones(2))
    errors.step(lambda tensor: tensor)
    assert errors.timesteps(u).tolist()[:4] == [995] * 4


def test_timesteps_by_error_resume_to_the_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    by_error = settings | {"timesteps_by_error": True, "max_train_steps": 6, "train_batch_size": 8}
    whole = train(by_error)
    assert whole.state.timestep_errors is not None
    assert whole.state.timestep_errors.probabilities.std() > 0.005
    folder = str(tmp_path / "resumed")
    train(by_error, output_dir=folder, max_train_steps=3)
    resumed = train(by_error, output_dir=folder, resume_from_checkpoint="latest")
    assert_equal(weights(whole), weights(resumed))
    assert_equal(whole.state.timestep_errors.state_dict(), resumed.state.timestep_errors.state_dict())
    uniform = train(by_error, output_dir=str(tmp_path / "uniform"), timesteps_by_error=False)
    assert losses(uniform)[0] == losses(whole)[0], "there is no error yet"
    assert losses(uniform)[-1] != losses(whole)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("option", ["timesteps_by_error", "learned_uncertainty"])
def test_what_an_objective_learns_is_the_same_on_two_processes(
    settings: dict[str, Any], tmp_path: Path, option: str
) -> None:
    """As on one: seven rows in global batches of four, so that one process may have fewer samples than the other.

    Class pictures, from which it is not learned, come last in every step.
    """
    sgd = {"optimizer": "sgd", "learning_rate": 0.01, "max_train_samples": 7, "max_train_steps": 6, option: True}
    sgd |= {"class_data_dir": str(build_image_folder(tmp_path / "class", 5)), "class_prompt": "a disc"}
    one = train(settings | sgd)
    folder = tmp_path / "two"
    finish(start(torchrun(2), *flags_of(settings | sgd | {"train_batch_size": 2, "output_dir": folder})))
    found = load_file(folder / "checkpoint-6" / "unet" / UNET_WEIGHTS)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, found[name], rtol=1e-4, atol=1e-6, msg=name)
    for file, expected in one.state.state_dict().tensors.items():
        if file.startswith(("uncertainty", "timestep_errors")):
            torch.testing.assert_close(load_file(folder / "checkpoint-6" / file), expected, rtol=1e-4, atol=1e-6)
