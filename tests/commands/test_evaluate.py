"""`sd-recipes evaluate`, on a run with checkpoints, and what it says of what it cannot evaluate."""

from __future__ import annotations

import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from tiny_models import build_image_folder, build_tiny_pipeline

from sd_recipes.commands.evaluate import Target, evaluate, find_target
from sd_recipes.commands.evaluate_settings import read_settings
from sd_recipes.commands.train import run
from sd_recipes.errors import RecipeError
from sd_recipes.evaluation.sample_errors import read_table
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import forget_accelerator
from sd_recipes.runtime.trackers import read_metrics


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, of 6 steps with an average and a checkpoint every 3, its `model` and its `data`."""
    folder = tmp_path_factory.mktemp("evaluated")
    build_tiny_pipeline(folder / "model")
    build_image_folder(folder / "data", 24)
    forget_accelerator()
    run(
        Recipe(
            pretrained_model_name_or_path=str(folder / "model"), train_data_dir=str(folder / "data"), resolution=32,
            train_batch_size=4, max_train_steps=6, checkpointing_steps=3, learning_rate=3e-3, lr_warmup_steps=0,
            device="cpu", seed=5, report_to="none", validation_split="0.3", validation_samples=32, validation_steps=3,
            validation_pictures=2, validation_inference_steps=2, use_ema=True, output_dir=str(folder / "run"),
        )
    )  # fmt: skip
    return folder


def evaluated(*words: object) -> None:
    """What the command does, in this process."""
    forget_accelerator()
    evaluate(read_settings([str(word) for word in words]))


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def test_figures_are_those_of_training(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of the checkpoints, the pipeline, and the model before training; raw and averaged."""
    run_dir, out = trained / "run", tmp_path / "out"
    evaluated(
        run_dir, run_dir / "checkpoint-3", run_dir / "best", trained / "model", "--num_pictures", 6,
        "--validation_inference_steps", 2, "--output_dir", out,
    )  # fmt: skip
    by_step = {line["step"]: line for line in read_metrics(run_dir / "metrics.jsonl") if "validation_loss" in line}
    found = results(out)["targets"]
    assert [each["target"] for each in found] == [
        str(run_dir), str(run_dir / "checkpoint-3"), str(run_dir / "best"), str(trained / "model"),
    ]  # fmt: skip
    for each, step in zip(found, (6, 3, by_step[6]["best_step"], 0), strict=True):
        for name in ("validation_loss", "train_subset_loss", "validation_gap", "validation_loss_bin_3"):
            assert each["figures"][name] == pytest.approx(by_step[step][name], rel=1e-6, abs=1e-7), (step, name)
    assert found[3]["figures"]["validation_excess_bin_0"] != 1, "over the first that is evaluated"
    assert found[0]["figures"]["validation_excess_bin_0"] == 1
    scores = found[0]["scores"]
    assert {"frechet_distance", "kernel_distance", "cmmd", "authpct"} <= scores.keys() | found[0]["missing"].keys()
    assert scores["authpct"]["low"] <= scores["authpct"]["value"] <= scores["authpct"]["high"]
    assert results(out)["features"] == "CLIP tiny-clip (not Inception)"

    told = capsys.readouterr().out
    assert "held-out loss" in told
    assert f"{found[0]['figures']['validation_loss']:.4g}" in told
    errors = read_table(out / "errors-2.parquet")
    assert errors["loss"].to_pylist() == pytest.approx(
        [
            line["loss"]
            for line in read_table(run_dir / "validation" / "step-000003.parquet").to_pylist()
            if line["weights"] == "averaged"
        ],
        rel=1e-6,
    )
    page = (out / "evaluation.html").read_text()
    HTMLParser().feed(page)
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert page.count("data:image/jpeg") >= 4 * 6
    with Image.open(out / "pictures-1.png") as picture:
        assert picture.width > 128

    evaluated(run_dir / "checkpoint-3", "--weights", "raw", "--num_pictures", 0, "--output_dir", out)
    (raw,) = results(out)["targets"]
    assert raw["figures"]["validation_loss"] == pytest.approx(by_step[3]["raw_validation_loss"], rel=1e-6)


