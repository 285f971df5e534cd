"""Training from streams with the real script: from a loopback Hub that fails on schedule, resumed, on two processes."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from loopback_hub import Cut, Failure, LoopbackHub, Refuse, Request, outage
from safetensors.torch import load_file
from test_hub import run_against
from test_script import launch

from sd_recipes.training.build_parts import UNET_WEIGHTS


def shards(image_folder: Path) -> dict[str, bytes]:
    """The eight pictures in four parquet files of different lengths."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(image_folder))["train"]
    files = {}
    for number, (first, last) in enumerate(((0, 3), (3, 4), (4, 6), (6, 8))):
        content = io.BytesIO()
        rows.select(range(first, last)).to_parquet(content)
        files[f"data/train-{number:05d}-of-00004.parquet"] = content.getvalue()
    return files


@pytest.fixture
def flags(tiny_pipeline: Path) -> list[object]:
    return [
        "--pretrained_model_name_or_path", tiny_pipeline, "--resolution", 32, "--train_batch_size", 2, "--seed", 3,
        "--max_train_steps", 9, "--lr_warmup_steps", 0, "--learning_rate", 1e-3, "--report_to", "none", "--random_flip",
        "--streaming", "--shuffle_block", 3,
    ]  # fmt: skip


@pytest.fixture
def local(image_folder: Path, tmp_path: Path) -> Path:
    """The shards as files."""
    for name, content in shards(image_folder).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path / "data" / "*.parquet"


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / UNET_WEIGHTS)


def assert_same(one: Path, other: Path) -> None:
    first, second = trained(one), trained(other)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def breaks_now_and_then() -> Callable[[Request], Failure | None]:
    """Every file GET in turn: served, connection reset in mid-shard, served, shard cut short, served, 503."""
    failures = [None, Cut(after=400), None, Cut(after=700, reset=False), None, Refuse(503)]
    number = 0

    def failure(request: Request) -> Failure | None:
        nonlocal number
        if not request.is_file_get or not (request.file or "").endswith(".parquet"):
            return None
        number += 1
        return failures[number % len(failures)]

    return failure


# Short breaks are survived by the Hub's client; a long one kills its stream, which is then opened anew.
@pytest.mark.parametrize(
    ("failures", "warned"),
    [
        pytest.param(lambda: outage(503, seconds=40, after=14), True, id="40 seconds of 503", marks=pytest.mark.slow),
        pytest.param(breaks_now_and_then, False, id="dropped and cut short", marks=pytest.mark.slow),
        pytest.param(lambda: outage(502, seconds=120, after=14), True, id="two minutes of 502", marks=pytest.mark.slow),
    ],
)
def test_a_stream_with_failures_trains_to_the_same_weights(
    flags: list[object], local: Path, image_folder: Path, tmp_path: Path, failures: Callable, warned: bool
) -> None:
    done = launch(*flags, "--dataset_name", local, "--output_dir", tmp_path / "local")
    assert done.returncode == 0, done.stderr
    with LoopbackHub() as hub:
        hub.data_sets["someone/pictures"].commit(shards(image_folder))
        hub.failures = failures()
        done = run_against(
            hub, tmp_path / "home", *flags, "--device", "cpu", "--dataset_name", "someone/pictures", "--output_dir",
            tmp_path / "streamed",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [request for request in hub.requests if (request.status or 0) >= 500], "it did fail"
    assert warned == ("trying again in" in done.stderr)
    assert_same(tmp_path / "local", tmp_path / "streamed")


@pytest.mark.slow
def test_a_file_at_a_web_address_is_streamed_through_its_failures(
    flags: list[object], image_folder: Path, tmp_path: Path
) -> None:
    name, content = max(shards(image_folder).items(), key=lambda shard: len(shard[1]))
    (tmp_path / "one.parquet").write_bytes(content)
    done = launch(*flags, "--dataset_name", tmp_path / "one.parquet", "--output_dir", tmp_path / "local")
    assert done.returncode == 0, done.stderr
    with LoopbackHub() as hub:  # a server of files like any other
        hub.data_sets["someone/pictures"].commit({name: content})
        hub.failures = outage(503, seconds=5, after=6)
        address = f"{hub.address}/datasets/someone/pictures/resolve/main/{name}"
        done = launch(*flags, "--dataset_name", address, "--output_dir", tmp_path / "streamed")
    assert done.returncode == 0, done.stderr
    assert [request for request in hub.requests if (request.status or 0) >= 500], "it did fail"
    assert_same(tmp_path / "local", tmp_path / "streamed")


@pytest.mark.slow
def test_a_stream_resumes_where_it_stood(flags: list[object], local: Path, tmp_path: Path) -> None:
    flags = [*flags, "--dataset_name", local, "--checkpointing_steps", 5, "--dataloader_num_workers", 1]
    done = launch(*flags, "--output_dir", tmp_path / "uninterrupted")
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "uninterrupted" / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
    done = launch(*flags, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "uninterrupted", tmp_path / "resumed")


@pytest.mark.slow
def test_two_processes_stream_every_row_once(flags: list[object], local: Path, tmp_path: Path) -> None:
    """With one row a process and step, an epoch of 8 rows is 4 steps, and the bad row of two epochs is named once."""
    content = datasets.load_dataset("parquet", data_files=str(local), split="train")
    content = content.cast_column("image", datasets.Image(decode=False))
    broken = [
        row if row["text"] != "disc number 3" else row | {"image": {"bytes": b"no", "path": "3.png"}} for row in content
    ]
    for number, path in enumerate(sorted(local.parent.glob("*.parquet"))):
        part = broken[2 * number : 2 * number + 2]
        datasets.Dataset.from_list(part, features=content.features).to_parquet(path)
    done = launch(
        *flags, "--train_batch_size", 1, "--max_train_steps", 8, "--dataset_name", local, "--check_data", "off",
        "--logging_steps", 1, "--output_dir", tmp_path / "out", processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    named = [
        json.loads(line)["row"]
        for path in (tmp_path / "out").glob("bad_rows*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert set(named) == {"3.png"}
    assert len(named) <= 2, "once by each process, however often it is met"


def test_a_stream_needs_a_number_of_steps(flags: list[object], local: Path) -> None:
    place = flags.index("--max_train_steps")
    done = launch(*flags[:place], *flags[place + 2 :], "--dataset_name", local)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(
        "error: --streaming does not know the number of rows: give --max_train_steps"
    )
