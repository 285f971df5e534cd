"""`sd-recipes evaluate --bound`: its figures against the bound itself, on one process and two, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from launching import finish, torchrun
from safetensors.torch import load_file, save_file
from test_evaluate import evaluated, results
from test_script import environment
from tiny_models import build_image_folder, build_tiny_pipeline
from training_runs import build, train

from sd_recipes.errors import RecipeError
from sd_recipes.evaluation.bound import variational_bound
from sd_recipes.export.bit_pages import with_error
from sd_recipes.export.run_page import write_run_page

NUM_TIMESTEPS = 40
CASES = [(which, kind) for which in ("held_out", "train") for kind in ("captions", "no_captions")]


def change_scheduler(model: Path, **changes: Any) -> None:
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a `model` of few timesteps, its `data`, and a `run` that has changed it much."""
    folder = tmp_path_factory.mktemp("bound")
    change_scheduler(build_tiny_pipeline(folder / "model"), num_train_timesteps=NUM_TIMESTEPS)
    build_image_folder(folder / "data", 24)
    train(settings(folder), output_dir=str(folder / "run"), max_train_steps=4, learning_rate=3e-2, lr_warmup_steps=0)
    return folder


def settings(folder: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(folder / "model"), "train_data_dir": str(folder / "data"),
        "resolution": 32, "train_batch_size": 4, "device": "cpu", "seed": 5, "report_to": "none",
        "validation_split": "0.3", "validation_samples": 8, "validation_pictures": 0,
    }  # fmt: skip


def flags(folder: Path) -> list[object]:
    """Of an evaluation of the model, which is no run."""
    return [
        "--train_data_dir", folder / "data", "--resolution", 32, "--validation_split", "0.3", "--device", "cpu",
        "--validation_samples", 8, "--num_pictures", 0, "--bound",
    ]  # fmt: skip


def bound_of(folder: Path, place: int = 0) -> dict[str, Any]:
    return results(folder)["targets"][place]["bound"]


def numbers(found: Any, path: str = "") -> dict[str, float]:
    """All numbers of a JSON document, by their place in it."""
    if isinstance(found, dict | list):
        items = found.items() if isinstance(found, dict) else enumerate(found)
        return {name: value for key, each in items for name, value in numbers(each, f"{path}/{key}").items()}
    return {path: found} if isinstance(found, float | int) else {}


