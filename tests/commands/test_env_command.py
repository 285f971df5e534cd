"""`sd-recipes env`: pasteable, without secrets, and without what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import default_json_config_file, default_yaml_config_file
from conftest import ROOT
from test_script import environment

from sd_recipes.commands import env
from sd_recipes.runtime import launcher

SECRET = "hf_" + "opensesame" * 3


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    env.main([])
    lines = capsys.readouterr().out.splitlines()
    return {line[:17].strip(): line[17:] for line in lines}


def test_what_it_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(
        f"mixed_precision: fp16\nmain_process_ip: 10.0.0.1\nhub_token: {SECRET}\n", encoding="utf-8"
    )
    found = printed(capsys)
    assert "torch " in found["packages"]
    assert found["missing"] == "nothing that is needed"
    assert "bitsandbytes" in found["optional"]
    assert " cores" in found["CPU"]
    assert " GB free of " in found["memory"]
    assert " GB free of " in found["disk, caches"]
    assert str(tmp_path) in found["disk, caches"]
    assert f"{tmp_path}/accelerate/default_config.yaml: mixed_precision: fp16, main_process_ip" in found["accelerate"]
    assert found["GPU"]


def test_no_secret_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HUGGINGFACE_HUB_TOKEN", SECRET)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:opensesame@proxy.test:8080")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:opensesame@mirror.test")
    monkeypatch.setenv("WANDB_API_KEY", "opensesame")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "opensesame")
    env.main([])
    out = capsys.readouterr().out
    assert "opensesame" not in out
    assert "HF_TOKEN=[left-out]" in out
    assert "logged in by HF_TOKEN" in out
    assert "HTTPS_PROXY=http://[left-out]@proxy.test:8080" in out


def test_what_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": "2.9.1+cu128", "numpy": "2.10.0"}
    needed = ["torch>=2.10", "diffusers>=0.42", "numpy>=2.0", "filelock", "bitsandbytes>=0.50; extra == 'bitsandbytes'"]
    monkeypatch.setattr(env.importlib.metadata, "requires", lambda name: needed)
    monkeypatch.setattr(env, "version", there.get)
    assert env.missing() == [
        "torch 2.9.1+cu128 is older than 2.10", "diffusers is not installed", "filelock is not installed",
    ]  # fmt: skip


def test_it_runs_on_python_alone() -> None:
    """Where nothing is installed, and in no checkout."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from sd_recipes.commands.env import main; main([])"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], env=environment(), cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "sd-recipes is not installed itself" in done.stdout
    assert "unknown without torch" in done.stdout


def test_it_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sd_recipes.commands.cli", "env"],
        env=environment(), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sd-recipes")


def test_accelerates_configuration_is_looked_for_where_accelerate_keeps_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    places = {Path(default_yaml_config_file), Path(default_json_config_file)}
    assert {place.parent for place in places} == {launcher.hf_home() / "accelerate"}
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert launcher.default_configuration() is None
    (tmp_path / "accelerate").mkdir()
    file = tmp_path / "accelerate" / next(iter(places)).name
    file.write_text("{}", encoding="utf-8")
    assert launcher.default_configuration() == str(file)
