"""Pushing to and reading from a Hub, in the real script, against a loopback server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from loopback_hub import LoopbackHub

TOKEN = "hf_secretsecretsecretsecretsecret"


def run_against(
    hub: LoopbackHub, home: Path, *flags: object, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "ACCELERATE"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    if token:
        environment["HF_TOKEN"] = token
    command = [str(part) for part in (sys.executable, ROOT / "train_text_to_image.py", *flags)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def flags(tiny_pipeline: Path, image_folder: Path, tmp_path: Path) -> list[object]:
    return [
        "--pretrained_model_name_or_path", tiny_pipeline, "--train_data_dir", image_folder, "--resolution", 32,
        "--train_batch_size", 2, "--max_train_steps", 2, "--checkpointing_steps", 2, "--seed", 0,
        "--output_dir", tmp_path / "out",
    ]  # fmt: skip


def test_a_model_is_pushed_and_trained_on_from_the_hub(flags: list[object], tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        pushed = run_against(
            hub, tmp_path / "home", *flags, "--push_to_hub", "--hub_model_id", "tester/discs",
            "--validation_prompts", "disc number 1",
        )  # fmt: skip
        assert pushed.returncode == 0, pushed.stderr
        assert "pushed " in pushed.stdout
        files = hub.files["tester/discs"]
        assert {"model_index.json", "README.md", "samples.png", "unet/diffusion_pytorch_model.safetensors"} <= set(
            files
        )
        parts = ("unet/", "vae/", "text_encoder/", "tokenizer/", "scheduler/")
        allowed = ("model_index.json", "README.md", "recipe.yaml", "samples.png", *parts)
        assert [name for name in files if not name.startswith(allowed)] == []
        assert b"pipeline_tag: text-to-image" in files["README.md"]

        written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        holding = [str(path) for path in written if TOKEN.encode() in path.read_bytes()]
        assert holding + [name for name, content in files.items() if TOKEN.encode() in content] == []

        flags[1] = "tester/discs"
        again = run_against(
            hub, tmp_path / "other_home", *flags, "--output_dir", tmp_path / "again", "--cache_dir", tmp_path / "cache"
        )
        assert again.returncode == 0, again.stderr
        assert (tmp_path / "again" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_failed_push_keeps_the_model_and_says_how_to_push(flags: list[object], tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        hub.failures = 99
        done = run_against(hub, tmp_path / "home", *flags, "--push_to_hub", "--hub_model_id", "tester/discs")
    assert done.returncode == 4
    assert f"hf upload tester/discs {tmp_path / 'out'}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_no_rights_show_before_training(flags: list[object], tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        pass  # closed: nobody answers
    done = run_against(hub, tmp_path / "home", *flags, "--push_to_hub", "--hub_model_id", "tester/discs")
    assert done.returncode == 2
    assert "--push_to_hub: cannot create tester/discs" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "unet").exists()
