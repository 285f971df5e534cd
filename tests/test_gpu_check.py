"""What is asked of the checks that need a GPU, before they need one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sd_recipes.flags import load_recipe

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


def test_rows_that_say_most_come_first_compiled_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from gpu_rows import ROWS

    compiled = [number for number, row in enumerate(ROWS.values()) if "--compile" in row]
    assert compiled[0] == 3, "after the same row as it is"
    assert len(compiled) == 4


def test_what_is_kept_is_read_in_the_second_half_of_a_rows_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from gpu_rows import ROWS, XL_ROWS, flags_of

    for rows, batch, pictures in ((ROWS, 8, 256), (XL_ROWS, 1, 64)):
        for name, row in rows.items():
            found = load_recipe(flags_of(Path("folder"), "cpu", 40, batch, row))
            at_once = found.train_batch_size * found.gradient_accumulation_steps
            assert found.cache_latents == "off" or found.max_train_steps // 2 >= pictures / at_once, name
            assert found.logging_steps >= 20, name
            assert found.validation_steps > found.max_train_steps, name
