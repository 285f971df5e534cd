"""`sd-recipes cache` as a user runs it: killed, on two processes, pushed to the Hub and streamed from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from conftest import ROOT
from loopback_hub import LoopbackHub
from test_hub import run_against
from test_script import environment
from tiny_models import build_image_folder

from sd_recipes.commands.cache import fill_cache
from sd_recipes.errors import RecipeError
from sd_recipes.flags import load_recipe


def command(*flags: object, processes: int = 1) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
    launcher = [*torchrun, "--nproc_per_node", processes, "-m"] if processes > 1 else [sys.executable, "-m"]
    return [str(part) for part in [*launcher, "sd_recipes.commands.cli", "cache", "--device", "cpu", *flags]]


def fill(*flags: object, processes: int = 1, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*flags, processes=processes), env=environment(**extra), cwd=ROOT, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip


def flags_for(pipeline: Path, pictures: Path, output_dir: Path) -> list[object]:
    return [
        "--pretrained_model_name_or_path", pipeline, "--train_data_dir", pictures, "--resolution", 32, "--center_crop",
        "--train_batch_size", 4, "--output_dir", output_dir,
    ]  # fmt: skip


def cached_captions(output_dir: Path) -> list[str]:
    files = [str(path) for path in (output_dir / "latents").glob("*/*.arrow")]
    return sorted(datasets.load_dataset("arrow", data_files=files, split="train")["text"][:]) if files else []


@pytest.mark.slow
def test_a_killed_fill_goes_on_where_its_files_end(tiny_pipeline: Path, tmp_path: Path) -> None:
    """4,100 rows are two files and a rest: killed once the first is there."""
    pictures = build_image_folder(tmp_path / "pictures", 4100, (8, 8))
    flags = [*flags_for(tiny_pipeline, pictures, tmp_path / "out"), "--train_batch_size", 50, "--check_data", "off"]
    killed = subprocess.Popen(command(*flags), env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
    while not cached_captions(tmp_path / "out"):
        assert killed.poll() is None, "it must not end before it is killed"
        time.sleep(0.1)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    first = cached_captions(tmp_path / "out")
    assert 0 < len(first) < 4100
    done = fill(*flags)
    assert done.returncode == 0, done.stderr
    assert cached_captions(tmp_path / "out") == sorted(f"disc number {number}" for number in range(4100))


@pytest.mark.slow
def test_two_processes_fill_it_together(tiny_pipeline: Path, image_folder: Path, tmp_path: Path) -> None:
    done = fill(*flags_for(tiny_pipeline, image_folder, tmp_path / "out"), "--train_batch_size", 1, processes=2)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").rglob("*.arrow"))) == 2, "one file by each process"
    assert cached_captions(tmp_path / "out") == sorted(f"disc number {number}" for number in range(8))


@pytest.mark.slow
def test_it_is_pushed_to_the_hub_and_trained_on_from_there(
    tiny_pipeline: Path, image_folder: Path, tmp_path: Path
) -> None:
    flags = flags_for(tiny_pipeline, image_folder, tmp_path / "out")
    with LoopbackHub() as hub:
        home = hub.environment(tmp_path / "home") | {"HF_TOKEN": "hf_" + "x" * 30, "HF_HUB_OFFLINE": "0"}
        done = fill(*flags, "--push_to_hub", "--hub_model_id", "tester/latents", **home)
        assert done.returncode == 0, done.stderr
        assert {Path(name).suffix for name in hub.data_sets["tester/latents"].files()} == {".arrow", ".json", ".md"}
        place = flags.index("--train_data_dir")
        for streaming in ("--streaming", "--no-streaming"):
            done = run_against(
                hub, tmp_path / "home", *flags[:place], *flags[place + 2 :], "--dataset_name", "tester/latents",
                "--max_train_steps", 3, "--device", "cpu", "--report_to", "none", streaming,
                "--output_dir", tmp_path / streaming,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert json.loads((tmp_path / streaming / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3


def test_its_mistakes_are_one_line(tiny_pipeline: Path, image_folder: Path, tmp_path: Path) -> None:
    flags = flags_for(tiny_pipeline, image_folder, tmp_path / "out")
    done = fill(*flags, "--train_data_dir", "absent")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "no such file or folder" in done.stderr.splitlines()[-1]
    for extra, words in (
        (["--streaming", "--max_train_steps", 1], "drop --streaming"),
        (["--no-center_crop"], "the crop would be random: add --center_crop"),
        (["--cache_latents", "memory"], "drop --cache_latents memory"),
    ):
        with pytest.raises(RecipeError, match=words):
            fill_cache(load_recipe([str(flag) for flag in [*flags, *extra]]))


def test_defect_32_a_dry_run_fills_no_cache(tiny_pipeline: Path, image_folder: Path, tmp_path: Path) -> None:
    flags = flags_for(tiny_pipeline, image_folder, tmp_path / "out")
    with pytest.raises(RecipeError, match="has no dry run: drop --dry_run"):
        fill_cache(load_recipe([str(flag) for flag in [*flags, "--device", "cpu", "--dry_run"]]))
    assert not (tmp_path / "out").exists()
