from pathlib import Path

import pytest
import torch
from tiny_models import build_image_folder, build_tiny_pipeline

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # tiny models only lose by a second thread


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny-pipeline")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_image_folder(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
