"""What no flag says was decided by someone, and messages say by whom."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from launching import ACCELERATE, flags_of
from test_script import environment
from training_runs import forget_accelerator

from sd_recipes.commands.train import run
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe
from sd_recipes.runtime import launcher
from sd_recipes.runtime.accelerator import start_accelerator

LAUNCH = ["python", "accelerate", "launch"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            [*LAUNCH, "--config_file", "my.yaml", "x.py"],
            "mixed_precision: fp16 of accelerate's configuration (my.yaml)",
        ),
        ([*LAUNCH, "--config_file=my.yaml"], "mixed_precision: fp16 of accelerate's configuration (my.yaml)"),
        ([*LAUNCH, "x.py"], "mixed_precision: fp16 of accelerate's configuration (/home/default_config.yaml)"),
        ([*LAUNCH, "--mixed_precision", "fp16", "x.py"], "`accelerate launch --mixed_precision fp16`"),
        (None, "ACCELERATE_MIXED_PRECISION=fp16 in the environment"),
    ],
)
def test_a_precision_that_does_not_go_is_blamed_on_who_chose_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, arguments: list[str] | None, words: str
) -> None:
    monkeypatch.setattr(launcher, "launcher_arguments", lambda: arguments)
    monkeypatch.setattr(launcher, "default_configuration", lambda: "/home/default_config.yaml")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    forget_accelerator()
    with pytest.raises(RecipeError) as error:
        start_accelerator(Recipe(**settings))
    assert str(error.value) == f"{words} needs a GPU: add --mixed_precision no to override it"
    with pytest.raises(RecipeError, match=r"^--mixed_precision fp16 needs a GPU"):
        start_accelerator(Recipe(**settings, mixed_precision="fp16"))


def test_a_precision_that_is_unknown_here(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "launcher_arguments", lambda: [*LAUNCH, "--config_file", "my.yaml"])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(RecipeError, match=r"mixed_precision: fp8 of .* \(my.yaml\) is not supported: add --mixed_prec"):
        start_accelerator(Recipe(**settings))


def test_the_launcher_is_found_with_its_configuration(settings: dict[str, Any], tmp_path: Path) -> None:
    content = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_processes": 1, "num_machines": 1,
        "machine_rank": 0, "mixed_precision": "fp16", "use_cpu": True,
    }  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(content), encoding="utf-8")
    command = [*ACCELERATE, "--config_file", tmp_path / "mine.json", ROOT / "train_text_to_image.py"]
    done = subprocess.run(
        [str(part) for part in [*command, *flags_of(settings)]],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert f"mixed_precision: fp16 of accelerate's configuration ({tmp_path / 'mine.json'}) needs a GPU" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("TVM", "the UNet cannot be compiled (backend='tvm' raised: ImportError: Please install apache-tvm"),
        ("OFI", "the UNet cannot be compiled (Invalid backend: 'ofi'"),
        (
            "no_such",
            "ACCELERATE_DYNAMO_BACKEND=no_such, or dynamo_backend of accelerate's configuration, is not one of",
        ),
    ],
)
def test_a_compiler_that_does_not_go_is_blamed_on_who_chose_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, backend: str, words: str
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    forget_accelerator()
    with pytest.raises(RecipeError) as error:
        run(Recipe(**settings))
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)
    if backend != "no_such":
        place = "dynamo_backend to NO in accelerate's configuration, or ACCELERATE_DYNAMO_BACKEND=NO in the environment"
        assert str(error.value).endswith(f": set {place}")


def test_what_did_not_come_from_accelerates_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher.launcher_arguments() is None
    assert launcher.configuration() == "accelerate's configuration"
