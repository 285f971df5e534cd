"""`sd-recipes average`: what it makes is what training would have kept, and loads in diffusers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_format_and_saver import entry, rewrite_manifest
from test_script import environment
from tiny_models import UNET_CONFIG, build_image_folder, build_tiny_pipeline
from training_runs import assert_leaves_as_it_came, forget_accelerator

from sd_recipes.checkpoints.snapshots import list_snapshots
from sd_recipes.commands.average import average
from sd_recipes.commands.average_settings import read_settings
from sd_recipes.commands.train import run
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.trackers import read_metrics
from sd_recipes.training.build_parts import UNET_WEIGHTS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, which has kept averages, its `model`, and its `data` with a held-out split."""
    folder = tmp_path_factory.mktemp("trained")
    build_tiny_pipeline(folder / "model")
    for split in ("train", "test"):
        build_image_folder(folder / "data" / split, 4)
    forget_accelerator()
    run(
        Recipe(
            pretrained_model_name_or_path=str(folder / "model"), dataset_name=str(folder / "data"), resolution=32,
            train_batch_size=4, max_train_steps=20, checkpointing_steps=2, checkpoints_total_limit=1,
            learning_rate=3e-3, lr_warmup_steps=0, device="cpu", seed=5, report_to="none", validation_split="test",
            validation_samples=8, validation_pictures=0,
            use_ema=True, ema_length=0.07, ema_snapshots=True, output_dir=str(folder / "run"),
        )
    )  # fmt: skip
    return folder


def average_by(*words: object) -> None:
    """What the command does, in this process."""
    forget_accelerator()
    average(read_settings([str(word) for word in words]))


def unet(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / UNET_WEIGHTS)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum((one[name] - other[name]).double().square().sum().item() for name in one) ** 0.5


