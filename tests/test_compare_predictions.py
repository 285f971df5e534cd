"""The arithmetic of benchmarks/compare_predictions.py, against independent computations."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import DDPMScheduler

from sd_recipes.evaluation.diffusion_process import DiffusionProcess
from sd_recipes.evaluation.sample_errors import SCHEMA
from sd_recipes.recipe import Recipe
from sd_recipes.training.objective import ERROR_SCALES, TARGETS, NoiseSchedule

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "compare_predictions.py"
SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def errors(rows: list[int], timesteps: list[int], losses: list[float], which: str = "held_out") -> pa.Table:
    columns = ([which] * len(rows), ["raw"] * len(rows), rows, timesteps, losses)
    return pa.table(dict(zip(SCHEMA.names, columns, strict=True)), SCHEMA)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "score"])
def test_losses_of_all_types_become_errors_of_the_latents(script: ModuleType, prediction_type: str) -> None:
    """A network that knows x̂_0 predicts by it what it is asked for; from its loss comes x̂_0's error again."""
    timesteps = torch.tensor([0, 300, 999])
    schedule = NoiseSchedule(SCHEDULER, torch.device("cpu"))
    draws = np.random.default_rng(0)
    latents, guess, noise = (torch.from_numpy(draws.normal(size=(3, 4, 8, 8))).float() for _ in range(3))
    signal = SCHEDULER.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
    sigma = (1 - signal**2).sqrt()
    implied_noise = (signal * latents + sigma * noise - signal * guess) / sigma
    wanted = TARGETS[prediction_type](schedule, latents, noise, timesteps)
    predicted = TARGETS[prediction_type](schedule, guess, implied_noise, timesteps)
    scale = ERROR_SCALES[prediction_type](schedule)[timesteps][:, None, None, None]
    losses = (scale * (predicted - wanted)).square().flatten(1).mean(dim=1).tolist()
    table = pa.concat_tables([
        errors([0, 1, 2], timesteps.tolist(), losses), errors([7], [500], [1e9], which="train"),
    ])  # fmt: skip
    found = script.errors_of_latents(table, prediction_type, DiffusionProcess(SCHEDULER))
    assert found["row"].to_pylist() == [0, 1, 2], "of held-out rows only"
    expected = (guess - latents).square().flatten(1).mean(dim=1).numpy()
    assert found["loss"].to_numpy() == pytest.approx(expected, rel=1e-3)


def test_shares_of_rows_add_up_to_the_means_of_bins(script: ModuleType) -> None:
    rows, timesteps = [4, 9, *[4] * 9], [99, 0, *range(100, 1000, 100)]
    shares = script.by_row_and_bin(errors(rows, timesteps, [1.0, 3.0, *range(9)]), 1000)
    assert shares.shape == (2, 10)
    assert shares[:, 0].tolist() == [0.5, 1.5], "each row's part of (1 + 3) / 2"
    assert shares.sum(axis=0) == pytest.approx([2, *range(9)])


def test_the_best_type_and_the_error_of_its_lead(script: ModuleType) -> None:
    draws = np.random.default_rng(0)
    best, other = draws.normal(1, 0.1, 50) / 50, draws.normal(1.5, 0.3, 50) / 50
    found = script.best_and_next({"sample": other, "score": np.full(50, 9.0), "epsilon": best})
    resampled = draws.integers(0, 50, (20000, 50))
    differences = (other - best)[resampled].sum(axis=1)
    assert found[:2] == ("epsilon", "sample")
    assert found[2] == pytest.approx(other.sum() - best.sum())
    assert found[3] == pytest.approx(differences.std(), rel=0.03), "as other rows would have it"


def test_the_linear_guess_is_the_best_one(script: ModuleType) -> None:
    """Against least squares on drawn latents, at the middle of the first and of the last bin."""
    few = DDPMScheduler(num_train_timesteps=10, beta_start=0.05, beta_end=0.5)
    found = script.linear_errors(DiffusionProcess(few), 4.0)
    draws = np.random.default_rng(0)
    latents, noise = 2 * draws.normal(size=100_000), draws.normal(size=100_000)
    for number in range(10):
        alpha = float(few.alphas_cumprod[number])
        noisy = alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise
        guess = noisy * (noisy @ latents) / (noisy @ noisy)
        assert found[number] == pytest.approx(np.square(latents - guess).mean(), rel=0.02)


def test_tables_have_a_line_for_each(script: ModuleType) -> None:
    shares = np.full((3, 10), 0.1)
    by_type = {"epsilon": [shares, shares], "v_prediction": [0.5 * shares, 0.7 * shares]}
    head, _, *bins = script.error_table(by_type, DiffusionProcess(SCHEDULER), 1.0)
    assert head.split(" | ")[2:4] == ["ε", "v"]
    assert len(bins) == 10
    assert "0.3 0.3 | 0.15 0.21" in bins[0]
    assert bins[9].startswith("| 900 … 999 |")
    assert bins[9].endswith("v, 40.0 ± 0.0 % below ε |"), "0.18 of 0.3: means over the seeds"

    at_the_end = [errors([0, 1], [999, 999], [0.25, 0.75])]
    alpha = float(SCHEDULER.alphas_cumprod[999])
    ratio = alpha / (1 - alpha)
    line = list(script.loss_table({"sample": at_the_end}, DiffusionProcess(SCHEDULER)))[2]
    assert line == f"| x₀ | {0.5 * ratio:.3f} | {0.5 * (ratio + 1):.3f} | 0.500 |"

    bound = {"prior": 0.25, "denoising": 1.5, "reconstruction": -0.5}
    lines = list(script.bound_table({"a": {**bound, "images": [1, 3]}, "b": {**bound, "images": [2, 4]}}, "a"))
    assert lines[2:] == [
        "| a | 2.000 ± 1.000 | 0.250 | 1.500 | -0.500 |  |",
        "| b | 3.000 ± 1.000 | 0.250 | 1.500 | -0.500 | 1.000 ± 0.000 |",
    ]

    target = {"scores": {"cmmd": {"value": 1.234, "low": 1, "high": 2}}, "figures": {"image_text_score": 31.46}}
    line = list(script.score_table({"x₀, seed 0": target}))[2]
    assert line == "| x₀, seed 0 | - | - | 1.23 (1 … 2) | - | - | - | 31.5 |"


def test_runs_differ_by_type_and_seed_only(script: ModuleType, tmp_path: Path) -> None:
    recipes = [
        Recipe(**script.recipe_of(tmp_path, each, seed, 240)).model_dump() for each in script.TYPES for seed in (0, 1)
    ]
    different = {name for name in recipes[0] if len({str(recipe[name]) for recipe in recipes}) > 1}
    assert different == {"prediction_type", "seed", "output_dir"}
