import gc
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_image_folder, build_tiny_pipeline, build_tiny_xl_pipeline

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # tiny models only lose by a second thread


def pytest_collection_finish() -> None:
    """What is there before the first test stays: Python's search for garbage need not go over it a thousand times."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny-pipeline")


@pytest.fixture(scope="session")
def tiny_xl_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_xl_pipeline(tmp_path_factory.mktemp("models") / "tiny-xl")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_image_folder(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def seconds() -> Iterator[None]:
    """A test that waits for ever fails instead, and one that reads without end does so when it has read 4 GB."""

    def too_long(number: int, frame: object) -> None:
        pytest.fail("it waits")  # which nothing catches

    memory = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, too_long)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30, memory[1]))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, memory)


@pytest.fixture
def settings(tiny_pipeline: Path, image_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(tiny_pipeline),
        "train_data_dir": str(image_folder),
        "output_dir": str(tmp_path / "run"),
        "resolution": 32,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 0,
        "device": "cpu",
        "seed": 5,
        "logging_steps": 1,
        "report_to": "none",
        "validation_pictures": 0,
        "validation_samples": 16,
    }


@pytest.fixture
def xl_settings(settings: dict[str, Any], tiny_xl_pipeline: Path) -> dict[str, Any]:
    return {**settings, "pretrained_model_name_or_path": str(tiny_xl_pipeline)}
