"""What is asked of the checks that need a GPU, before they need one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(("shape", "part"), [("sd15", "row"), ("sdxl", "script"), ("sdxl", "validation")])
def test_a_part_that_is_not_there_is_refused(shape: str, part: str) -> None:
    environment = {**os.environ, "SHAPE": shape, "PYTHON": "false"}
    found = subprocess.run(
        ["bash", BENCHMARKS / "gpu_check.sh", "tests", part], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.startswith(f"error: {part} is no part of SHAPE={shape}: choose from rows ")


def test_rows_that_are_compiled_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from gpu_rows import ROWS

    compiled = ["--compile" in row for row in ROWS.values()]
    assert compiled == sorted(compiled)
    assert sum(compiled) == 4
