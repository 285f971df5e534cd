"""What is not a finite number reaches neither weights nor a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import flags_of, start, torchrun
from poisoned import poison
from safetensors.torch import load_file
from training_runs import build, fit_from, train

from sd_recipes.checkpoints.format import find_checkpoint, list_checkpoints
from sd_recipes.errors import RecipeError
from sd_recipes.training.build_parts import UNET_WEIGHTS
from sd_recipes.training.finite import TrainingDiverged
from sd_recipes.training.run import Run


def build_poisoned(settings: dict[str, Any], steps: set[int], **changes: Any) -> Run:
    run = build(settings, **changes)
    poison(run, steps)
    return run


def are_all_finite(path: Path) -> bool:
    return all(value.isfinite().all() for file in path.rglob("*.safetensors") for value in load_file(file).values())


def test_defect_1_an_infinite_gradient_reaches_no_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    """Though the loss is finite, and is logged at that very step."""
    run = build_poisoned(settings, {3}, checkpointing_steps=1, use_ema=True, max_skipped_steps=0)
    with pytest.raises(TrainingDiverged) as error:
        fit_from(run)
    told = "the gradient's norm is nan at step 3, which is not applied: lower --learning_rate, or see to the rows in "
    assert str(error.value).startswith(f"{told}{tmp_path / 'run' / 'incidents.jsonl'}; ")
    assert str(error.value).endswith("; the same command then resumes from checkpoint-2")
    found = find_checkpoint(tmp_path / "run", "latest")
    assert found is not None
    assert found[0].name == "checkpoint-2"
    assert are_all_finite(found[0])


def test_defect_1_nor_the_weights(settings: dict[str, Any]) -> None:
    run = build_poisoned(settings, {2}, checkpointing_steps=100, logging_steps=100, max_skipped_steps=0)
    with pytest.raises(TrainingDiverged, match=r"has no checkpoint$"):
        fit_from(run)
    assert all(value.isfinite().all() for value in run.model.components.unet.parameters())


def test_defect_1_a_huge_rate_reaches_no_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    """Gradient and loss are finite, and the weights after the step are not."""
    with pytest.raises(TrainingDiverged, match="the weights are not finite by step 1: lower --learning_rate"):
        train(settings, learning_rate=3.4e38, adam_weight_decay=0.9, checkpointing_steps=1)
    assert list_checkpoints(tmp_path / "run") == []


def test_defect_1_the_gradients_norm_is_logged(settings: dict[str, Any], tmp_path: Path) -> None:
    """As it is before clipping."""
    clipped = {"max_grad_norm": 1e-3, "max_train_steps": 1}
    train(settings, **clipped)
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    run = train(settings, **clipped | {"output_dir": str(tmp_path / "other"), "max_grad_norm": 1e9})
    (other,) = (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()
    assert run.num_steps == 1
    assert json.loads(line)["grad_norm"] == json.loads(other)["grad_norm"] > 1e-2


def spoil(path: Path) -> None:
    """Put NaN into a checkpoint, as a version without these checks did, and name it in the manifest."""
    from safetensors.torch import save_file
    from test_format_and_saver import entry, rewrite_manifest

    file = path / "unet" / UNET_WEIGHTS
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, file, {"format": "pt"})
    rewrite_manifest(path, lambda m: m["files"].update({f"unet/{UNET_WEIGHTS}": entry(file.read_bytes())}))


def test_defect_1_a_checkpoint_that_holds_nan_is_not_gone_on_from(settings: dict[str, Any], tmp_path: Path) -> None:
    train(settings, checkpointing_steps=2)
    spoil(tmp_path / "run" / "checkpoint-4")
    with pytest.raises(RecipeError, match=r"checkpoint-4 holds weights that are not finite: .* of \['checkpoint-2'\]"):
        train(settings, resume_from_checkpoint="latest", max_train_steps=5)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_defect_1_a_model_that_holds_nan_is_named(settings: dict[str, Any], part: str) -> None:
    run = build(settings)
    with torch.no_grad():
        next(getattr(run.model.components, part).parameters()).fill_(torch.nan)
    with pytest.raises(RecipeError, match=rf"--pretrained_model_name_or_path .*: {part} holds weights that are not"):
        fit_from(run)


def assert_ended_on_both(settings: dict[str, Any], out: Path, **variables: str) -> None:
    """A run of two processes, of which the second has an infinite gradient at step 3."""
    flags = flags_of(settings | {"output_dir": out, "checkpointing_steps": 2, "max_skipped_steps": 0})
    process = start(torchrun(2), *flags, script="tests/poisoned.py", POISONED_RANK="1", POISONED_STEPS="3", **variables)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    told = {line for line in output.splitlines() if line.startswith("error: ")}
    assert len(told) == 1, output
    assert re.fullmatch(
        r"error: the gradient's norm is (inf|nan) at step 3, which is not applied: lower --learning_rate, or see to "
        rf"the rows in {re.escape(str(out))}/incidents\.jsonl; the same command then resumes from checkpoint-2",
        told.pop(),
    )
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-2"]
    assert are_all_finite(out / "checkpoint-2")


@pytest.mark.slow
def test_defect_1_an_infinite_gradient_on_one_of_two_processes(settings: dict[str, Any], tmp_path: Path) -> None:
    assert_ended_on_both(settings | {"train_batch_size": 2}, tmp_path / "out")
