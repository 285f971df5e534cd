"""A Hub that cannot be reached, or must not be asked, is said at once and once, as what it is; caches too."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from huggingface_hub import constants
from launching import flags_of
from loopback_hub import LoopbackHub, Refuse
from test_script import environment

from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe
from sd_recipes.runtime import hub_access
from sd_recipes.runtime.hub_access import check_hub_access

CLOSED = "http://127.0.0.1:9"
MODEL = {"pretrained_model_name_or_path": "someone/discs"}


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_")) or name.lower().endswith("proxy")
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)


def told(settings: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(RecipeError) as error:
        check_hub_access(Recipe(**{**settings, **changes}))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_hub_that_refuses(settings: dict[str, Any]) -> None:
    began = time.monotonic()
    words = told(settings, **MODEL)
    assert time.monotonic() - began < 5
    assert words.startswith(f"the Hub at {CLOSED} cannot be reached (")
    assert "--pretrained_model_name_or_path someone/discs is no folder here and not in the cache" in words
    assert words.endswith(": check the network, or give a folder of this machine")


def test_the_variables_that_decided_are_named(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    words = told(settings, **MODEL)
    assert f"the Hub at {CLOSED}, which HF_ENDPOINT names, cannot be reached" in words
    assert "check HF_ENDPOINT and the network and the proxy in HTTPS_PROXY" in words


@pytest.mark.parametrize("endpoint", ["http://no-such-host.invalid", "not an address", "http://127.0.0.1:99999"])
def test_an_endpoint_that_is_none(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert f"the Hub at {endpoint} cannot be reached (" in told(settings, **MODEL)


def test_a_hub_that_does_not_answer(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(hub_access, "SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "timed out" in told(settings, **MODEL)


def test_a_hub_that_is_out_of_order_or_well(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        check_hub_access(Recipe(**{**settings, **MODEL}))
        assert len(hub.requests) == 1
        hub.failures = lambda request: Refuse(503)
        assert "is out of order (it answers 503)" in told(settings, **MODEL)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = told(settings, **MODEL)
    assert f"and {variable} keeps this run offline: unset it, or first fetch it" in words
    assert "`hf download someone/discs`" in words
    data = told(settings, train_data_dir=None, dataset_name="someone/pictures")
    assert "--dataset_name someone/pictures is no file or folder here" in data
    assert "`hf download someone/pictures --repo-type dataset`" in data


@pytest.mark.parametrize("cache_dir", [None, "own"])
def test_what_is_in_the_cache_needs_no_hub(settings: dict[str, Any], tmp_path: Path, cache_dir: str | None) -> None:
    hub = tmp_path / (cache_dir or "home/hub")
    (hub / "models--someone--discs" / "snapshots" / ("0" * 40)).mkdir(parents=True)
    rows = tmp_path / (cache_dir or "home/datasets")
    (rows / "someone___pictures" / "default").mkdir(parents=True)
    changes = {**MODEL, "train_data_dir": None, "dataset_name": "someone/pictures"}
    check_hub_access(Recipe(**{**settings, **changes, "cache_dir": cache_dir and str(tmp_path / cache_dir)}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pretrained_model_name_or_path": "sd-recipes/tiny-emoji"},
        {"pretrained_model_name_or_path": "./absent"},
        {"pretrained_model_name_or_path": "/absent/model"},
        {"train_data_dir": None, "dataset_name": "sd-recipes/emoji"},
        {"dataset_name": "imagefolder"},
        {"train_data_dir": None, "dataset_name": "data/*.parquet"},
        {"train_data_dir": None, "dataset_name": "https://host.test/rows.parquet"},
    ],
)
def test_what_is_no_repository_is_not_asked_for(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    check_hub_access(Recipe(**{**settings, **changes}))


@pytest.mark.parametrize("variable", ["HF_DATASETS_CACHE", "HF_HOME", "--cache_dir"])
def test_a_cache_that_cannot_be_made(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    (tmp_path / "file").write_text("")
    changes: dict[str, Any] = {"train_data_dir": None, "dataset_name": "sd-recipes/emoji"}
    if variable == "--cache_dir":
        changes["cache_dir"] = str(tmp_path / "file" / "x")
    else:
        monkeypatch.setenv(variable, str(tmp_path / "file" / "x"))
    words = told(settings, **changes)
    assert words.startswith(f"the cache {tmp_path / 'file' / 'x'}")
    assert f"({variable}) cannot be written (Not a directory): choose another folder with {variable}" in words
    check_hub_access(Recipe(**settings))  # which needs none


def test_a_command_says_it_at_once_and_once(settings: dict[str, Any], tmp_path: Path) -> None:
    flags = flags_of({**settings, **MODEL})
    kept = {name: value for name, value in environment().items() if not name.startswith("HF_")}
    began = time.monotonic()
    done = subprocess.run(
        [str(part) for part in (sys.executable, ROOT / "train_text_to_image.py", *flags)],
        env={**kept, "HF_ENDPOINT": CLOSED, "HF_HOME": str(tmp_path / "home")},
        cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: the Hub at {CLOSED}, which HF_ENDPOINT names, cannot be reached")
    assert time.monotonic() - began < 20, "before torch is imported"