def test_rows_are_those_of_the_first_run_whatever_its_seed(trained: Path, tmp_path: Path) -> None:
    """Of a run on some of the rows, drawn by its seed; a second run, validated on others, is measured on the same."""
    forget_accelerator()
    run(
        Recipe(
            pretrained_model_name_or_path=str(trained / "model"), train_data_dir=str(trained / "data"), resolution=32,
            train_batch_size=4, max_train_steps=1, max_train_samples=8, device="cpu", seed=11, report_to="none",
            validation_split="3", validation_samples=8, validation_pictures=0, output_dir=str(tmp_path / "some"),
        )
    )  # fmt: skip
    evaluated(tmp_path / "some", trained / "run", "--num_pictures", 0, "--output_dir", tmp_path / "out")
    some, other = results(tmp_path / "out")["targets"]
    last = read_metrics(tmp_path / "some" / "metrics.jsonl")[-1]
    for name in ("validation_loss", "train_subset_loss"):
        assert some["figures"][name] == pytest.approx(last[name], rel=1e-6)
    first, second = (read_table(tmp_path / "out" / f"errors-{number}.parquet") for number in (1, 2))
    for name in ("set", "row", "timestep"):
        assert first[name].equals(second[name])
    assert other["figures"]["validation_loss"] != some["figures"]["validation_loss"]


def test_a_pipeline_is_evaluated_on_data_that_flags_name(trained: Path, tmp_path: Path) -> None:
    flags = ["--train_data_dir", trained / "data", "--resolution", 32, "--validation_split", "0.3", "--device", "cpu"]
    flags += ["--validation_samples", 32, "--num_pictures", 0]
    evaluated(trained / "model", *flags, "--output_dir", tmp_path / "out")
    before = read_metrics(trained / "run" / "metrics.jsonl")[0]
    assert results(tmp_path / "out")["targets"][0]["figures"]["validation_loss"] == pytest.approx(
        before["validation_loss"], rel=1e-6
    )


def test_what_cannot_be_evaluated_is_said_in_one_line(trained: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(trained / "run" / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    shutil.copy(trained / "run" / "recipe.yaml", tmp_path / "run")
    weights = checkpoint / "unet_ema" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    (tmp_path / "empty").mkdir()
    other = build_tiny_pipeline(
        tmp_path / "other", unet_config=UNet2DConditionModel.load_config(trained / "model", subfolder="unet")
    )
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").write_text("mine")
    for words, message in [
        ([tmp_path / "nowhere"], "no such file or folder"),
        ([""], "an empty name: no such file or folder"),
        ([tmp_path / "empty"], "neither a run of this program, nor a checkpoint of one, nor a pipeline"),
        ([checkpoint], "cannot be used: unet_ema/diffusion_pytorch_model.safetensors has"),
        ([other], "nothing is held out"),
        ([trained / "run", "--feature_model", tmp_path / "empty", "--num_pictures", 2], "feature model"),
        ([trained / "run", "--validation_split", "1e-9"], "holds out none of 24 rows"),
        ([trained / "run", "--output_dir", occupied], "holds something else"),
        (["--num_pictures", 2], "name first what is evaluated"),
        ([trained / "run", "--num_picture", 2], "unknown flag --num_picture"),
        ([trained / "run", "--validation_sampler", "eulr"], "eulr"),
    ]:
        with pytest.raises(RecipeError, match=message) as error:
            evaluated(*words, *([] if "--output_dir" in words else ["--output_dir", tmp_path / "out"]))
        assert "\n" not in str(error.value), message


def test_copies_of_the_training_pictures_are_found(trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Where the drawn pictures are training pictures, none is authentic, and each is shown beside its original."""
    from sd_recipes.commands import evaluate as command
    from sd_recipes.evaluation.real_pictures import real_pictures

    built: list[Any] = []
    draw = command.draw

    def copied(run_: Any, prompts: list[str], at_once: int) -> list[Image.Image]:
        built.append(run_)
        assert len(draw(run_, prompts, at_once)) == len(prompts)
        found = [pixels for _, pixels in real_pictures(run_.data.rows, run_.recipe, (32, 32))]
        return [Image.fromarray(found[n].permute(1, 2, 0).numpy()) for n in range(len(prompts))]

    monkeypatch.setattr(command, "draw", copied)
    evaluated(trained / "run", "--num_pictures", 6, "--validation_inference_steps", 1, "--output_dir", tmp_path / "out")
    (found,) = results(tmp_path / "out")["targets"]
    assert found["scores"]["authpct"]["value"] == 0
    assert (tmp_path / "out" / "evaluation.html").read_text().count('class="copy"') == 6
    assert isinstance(built[0].model.components.unet, torch.nn.Module)


def test_a_run_is_its_pipeline_unless_it_has_gone_on(trained: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(trained / "run", tmp_path / "run")
    pipeline = (run_dir / "model_index.json").stat().st_mtime
    newest = run_dir / "checkpoint-6"
    os.utime(newest, (pipeline - 1, pipeline - 1))
    assert find_target(str(run_dir), "evaluated") == Target(str(run_dir), run_dir)
    assert find_target(str(run_dir), "raw").weights == newest, "a pipeline has no raw weights"
    os.utime(newest, (pipeline + 1, pipeline + 1))
    assert find_target(str(run_dir), "evaluated") == Target(f"{run_dir} (checkpoint-6)", run_dir, newest)
