"""The record of bad rows: over the parts of a run, cut short, and on a full disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_runs import train

from sd_recipes.data.bad_rows import BadRows, TooManyBadRows
from sd_recipes.model.stable_diffusion import StableDiffusion


def names(path: Path) -> list[str]:
    return [json.loads(line)["row"] for line in path.read_text().splitlines()]


@pytest.fixture
def broken(settings: dict[str, Any], image_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A run that ended because rows 0 and 1 are bad, the second as one of two processes met it."""
    folder = tmp_path / "broken"
    shutil.copytree(image_folder, folder)
    for number in (0, 1):
        (folder / f"{number}.png").write_bytes(b"no picture")
    settings |= {"train_data_dir": str(folder), "max_bad_rows": 1, "check_data": "off", "checkpointing_steps": 1}
    with pytest.raises(TooManyBadRows):
        train(settings, max_train_steps=2)
    record = Path(settings["output_dir"]) / "bad_rows.jsonl"
    first, second = record.read_text().splitlines()
    record.write_text(first + "\n")
    record.with_name("bad_rows.1.jsonl").write_text(second + "\n")
    return settings | {"resume_from_checkpoint": "latest"}


def test_defect_3_a_run_goes_on_when_its_rows_were_repaired(
    broken: dict[str, Any], image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(image_folder / "0.png", broken["train_data_dir"])
    caplog.clear()
    run = train(broken, max_train_steps=4)
    assert [Path(name.rstrip(")")).name for name in run.data.bad_rows.reasons] == ["1.png"]
    records = sorted(Path(broken["output_dir"]).glob("bad_rows*.jsonl"))
    left = [name for path in records for name in names(path)]
    assert left, "the record still names the row that is bad"
    assert {Path(name.rstrip(")")).name for name in left} == {"1.png"}, "and no other"
    metrics = [json.loads(line) for line in run.tracker.path.read_text().splitlines()]
    assert metrics[-1]["bad_rows"] == 1


def test_defect_3_rows_that_are_still_bad_end_the_run_before_a_model_is_loaded(
    broken: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(TooManyBadRows, match="2 rows cannot be used, more than the 1"):
        train(broken)


def test_defect_3_of_a_stream_only_rows_that_are_met_again_count(tmp_path: Path) -> None:
    """Its rows cannot be asked for by number."""
    earlier = BadRows(tmp_path, 1, None, rank=0)
    with pytest.raises(TooManyBadRows):
        earlier.add((("a.png", "empty"), ("b.png", "empty")), 8)
    later = BadRows(tmp_path, 1, None, rank=0)
    later.add((("b.png", "empty"),), 16)
    assert len(later) == 1
    assert names(tmp_path / "bad_rows.jsonl") == ["a.png", "b.png"], "each once"
    with pytest.raises(TooManyBadRows):
        later.add((("c.png", "empty"),), 16)


def test_defect_3_a_full_disk_is_told_once_and_rows_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = tmp_path / "bad_rows.jsonl"
    record.symlink_to("/dev/full")
    rows = BadRows(tmp_path, 2, 100, rank=0)
    rows.add((("row 1", "empty"),), 0)
    rows.add((("row 2", "empty"),), 0)
    assert len(rows) == 2
    assert caplog.text.count("No space left on device") == 1
    record.unlink()  # there is room again
    with pytest.raises(TooManyBadRows):
        rows.add((("row 3", "empty"),), 0)
    assert names(record) == ["row 1", "row 2", "row 3"]


@pytest.mark.parametrize("torn", ['{"row": "row 2 (a', '{"row": "ro\nnull\n\0\0', "\udcff"])
def test_defect_27_a_line_of_bad_rows_cut_short_is_left_out_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, torn: str
) -> None:
    path = tmp_path / "bad_rows.jsonl"
    path.write_bytes(b'{"row": "row 1", "reason": "empty\xe2\x80\xa8"}\n' + torn.encode(errors="surrogateescape"))
    rows = BadRows(tmp_path, 3, 100, rank=0)
    assert rows.recorded() == {"row 1": "empty\u2028"}
    rows.add((("row 2", "truncated"),), 0)
    assert caplog.text.count("cannot be read and are left out") == 1
    assert BadRows(tmp_path, 3, 100, rank=0).recorded() == {"row 1": "empty\u2028", "row 2": "truncated"}
