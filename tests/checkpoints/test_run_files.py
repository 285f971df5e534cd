"""What stands beside a run: its figures and pictures, torn, strange, or the person's own."""

from __future__ import annotations

import errno
import json
import os
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from test_resume import figures, run_it
from training_runs import train

from sd_recipes.errors import RecipeError
from sd_recipes.export.report import write_report
from sd_recipes.runtime.trackers import list_samples, read_metrics

TORN = ['{"step": 2, "tr', '{"step": 2, "tr}', "[1, 2]", '{"train_loss": 1.0}', '{"step": "2"}', "\0\0}", "[" * 10**4]


def test_defect_27_torn_lines_of_the_metrics_do_not_block_a_resume(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    train(settings, max_train_steps=2)
    first, second = path.read_text().splitlines()
    path.write_text("\n".join([first, *TORN, second, '{"step": 3, "train']))
    train(settings, resume_from_checkpoint="latest")
    assert caplog.text.count(f"{path}: dropped 8 torn or malformed lines: 2, 3, 4, 5, 6 and more") == 1
    assert [line["step"] for line in figures(tmp_path / "run")] == [1, 2, 3, 4]
    (curve,) = write_report(tmp_path / "run")
    assert curve == f"loss curve      {tmp_path / 'run' / 'loss_curve.png'}"


def test_defect_27_the_line_after_a_torn_one_is_not_lost(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full in the middle of the second step's line, and has room again for the third's."""
    opened = Path.open

    class Full:
        def __init__(self, file: TextIOWrapper) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, text: str) -> None:
            if '"step": 2' in text:
                self.file.write(text[: len(text) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(text)

    def open_full(path: Path, mode: str = "r", **options: Any) -> Any:
        file = opened(path, mode, **options)
        return Full(file) if mode == "a" and path.name == "metrics.jsonl" else file

    monkeypatch.setattr(Path, "open", open_full)
    train(settings)
    monkeypatch.undo()
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 3, 4]


def test_defect_27_pictures_of_the_persons_own_are_left_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    """By a resume, by --overwrite and by the report."""
    samples = tmp_path / "run" / "samples"
    settings |= {"validation_prompts": ["a disc"], "validation_steps": 2, "validation_inference_steps": 1}
    run_it(settings, max_train_steps=2, validate_before_training=True)
    drawn = (samples / "step-000002.png").read_bytes()
    own = {"step-best.png": b"mine", "step-9.png": drawn, "step-١٢٣٤٥٦.png": b"mine", "notes.txt": b"mine"}
    for name, content in own.items():
        (samples / name).write_bytes(content)
    (samples / "step-000099.png").write_bytes(drawn)  # of steps that were not saved
    run_it(settings)
    assert [path.name for path in list_samples(tmp_path / "run")] == [f"step-00000{n}.png" for n in (0, 2, 4)]
    assert (tmp_path / "run" / "samples.png").read_bytes() == (samples / "step-000004.png").read_bytes()
    run_it(settings, overwrite=True, max_train_steps=2)
    assert [path.name for path in list_samples(tmp_path / "run")] == ["step-000002.png"]
    assert {name: (samples / name).read_bytes() for name in own} == own


def test_defect_27_a_torn_picture_is_told_and_costs_no_pipeline(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings |= {"validation_prompts": ["a disc"], "validation_steps": 2, "validation_inference_steps": 1}
    run_it(settings, max_train_steps=2, validate_before_training=True)
    os.truncate(tmp_path / "run" / "samples" / "step-000000.png", 100)
    run_it(settings)
    assert "No before_after.png: a picture in" in caplog.text


STRANGE = {
    "a link to an endless file": lambda path: path.symlink_to("/dev/zero"),
    "a FIFO": os.mkfifo,
    "a folder": Path.mkdir,
}


@pytest.mark.usefixtures("seconds")
@pytest.mark.parametrize("kind", STRANGE)
def test_defect_30_metrics_that_are_no_file_are_named(settings: dict[str, Any], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    train(settings, max_train_steps=1)
    path.unlink()
    STRANGE[kind](path)
    with pytest.raises(RecipeError, match=r"metrics\.jsonl is not a regular file: remove it, or choose another"):
        train(settings, resume_from_checkpoint="latest")


@pytest.mark.usefixtures("seconds")
@pytest.mark.parametrize("kind", STRANGE)
def test_defect_30_a_folder_whose_recipe_is_no_file_is_no_runs(
    settings: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    (tmp_path / "run").mkdir()
    STRANGE[kind](tmp_path / "run" / "recipe.yaml")
    with pytest.raises(RecipeError, match=r"holds no run of this program, but 'recipe\.yaml'"):
        run_it(settings)


@pytest.mark.usefixtures("seconds")
def test_defect_30_an_owner_that_is_no_file_is_nobody(settings: dict[str, Any], tmp_path: Path) -> None:
    """Nor is anything written through a link that stands in its place."""
    out, others = tmp_path / "run", tmp_path / "others"
    others.write_text("theirs")
    run_it(settings, max_train_steps=1)
    for name in (".owner.json", ".metrics.jsonl", ".recipe.yaml"):
        (out / name).symlink_to(others)
    run_it(settings, max_train_steps=2)
    assert others.read_text() == "theirs"
    os.mkfifo(out / ".owner.json")
    run_it(settings, max_train_steps=3)
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
