"""What the documentation says is what the code does."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from sd_recipes.flags import load_recipe

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
