"""What the documentation says is what the code does."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from launching import flags_of
from test_script import environment
from tiny_models import build_tiny_pipeline

from sd_recipes.flags import load_recipe
from sd_recipes.runtime.trackers import read_metrics

sys.path.insert(0, str(ROOT / "tools"))
from write_docs import pages

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "Makefile",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "train_text_to_image.py",
]


# Pages that name the script without a command to run it.
QUOTED_ONLY = {"docs/architecture.md", "docs/objective.md", "docs/from_diffusers.md", "docs/benchmarks/README.md"}


def test_the_generated_pages_are_fresh() -> None:
    for path, content in pages().items():
        assert path.read_text() == content, f"{path.name} is stale: make docs"


def command_lines(text: str) -> list[list[str]]:
    """The flags of every command that runs the script, also over several lines."""
    plain = re.sub(r'@echo "(.*)"', r"\1", text)
    joined = re.sub(r"\\+\n\s*", " ", plain)
    found = re.findall(r"(?:train_text_to_image\.py|\$\(LAUNCH\)) +(--[^\n`]*)", joined)
    return [shlex.split(line.split("#")[0]) for line in found]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_in_the_documentation_is_accepted(path: Path) -> None:
    assert (
        "train_text_to_image" not in path.read_text()
        or str(path.relative_to(ROOT)) in QUOTED_ONLY
        or command_lines(path.read_text())
    )
    for flags in command_lines(path.read_text()):
        if "--help" not in flags:
            load_recipe([flag for flag in flags if flag != "…"])


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.suffix == ".md"], ids=lambda path: path.name)
def test_links_and_paths_in_the_documentation_exist(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.slow
def test_the_example_of_another_objective_trains_with_it(image_folder: Path, tmp_path: Path) -> None:
    """As a script of one's own, outside the checkout; against the same script without its entry."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "objective.md").read_text(), re.DOTALL)
    (entry,) = re.findall(r"^WEIGHTS\[.*\n", example, re.MULTILINE)
    settings = {
        "pretrained_model_name_or_path": build_tiny_pipeline(tmp_path / "model", prediction_type="v_prediction"),
        "train_data_dir": image_folder, "resolution": 32, "train_batch_size": 4, "max_train_steps": 2, "snr_gamma": 1,
        "logging_steps": 1, "seed": 5, "report_to": "none",
    }  # fmt: skip
    curves = {}
    for name, source in (("with", example), ("without", example.replace(entry, ""))):
        script, output_dir = tmp_path / f"{name}.py", tmp_path / name
        script.write_text(source)
        flags = [str(flag) for flag in flags_of(settings | {"output_dir": output_dir})]
        done = subprocess.run(
            [sys.executable, str(script), "--device", "cpu", *flags],
            env=environment(PYTHONPATH=str(ROOT)), cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        curves[name] = [line["train_loss"] for line in read_metrics(output_dir / "metrics.jsonl")]
    assert len(curves["with"]) == len(curves["without"]) == 2
    # Of the same samples: the first loss is before any update, so that the weights of the timesteps alone differ.
    assert curves["with"][0] > curves["without"][0] > 0, "max(SNR, 1) is above min(SNR, 1)"
    assert curves["with"][1] != curves["without"][1]
