"""Errors in the data, met with loader workers and by one process of several: the run ends, and says why."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from launching import finish, flags_of, start, torchrun
from PIL import Image
from test_script import run_script
from tiny_models import build_image_folder

ENDS_WITHIN = 60  # seconds; what hangs does so for ever


def run_ended(settings: dict[str, Any], **changes: Any) -> subprocess.CompletedProcess[str]:
    flags = flags_of(settings | {"check_data": "off", "dataloader_num_workers": 1} | changes)
    return run_script(*flags, "--device", "cpu", timeout=ENDS_WITHIN)


def test_a_blank_caption_that_is_an_error_ends_the_workers_too(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = build_image_folder(tmp_path / "pictures")
    metadata = (folder / "metadata.jsonl").read_text().replace("disc number 3", "")
    (folder / "metadata.jsonl").write_text(metadata)
    done = run_ended(settings, train_data_dir=folder, blank_captions="error", max_train_steps=100)
    assert done.returncode == 2
    assert "3.png): no caption: blank or missing in text" in done.stderr.splitlines()[-1]


def test_a_damaged_local_shard_is_no_outage(settings: dict[str, Any], tmp_path: Path) -> None:
    """It is told at once, with the row, although streams wait for those that may come back."""
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(40):
            for suffix, content in (("png", picture.getvalue()), ("txt", b"a disc")):
                member = tarfile.TarInfo(f"{number:02d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[: len(content) * 2 // 3 + 700])
    data = {"dataset_name": tmp_path / "*.tar", "image_column": "png", "caption_column": "txt", "streaming": True}
    del settings["train_data_dir"]
    done = run_ended(settings | data, max_train_steps=50)
    assert done.returncode == 5, done.stderr
    assert ": the file is damaged" in done.stderr.splitlines()[-1]
    assert "shard 0 at row" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_bad_rows_of_two_processes_are_counted_once(settings: dict[str, Any], tmp_path: Path) -> None:
    """Over epochs both meet all of them; every one is told by the process that met it."""
    folder = build_image_folder(tmp_path / "pictures")
    for number in (2, 5):
        (folder / f"{number}.png").write_bytes(b"no picture")
    settings |= {
        "train_data_dir": folder, "train_batch_size": 2, "max_train_steps": 12, "check_data": "off", "logging_steps": 3,
    }  # fmt: skip
    out = tmp_path / "out"
    output = finish(start(torchrun(2), *flags_of(settings | {"max_bad_rows": 2, "output_dir": out})))
    told = [[json.loads(line)["row"] for line in path.read_text().splitlines()] for path in out.glob("bad_rows*.jsonl")]
    assert sum(map(len, told)) > 2, "by both, so that counts could be wrong"
    assert output.count("Skipped row ") == sum(map(len, told))
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["bad_rows"] == 2
    shutil.rmtree(out)
    process = start(torchrun(2), *flags_of(settings | {"max_bad_rows": 1, "output_dir": out}))
    output, _ = process.communicate(timeout=ENDS_WITHIN)
    assert process.returncode != 0
    assert "2 rows cannot be used, more than the 1 that may be skipped (--max_bad_rows)" in output
    assert "RuntimeError" not in output, "what another process says when its peer has gone"


@pytest.mark.parametrize("name", ["metadata.csv"])
def test_line_breaks_in_a_large_table_of_captions(settings: dict[str, Any], tmp_path: Path, name: str) -> None:
    import csv

    from sd_recipes.data.rows import load_rows
    from sd_recipes.recipe import Recipe

    folder = tmp_path / "pictures"
    folder.mkdir()
    captions = [f"first line {number}\nsecond line, with a comma and " + "x" * 100 for number in range(12_000)]
    with (folder / name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("file_name", "text"), *((f"{number}.png", text) for number, text in enumerate(captions))])
    assert (folder / name).stat().st_size > 1_100_000
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    rows = load_rows(Recipe(**settings | {"train_data_dir": str(folder)}))
    assert rows["text"][:] == captions