def test_figures_are_those_of_the_bound(folder: Path, tmp_path: Path) -> None:
    """All timesteps, with and without captions, under all variances, on the rows' own latents."""
    out = tmp_path / "out"
    evaluated(folder / "model", *flags(folder), "--bound_rows", 3, "--bound_timesteps", "all", "--output_dir", out)
    found = bound_of(out)
    run = build(settings(folder), output_dir=str(tmp_path / "unused"), max_train_steps=1)
    validator, components = run.validator, run.model.components
    scale = components.vae.config.scaling_factor
    totals = {}
    for which, kind in CASES:
        samples, here = validator.samples[which], found[which]
        assert here["rows"] == 3
        own = sorted(pq.read_table(out / "bits-1.parquet", filters=[("set", "==", which)])["row"].unique().to_pylist())
        batch = samples.builder[samples.plan(np.array(own))]
        ids = batch.input_ids
        if kind == "no_captions":
            ids = components.tokenizer([""] * 3, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            states = components.text_encoder(ids)[0]
            posterior = components.vae.encode(batch.pixels / 127.5 - 1).latent_dist
            latents = (posterior.mean + posterior.std * batch.posterior_noise) * scale
        for variance in ("fixed_large", "fixed_small", "fitted"):
            expected = variational_bound(
                lambda noisy, timesteps, states: components.unet(noisy, timesteps, states).sample,
                latents, components.scheduler, prediction_type="epsilon", variance=variance, image_numbers=own,
                conditioning={"states": states},
            )  # fmt: skip
            assert here[kind]["by_variance"][variance] == pytest.approx(
                {"value": expected.total, "error": expected.standard_error.total}, rel=1e-4
            )
        totals[which, kind] = expected  # fitted
        assert here[kind]["prior"]["value"] == pytest.approx(expected.prior, rel=1e-4)
        assert here[kind]["denoising"]["value"] == pytest.approx(expected.denoising.sum(), rel=1e-4)
        assert here[kind]["reconstruction"]["value"] == pytest.approx(expected.reconstruction, rel=1e-4)
        # Of N(0, 1) in other units: the bits of y = s z are log2 s a dimension more than those of z.
        assert here[kind]["scaling_undone"]["value"] == pytest.approx(expected.total - math.log2(scale), rel=1e-4)
        curve = here[kind]["rate_distortion"]
        assert curve["bits"][0] == pytest.approx(expected.prior, rel=1e-4)
        assert curve["bits"][-1] == pytest.approx(expected.total - expected.reconstruction, rel=1e-4)
        assert curve["rmse"][-1] == pytest.approx(math.sqrt(expected.squared_errors[0]), rel=1e-4)

        with torch.no_grad():
            levels = (components.vae.decode(latents / scale).sample.clamp(-1, 1) + 1) * 127.5
            density = -torch.distributions.Normal(posterior.mean, posterior.std).entropy().sum() / math.log(2) / 3
        error = float((levels - batch.pixels).square().mean()) + 1 / 12
        pixels = (256 * (expected.total - math.log2(scale)) + float(density)) / (3 * 32 * 32)
        pixels += 0.5 * math.log2(2 * math.pi * math.e * error)
        assert here[kind]["pixels"]["value"] == pytest.approx(pixels, rel=1e-4)

    told, error = totals["held_out", "no_captions"].difference(totals["held_out", "captions"])
    assert found["held_out"]["told_by_captions"] == pytest.approx({"value": told, "error": error}, rel=1e-2, abs=1e-6)
    gap = totals["held_out", "captions"].total - totals["train", "captions"].total
    assert found["gap"]["value"] == pytest.approx(gap, rel=1e-3)
    assert found["space"] == {
        "latents": [4, 8, 8], "dimensions": 256, "scaling_factor": scale, "pixel_values": 3072,
    }  # fmt: skip
    for name, shares in found["contributions"].items():
        assert sum(shares) == pytest.approx(1), name
    assert "change" not in found
    # The exact sum from the table, of which any other figure can be derived.
    table = pq.read_table(out / "bits-1.parquet").to_pandas()
    assert len(table) == 4 * 3 * NUM_TIMESTEPS
    assert (table.weight == 1).all()


def test_models_are_compared_under_the_same_noise_and_the_run_tells_of_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "run"
    evaluated(run, folder / "model", "--num_pictures", 0, "--bound", "--bound_rows", 4, "--bound_timesteps", 8)
    out = run / "evaluation"
    told = capsys.readouterr().out
    first, second = bound_of(out, 0), bound_of(out, 1)
    assert first["timesteps"] == 8
    difference = second["held_out"]["captions"]["total"]["value"] - first["held_out"]["captions"]["total"]["value"]
    assert second["change"]["value"] == pytest.approx(difference)
    assert "change" not in first
    tables = [pq.read_table(out / f"bits-{number}.parquet") for number in (1, 2)]
    for column in ("set", "captions", "row", "timestep", "weight"):
        assert tables[0][column].equals(tables[1][column]), column
    assert not tables[0]["squared_error"].equals(tables[1]["squared_error"])
    assert "bits per latent dimension" in told
    assert with_error(first["held_out"]["captions"]["total"]) in told

    page = (out / "evaluation.html").read_text()
    assert page.count("What the bits buy") == 2
    assert "than with the first model" in page
    report = (run / "report.html").read_text()
    assert "How many bits?" in report
    assert report.count("What the bits buy") == 1, "of the run alone"
    assert f"page of the run {run / 'report.html'}" in told
    for broken in ('{"targets": [{"of_this_run": true, "bound": {"space": 3}}]}', "[", "[1]", "\0"):
        (out / "evaluation.json").write_text(broken)
        write_run_page(run)
        assert "How many bits?" not in (run / "report.html").read_text(), broken


def test_a_single_row_has_no_error(folder: Path, tmp_path: Path) -> None:
    evaluated(
        folder / "model", *flags(folder), "--bound_rows", 1, "--bound_timesteps", 2, "--bound_variance", "fixed_small",
        "--output_dir", tmp_path,
    )  # fmt: skip
    found = bound_of(tmp_path)
    total = found["held_out"]["captions"]["total"]
    assert total["error"] is None
    assert total == found["held_out"]["captions"]["by_variance"]["fixed_small"]
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()
    assert "How many bits?" in (tmp_path / "evaluation.html").read_text()


@pytest.mark.slow
def test_two_processes_count_the_bits_of_one(folder: Path, tmp_path: Path) -> None:
    """Five rows of each set, one sample at a time, so that nothing but the sharing differs."""
    words = [
        folder / "model", *flags(folder), "--bound_rows", 5, "--bound_timesteps", 6, "--batch_size", 1,
    ]  # fmt: skip
    evaluated(*words, "--output_dir", tmp_path / "one")
    command = [*torchrun(2), "-m", "sd_recipes.commands.cli", "evaluate", *words, "--output_dir", tmp_path / "two"]
    finish(
        subprocess.Popen(
            [str(word) for word in command], env=environment(), cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )
    )  # fmt: skip
    one, two = (numbers(bound_of(tmp_path / name)) for name in ("one", "two"))
    assert len(one) > 100
    assert two == pytest.approx(one, rel=1e-6, abs=1e-9)


def overflowing(model: Path, part: str, name: str) -> None:
    """Multiply a part's tensor, so that what it computes is beyond float32, while its weights are not."""
    path = model / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors[name] = torch.full_like(tensors[name], 3e38)
    save_file(tensors, path, {"format": "pt"})


def test_what_has_no_bound_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    for number, (break_it, words, message) in enumerate(
        [
            (
                lambda model: change_scheduler(model, trained_betas=[0.1, 0.5, 1.0], num_train_timesteps=3),
                [], "--bound: the schedule ends at zero SNR, where 'epsilon' says nothing of the latents",
            ),
            (
                lambda model: change_scheduler(model, trained_betas=[0.1, 0.0, 0.2], num_train_timesteps=3),
                [], "--bound: alphas_cumprod does not fall at timestep 1",
            ),
            (lambda model: overflowing(model, "vae", "quant_conv.weight"), [], "--bound: the VAE's latents of row "),
            (lambda model: overflowing(model, "unet", "conv_out.weight"), [], "--bound: the UNet's predictions are"),
            (lambda model: (model / "unet" / "config.json").unlink(), [], "unet"),
            (lambda model: None, ["--bound_timesteps", "some"], "--bound_timesteps: give a number of timesteps"),
            (lambda model: None, ["--bound_timesteps", "0"], "--bound_timesteps: give a number of timesteps"),
            (lambda model: None, ["--bound_rows", "0"], "--bound_rows"),
            (lambda model: None, ["--bound_variance", "learned"], "--bound_variance"),
        ]
    ):  # fmt: skip
        model = build_tiny_pipeline(tmp_path / f"model-{number}")
        break_it(model)
        with pytest.raises(RecipeError, match=message) as error:
            evaluated(model, *flags(folder), "--bound_timesteps", 2, "--output_dir", tmp_path / "out", *words)
        assert "\n" not in str(error.value), message
        assert not (tmp_path / "out").exists()
