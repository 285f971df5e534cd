"""The script as a user runs it: a subprocess through `accelerate launch`, files, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import UNET_CONFIG, build_tiny_pipeline
from training_runs import forget_accelerator

from sd_recipes.commands.train import run
from sd_recipes.errors import RecipeError
from sd_recipes.flags import load_recipe

ACCELERATE = Path(sys.executable).parent / "accelerate"


def environment(**extra: str) -> dict[str, str]:
    """The environment of a new shell: one thread, nothing of this process's accelerate state."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "LOCAL_RANK"))}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def launch(*flags: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    # On CPUs `accelerate launch` starts several processes through MPI only; torchrun does without.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
    several = [*torchrun, "--nproc_per_node", processes]
    launcher = several if processes > 1 else [ACCELERATE, "launch", "--quiet"]
    command = [*launcher, ROOT / "train_text_to_image.py", "--device", "cpu", *flags]
    return subprocess.run(
        [str(part) for part in command], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def run_script(*flags: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "train_text_to_image.py", *flags]
    return subprocess.run(
        [str(part) for part in command], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture
def command_of_diffusers(tiny_pipeline: Path, image_folder: Path, tmp_path: Path) -> list[object]:
    """As the peer's own example tests write it."""
    return [
        "--pretrained_model_name_or_path", tiny_pipeline, "--train_data_dir", image_folder, "--resolution", 32,
        "--center_crop", "--random_flip", "--train_batch_size", 1, "--gradient_accumulation_steps", 1,
        "--learning_rate", "5.0e-04", "--scale_lr", "--lr_scheduler", "constant", "--lr_warmup_steps", 0,
        "--seed", 0, "--output_dir", tmp_path / "out",
    ]  # fmt: skip


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if "checkpoint" in path.name}


def test_a_command_line_of_diffusers_script_runs_unchanged(command_of_diffusers: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = launch(
        *command_of_diffusers, "--max_train_steps", 4, "--checkpointing_steps", 2, "--use_ema", "--foreach_ema",
        "--noise_offset", 0.05, "--snr_gamma", 5.0, "--enable_xformers_memory_efficient_attention", "--allow_tf32",
        "--image_interpolation_mode", "bicubic", "--validation_prompts", "disc number 1", "a disc", "--local_rank", -1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert checkpoints(out) == {"checkpoint-2", "checkpoint-4"}
    UNet2DConditionModel.from_pretrained(out / "checkpoint-2" / "unet")
    averaged = load_file(out / "checkpoint-4" / "unet_ema" / "diffusion_pytorch_model.safetensors")
    exported = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(averaged[name], exported[name]) for name in exported), "the average is what is exported"
    assert "PyTorch's own memory-efficient attention" in done.stderr

    pipeline = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("disc number 2", num_inference_steps=2, height=32, width=32).images[0]
    assert image.size == (32, 32)
    assert sorted(path.suffix for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")) == []

    with Image.open(out / "samples" / "step-000004.png") as grid:
        assert grid.width > 2 * 128
    events = EventAccumulator(str(out / "logs" / "text2image-fine-tune"))
    events.Reload()
    assert {"train_loss", "lr", "images_per_second"} <= set(events.Tags()["scalars"])
    assert "validation" in events.Tags()["images"]
    assert "images/s" in done.stderr, "the bar shows the speed"
    assert "loss curve" in done.stdout
    assert (out / "loss_curve.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_total_limit_keeps_the_newest_and_resuming_survives_a_removed_one(
    command_of_diffusers: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = [*command_of_diffusers, "--checkpointing_steps", 2]
    assert launch(*flags, "--max_train_steps", 6, "--checkpoints_total_limit", 2).returncode == 0
    assert checkpoints(out) == {"checkpoint-4", "checkpoint-6"}
    shutil.rmtree(out / "checkpoint-4")
    done = launch(*flags, "--max_train_steps", 8, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    assert "Resuming from" in done.stderr
    assert checkpoints(out) == {"checkpoint-6", "checkpoint-8"}
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), "no step is logged twice"


@pytest.mark.slow
def test_the_saved_recipe_reproduces_the_run(command_of_diffusers: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Without a seed: the run draws one and writes it down.
    place = command_of_diffusers.index("--seed")
    flags = command_of_diffusers[:place] + command_of_diffusers[place + 2 :]
    assert launch(*flags, "--max_train_steps", 3).returncode == 0
    first = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    done = launch("--config", out / "recipe.yaml", "--output_dir", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    again = load_file(tmp_path / "again" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_dry_run_prints_the_run_and_trains_nothing(command_of_diffusers: list[object], tmp_path: Path) -> None:
    done = run_script(*command_of_diffusers, "--gradient_accumulation_steps", 3, "--num_train_epochs", 2, "--dry_run")
    assert done.returncode == 0, done.stderr
    for words in (
        "global batch         3 = 1 per device x 3",
        "optimizer steps      6 (3 per epoch",
        "trainable parameters",
    ):
        assert words in done.stdout
    assert "learning_rate: 0.0005" in done.stdout
    assert not (tmp_path / "out" / "unet").exists()


@pytest.mark.slow
def test_the_emoji_in_the_package_train_from_scratch_from_a_config(tiny_pipeline: Path, tmp_path: Path) -> None:
    config = tmp_path / "unet.json"
    config.write_text(json.dumps({**UNET_CONFIG, "block_out_channels": [16, 32]}))
    done = run_script(
        "--pretrained_model_name_or_path", tiny_pipeline, "--dataset_name", "sd-recipes/emoji",
        "--max_train_samples", 20, "--train_from_scratch", "--unet_config", config, "--resolution", 32,
        "--train_batch_size", 4, "--max_train_steps", 2, "--output_dir", tmp_path / "out",
        "--validation_split", "flags_heldout",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").config.block_out_channels == [16, 32]
    assert "held-out loss" in done.stdout


# ---------------------------------------------------------------------------------------- bad input


def lacking_vae(tmp_path: Path, pipeline: Path) -> Path:
    shutil.copytree(pipeline, tmp_path / "no-vae")
    shutil.rmtree(tmp_path / "no-vae" / "vae")
    return tmp_path / "no-vae"


def broken_unet(tmp_path: Path, pipeline: Path) -> Path:
    shutil.copytree(pipeline, tmp_path / "broken")
    (tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    return tmp_path / "broken"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--pretrained_model_name_or_path", "./absent"], "no such folder"),
        (["--pretrained_model_name_or_path", "someone/absent"], "someone/absent: cannot load"),
        (["--pretrained_model_name_or_path", lacking_vae], "lacks the folder vae/"),
        (["--pretrained_model_name_or_path", broken_unet], "cannot load unet"),
        (["--train_data_dir", "./absent"], "absent: no such file or folder"),
        (["--caption_column", "txt"], "nearest: text"),
        (["--image_column", "picture"], "has the columns ['image', 'text']"),
        (["--resolution", 33], "use 32 or 36"),
        (["--train_batch_size", 9], "the data set has 8 rows"),
        (["--output_dir", "/proc/out"], "cannot be written"),
        (["--mixed_precision", "fp16", "--device", "cpu"], "use bf16 or no on the CPU"),
        (["--device", "cuda"], "sees no GPU"),
        (["--use_8bit_adam", "--optimizer", "adafactor"], "contradicts"),
        (["--resume_from_checkpoint", "checkpoint-7"], "no checkpoint there"),
        (["--unet_config", "absent.json", "--train_from_scratch"], "--unet_config absent.json: no such file"),
        (["--report_to", "comet_ml"], "pip install comet_ml"),
    ],
)
def test_a_mistake_is_named_with_the_way_out(
    command_of_diffusers: list[object],
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: list,
    words: str,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the Hub's client waits between its tries
    if torch.cuda.is_available() and "cuda" in changes:
        pytest.skip("this machine has the GPU that the test needs to be absent")
    changes = [change(tmp_path, tiny_pipeline) if callable(change) else change for change in changes]
    forget_accelerator()
    with pytest.raises(RecipeError) as error:
        run(load_recipe([str(flag) for flag in [*command_of_diffusers, "--max_train_steps", 1, *changes]]))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "unet").exists(), "it must fail before training"


def assert_one_line_error(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == done.stderr.splitlines()[-1:]
    assert words in done.stderr.splitlines()[-1]


def test_a_mistake_is_one_line_without_a_traceback(command_of_diffusers: list[object]) -> None:
    mistake = ["--caption_column", "txt"]
    assert_one_line_error(run_script(*command_of_diffusers, *mistake), "nearest: text")
    assert_one_line_error(launch(*command_of_diffusers, *mistake), "nearest: text")
    assert_one_line_error(launch(*command_of_diffusers, "--lerning_rate", 1), "nearest: --learning_rate")


def test_eight_bit_adam_without_bitsandbytes(command_of_diffusers: list[object], tmp_path: Path) -> None:
    """On a machine without it no finder knows the module."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *rest: None if name == 'bitsandbytes' else find(name, *rest)\n"
    )
    command = [sys.executable, ROOT / "train_text_to_image.py", *command_of_diffusers, "--use_8bit_adam"]
    done = subprocess.run(
        [str(part) for part in command],
        env=environment(PYTHONPATH=str(tmp_path)),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert_one_line_error(done, "error: --use_8bit_adam needs bitsandbytes: pip install")


def broken_folder(image_folder: Path, folder: Path, number: int) -> Path:
    shutil.copytree(image_folder, folder)
    for name in range(number):
        (folder / f"{name}.png").write_bytes(b"\x89PNG garbage")
    return folder


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_rows_are_skipped_counted_and_named(
    command_of_diffusers: list[object], image_folder: Path, tmp_path: Path, num_workers: int
) -> None:
    folder = broken_folder(image_folder, tmp_path / "broken", 2)
    flags = ["--train_data_dir", folder, "--max_train_steps", 20, "--dataloader_num_workers", num_workers]
    done = run_script(*command_of_diffusers, *flags, "--max_bad_rows", 2, "--check_data", "off")
    assert done.returncode == 0, done.stderr
    named = [json.loads(line)["row"] for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert sorted(named) == [f"row {number} ({folder}/{number}.png)" for number in (0, 1)]
    assert done.stderr.count("Skipped row 0") == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["bad_rows"] == 2


@pytest.mark.parametrize(("check", "processes"), [
    pytest.param("off", 1, marks=pytest.mark.slow), pytest.param("off", 2, marks=pytest.mark.slow), ("sample", 1)
])  # fmt: skip
def test_too_many_bad_rows_end_the_run_by_name(
    command_of_diffusers: list[object], image_folder: Path, tmp_path: Path, check: str, processes: int
) -> None:
    folder = broken_folder(image_folder, tmp_path / "broken", 2)
    flags = ["--train_data_dir", folder, "--max_train_steps", 20, "--check_data", check, "--logging_steps", 1]
    done = launch(*command_of_diffusers, *flags, processes=processes)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "2 rows cannot be used, more than the 1 that may be skipped (--max_bad_rows)" in errors[0]
    # Each process names those that it met; one that speaks first may end the other before it speaks.
    assert f"{folder}/0.png" in errors[0] or f"{folder}/1.png" in errors[0]
    if processes == 1:
        assert_one_line_error(done, "1.png")
        assert (tmp_path / "out" / "metrics.jsonl").exists() == (check == "off"), "the check comes before training"


def test_an_empty_data_set_is_named(command_of_diffusers: list[object], tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"image": [], "text": []}).to_parquet(tmp_path / "none.parquet")
    assert_one_line_error(
        run_script(*command_of_diffusers, "--dataset_name", tmp_path / "none.parquet"), "--dataset_name"
    )


def test_a_model_in_pickles_is_refused(command_of_diffusers: list[object], tmp_path: Path) -> None:
    folder = build_tiny_pipeline(tmp_path / "pickled")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    done = run_script(*command_of_diffusers, "--pretrained_model_name_or_path", folder)
    assert_one_line_error(done, "cannot load unet")


def test_a_diverged_run_stops_and_says_so(command_of_diffusers: list[object]) -> None:
    done = run_script(*command_of_diffusers, "--optimizer", "sgd", "--learning_rate", 1e38, "--max_train_steps", 20)
    assert done.returncode == 3
    assert "lower --learning_rate" in done.stderr.splitlines()[-1]
