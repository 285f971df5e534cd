"""Three small runs of the embedded base have the losses that they had: no faster way may change what is learned.

    PYTHONPATH=tests python tests/training/test_golden_curves.py    # writes golden_curves.json anew

The losses come from November 2026, torch 2.13.0 on a CPU with AVX-512. Other processors and libraries round otherwise:
with AVX2 alone these steps differ by 1.3e-6.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_runs import losses, train

GOLDEN = Path(__file__).parent / "golden_curves.json"
ROUNDING = 1e-3  # relative
BASE = {
    "pretrained_model_name_or_path": "sd-recipes/tiny-emoji", "dataset_name": "sd-recipes/emoji",
    "train_split": "flags", "resolution": 64, "train_batch_size": 4, "max_train_steps": 8, "learning_rate": 1e-3,
    "lr_warmup_steps": 2, "seed": 11, "device": "cpu", "logging_steps": 1, "report_to": "none",
    "validation_pictures": 0,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "whole UNet": {"random_flip": True, "use_ema": True, "caption_dropout": 0.2},
    "LoRA": {"lora_rank": 4, "gradient_checkpointing": True, "snr_gamma": 5.0},
    "cached, accumulated": {"cache_latents": "memory", "center_crop": True, "gradient_accumulation_steps": 2},
}


def curve(name: str, output_dir: Path) -> list[float]:
    return losses(train({**BASE, "output_dir": str(output_dir)}, **RUNS[name]))


@pytest.mark.parametrize("name", RUNS)
def test_the_losses_are_what_they_were(name: str, tmp_path: Path) -> None:
    assert curve(name, tmp_path / "run") == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=ROUNDING)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps({name: curve(name, Path(folder) / name) for name in RUNS}, indent=1) + "\n")
