from pathlib import Path
from typing import Any

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
    }