def test_the_average_is_the_one_that_training_kept(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the length that the run had, its weights and its held-out loss; the best is written, and draws."""
    out = tmp_path / "out"
    average_by(trained / "run", "--length", "0.07,0.2", "--output_dir", out, "--device", "cpu")
    found = json.loads((out / "averages.json").read_text())
    assert (found["step"], found["updates"]) == (20, 20)
    assert [each["length"] for each in found["averages"]] == [0.07, 0.2]
    losses = [each["validation_loss"] for each in found["averages"]]
    in_training = [line["validation_loss"] for line in read_metrics(trained / "run" / "metrics.jsonl")
                   if "validation_loss" in line][-1]  # fmt: skip
    assert losses[0] == pytest.approx(in_training, rel=1e-4)
    assert losses[1] > losses[0] * 1.02, "the wide one still holds much of the start"
    assert found["best_length"] == 0.07
    for each in found["averages"]:
        assert sum(part["coefficient"] for part in each["coefficients"]) == pytest.approx(1)
        assert len(each["coefficients"]) == 20
    kept = unet(trained / "run" / "unet")
    assert distance(unet(out / "unet"), kept) < 0.01 * distance(kept, unet(trained / "model" / "unet"))
    assert_leaves_as_it_came(out, trained / "model")
    lines = capsys.readouterr().out.splitlines()
    assert f"length 0.07: {out}" in lines
    table = lines[lines.index("step 20, from 20 averages kept at 10 steps") + 1 :]
    assert [line.split()[0] for line in table[:3]] == ["length", "0.07", "0.2"]


def test_an_earlier_step(trained: Path, tmp_path: Path) -> None:
    """A length that was kept is given back to the bit, of a step whose checkpoint is gone."""
    assert not (trained / "run" / "checkpoint-12").exists()
    average_by(trained / "run", "--length", 0.1, "--step", 12, "--output_dir", tmp_path, "--device", "cpu")
    kept = trained / "run" / "averages" / "snapshot-12" / "unet_ema10"
    made = unet(tmp_path / "unet")
    assert all(torch.allclose(made[name], value, rtol=0, atol=1e-7) for name, value in unet(kept).items())
    assert json.loads((tmp_path / "averages.json").read_text())["step"] == 12


@pytest.mark.slow
def test_without_held_out_rows_all_are_written(trained: Path, tmp_path: Path) -> None:
    """By the command as a user types it, and once more into the same folder."""
    shutil.copytree(trained / "run", tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("validation_split: test", "validation_split: null"))
    command = [sys.executable, "-m", "sd_recipes.commands.cli", "average", "--length", "0.05,0.1", "run"]
    done = subprocess.run(
        [*command, "--device", "cpu"],
        env=environment(PYTHONPATH=str(ROOT)), cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    average_by(tmp_path / "run", "--length", "0.05,0.1", "--device", "cpu")
    out = tmp_path / "run" / "averaged"
    assert json.loads((out / "averages.json").read_text())["best_length"] is None
    assert_leaves_as_it_came(out / "length-0.05", trained / "model")
    assert distance(unet(out / "length-0.05" / "unet"), unet(out / "length-0.1" / "unet")) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--length", "0.1"], "the following arguments are required: RUN"),
        (["run"], "--length is missing: give relative widths"),
        (["run", "--length", "wide"], "--length: 'wide' is not a number: give relative widths"),
        (["run", "--length", "0.05,"], "--length: '' is not a number: give relative widths"),
        (["run", "--length", "0.05,0.289"], "--length: no average is of length 0.289: give relative widths"),
        (["run", "--length", "0"], "--length: no average is of length 0: give relative widths"),
        (["run", "--length", "nan"], "--length: no average is of length nan"),
        (["run", "--length", "0.05", "0.1"], "'0.1' is a word too many: give one RUN, and lengths with commas"),
        (["run", "--lenght", "0.1"], "unknown flag --lenght (nearest: --length)"),
        (["nowhere", "--length", "0.1"], "nowhere holds no run: give the --output_dir of one that was trained"),
        (["model", "--length", "0.1"], "model holds no run"),
        (["run", "--length", "0.1", "--step", "13"], "--step 13: run has kept no averages then, but at 2, 4, 6, 8, 10"),
        (["run", "--length", "0.1", "--step", "-2"], "--step: input should be greater than or equal to 1"),
        (["run", "--length", "0.1", "--output_dir", "run"], "--output_dir run holds something else: choose"),
        (["run", "--length", "0.1", "--output_dir", "run/recipe.yaml"], "--output_dir run/recipe.yaml is not a folder"),
    ],
)
def test_mistakes_are_told_in_one_line(
    trained: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(trained)
    with pytest.raises(RecipeError) as told:
        average_by(*words)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_a_run_that_kept_nothing_and_one_that_was_damaged(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained / "run", copy)
    newest = list_snapshots(copy)[-1]
    (newest / "unet_ema05" / UNET_WEIGHTS).write_bytes(b"0")
    with pytest.raises(RecipeError, match=r"snapshot-20 cannot be used \(unet_ema05/.* has 1 bytes .*: remove it"):
        average_by(copy, "--length", "0.1")
    shutil.rmtree(copy / "averages")
    with pytest.raises(RecipeError, match="run has kept no averages: train with --ema_snapshots"):
        average_by(copy, "--length", "0.1")


def test_a_full_disk(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same command once more, when there is room."""
    words = (trained / "run", "--length", 0.05, "--output_dir", tmp_path / "out", "--device", "cpu")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sd_recipes.commands.average.export_trained", full)
        with pytest.raises(RecipeError, match=r"out cannot be written \(.*No space left on device\): make room"):
            average_by(*words)
    average_by(*words)
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_a_model_that_is_not_where_it_was(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(trained / "model"), str(tmp_path / "gone")))
    with pytest.raises(RecipeError, match=r"/gone: no such .*run/recipe\.yaml says so; its relative paths begin where"):
        average_by(tmp_path / "run", "--length", "0.1", "--device", "cpu")


def test_a_run_whose_steps_were_all_skipped(trained: Path, tmp_path: Path) -> None:
    """As a loss scaler does at first; then the averages are those of no weights at all."""
    shutil.copytree(trained / "run", tmp_path / "run")
    for path in list_snapshots(tmp_path / "run"):
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").unlink()  # it is a link to the checkpoint's
        (path / "state.json").write_text(json.dumps(state | {"averages": {"unet": 0}}))
        name_in_manifest(path, "state.json")
    with pytest.raises(RecipeError, match="snapshot-20 is from before the first update: train on"):
        average_by(tmp_path / "run", "--length", "0.1", "--device", "cpu")


def name_in_manifest(path: Path, file: str) -> None:
    """Let a snapshot's manifest have the hash of a changed file."""
    content = (path / file).read_bytes()
    rewrite_manifest(path, lambda manifest: manifest["files"].update({file: entry(content)}))


def test_a_model_that_is_another_one(trained: Path, tmp_path: Path) -> None:
    build_tiny_pipeline(tmp_path / "other", unet_config=UNET_CONFIG | {"block_out_channels": [32, 32]})
    shutil.copytree(trained / "run", tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(trained / "model"), str(tmp_path / "other")))
    with pytest.raises(RecipeError, match=r"snapshot-20 do not fit the unet of .*other \(.*: is that still the run's"):
        average_by(tmp_path / "run", "--length", "0.1", "--device", "cpu")
