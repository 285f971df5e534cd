"""A locale that is not UTF-8: files are UTF-8 all the same, names are found, and the console takes what it can."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from launching import flags_of
from test_script import environment

NO_UTF8 = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TEXT_CALLS = {"read_text", "write_text", "open", "fdopen"}


@pytest.fixture
def settings(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Names and captions in several scripts; one picture is broken, so that its name is told."""
    folder = tmp_path / "Bilder für 東京"
    folder.mkdir()
    lines = []
    for number, path in enumerate(sorted(Path(settings["train_data_dir"]).glob("*.png"))):
        name = f"Füße-{number}-東京.png"
        (folder / name).write_bytes(path.read_bytes() if number else b"broken")
        lines.append(json.dumps({"file_name": name, "text": "Türkiye 東京 🙂"}, ensure_ascii=False) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return settings | {
        "train_data_dir": str(folder), "output_dir": str(tmp_path / "Läufe"), "max_train_steps": 1, "max_bad_rows": 1,
        "caption_template": "ein Bild: {text} – schön", "train_batch_size": 1,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("console", ["", "ascii:strict"])
def test_a_run_where_the_locale_is_not_utf8(settings: dict[str, Any], tmp_path: Path, console: str) -> None:
    command = [sys.executable, ROOT / "train_text_to_image.py", *flags_of(settings), "--device", "cpu"]
    done = subprocess.run(
        [os.fsencode(str(part)) for part in command],
        env=environment(**NO_UTF8, **({"PYTHONIOENCODING": console} if console else {})),
        cwd=ROOT, capture_output=True, timeout=200,
    )  # fmt: skip
    told = done.stderr.decode()
    assert done.returncode == 0, told
    name = "Füße-0-東京.png"
    assert (name if not console else name.encode("ascii", "backslashreplace").decode()) in told
    out = tmp_path / "Läufe"
    recipe = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["caption_template"] == settings["caption_template"]
    assert name in (out / "bad_rows.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [["train", "--help"], ["train", "--resolution", "ü"], ["schema"]])
def test_a_console_without_letters_shows_help_and_mistakes(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sd_recipes.commands.cli", *command],
        env=environment(**NO_UTF8, PYTHONIOENCODING="ascii:strict"), cwd=ROOT, capture_output=True, timeout=60,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr
    assert done.returncode == (2 if "--resolution" in command else 0)


def test_a_notebook_is_not_started_again_but_told(settings: dict[str, Any]) -> None:
    code = "import sys, train_text_to_image as t; print('once'); t.main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, flags_of(settings | {"train_data_dir": "nowhere"}))],
        env=environment(**NO_UTF8), cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stdout.count("once") == 1
    assert "File names are read as ascii here" in done.stderr
    assert "start Python with PYTHONUTF8=1" in done.stderr


def test_every_text_file_is_opened_with_its_encoding() -> None:
    """What a locale decides differs between the machine that writes a file and the one that reads it."""
    silent = []
    for path in [*(ROOT / "sd_recipes").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            if name not in TEXT_CALLS or owner in ("os", "Image", "fsspec", "tarfile") or owner.startswith("_Opening("):
                continue
            modes = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            is_binary = name == "open" and any("b" in mode for mode in modes if set(mode) <= set("rwaxb+t"))
            if not is_binary and not any(keyword.arg == "encoding" for keyword in node.keywords):
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)[:60]}")
    # reading.py's own function of that name decodes as UTF-8.
    assert [each for each in silent if "read_text(" not in each or ".read_text(" in each] == []
