"""What a run writes beside its checkpoints, on a disk that is full or read-only."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from training_runs import train

from sd_recipes.checkpoints.run_folder import output_dir_lock
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_defect_28_half_a_picture_does_not_stay(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the next start it would count as this step's picture, and at the end stand in the report."""

    def save(picture: Image.Image, path: Path, kind: str | None = None, **_: Any) -> None:
        Path(path).write_bytes(b"\x89PNG half")
        no_room()

    monkeypatch.setattr(Image.Image, "save", save)
    run = train(settings, validation_prompts=["a disc"], validation_steps=2, validation_inference_steps=1)
    assert "No space left on device" in caplog.text
    assert list((run.tracker.path.parent / "samples").iterdir()) == []
    assert run.tracker.path.read_text().count("train_loss") == 4, "training went on"


def test_defect_28_no_room_for_the_owners_name_is_no_reason_to_end(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd_recipes.runtime.output_dir.replace_file", no_room)
    recipe = Recipe(**settings)
    in_use = pytest.raises(RecipeError, match="in use by another run")
    with output_dir_lock(recipe, is_main=True), in_use, output_dir_lock(recipe, is_main=True):
        pass


def test_defect_28_no_room_for_the_recipe_is_told_in_one_line(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd_recipes.runtime.trackers.replace_file", no_room)
    with pytest.raises(RecipeError, match=r"--output_dir .* cannot be written .*No space left on device.*make room"):
        train(settings)
