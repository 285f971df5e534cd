"""What a run of a schedule-free optimizer leaves is evaluated, and goes on with other settings or says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import assert_equal, build, forget_accelerator, train, weights

from sd_recipes.commands.evaluate import evaluate
from sd_recipes.commands.evaluate_settings import read_settings
from sd_recipes.commands.train import restore
from sd_recipes.errors import RecipeError
from sd_recipes.training.build_parts import UNET_WEIGHTS
from sd_recipes.training.finite import has_finite_weights
from sd_recipes.training.schedule_free import EvaluationWeights

FROZEN = "unet.mid_block.*"


@pytest.fixture(scope="module")
def begun(tiny_pipeline: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run that has made 3 steps."""
    settings = {
        "pretrained_model_name_or_path": str(tiny_pipeline), "train_data_dir": str(image_folder), "resolution": 32,
        "output_dir": str(tmp_path_factory.mktemp("begun") / "run"), "train_batch_size": 4, "max_train_steps": 3,
        "learning_rate": 1e-3, "lr_warmup_steps": 0, "device": "cpu", "seed": 5, "report_to": "none",
        "validation_split": "2", "validation_samples": 4, "validation_pictures": 0,
        "optimizer": "schedule_free_adamw", "optimizer_kwargs": {"r": 0.5},
        "param_groups": [{"pattern": FROZEN, "learning_rate": 0}],
    }  # fmt: skip
    train(settings)
    return settings


def resumed(begun: dict[str, Any], **changes: Any) -> Any:
    """The run, put together to go on, and not begun."""
    run = build(begun, max_train_steps=4, resume_from_checkpoint="checkpoint-3", **changes)
    restore(run)
    return run


def test_a_run_with_settings_of_its_optimizer_is_evaluated(begun: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = Path(begun["output_dir"]) / "checkpoint-3"
    forget_accelerator()
    evaluate(read_settings([str(checkpoint), "--num_pictures", "0", "--output_dir", str(tmp_path / "out")]))
    (found,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["targets"]
    lines = [json.loads(line) for line in (checkpoint.parent / "metrics.jsonl").read_text().splitlines()]
    assert found["figures"]["validation_loss"] == pytest.approx(lines[-1]["validation_loss"], rel=1e-5)


def test_another_beta1_would_change_what_is_evaluated(begun: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"--adam_beta1 is 0.8 and was 0.9 in .*does not carry over"):
        resumed(begun, adam_beta1=0.8)


def test_nothing_begins_in_a_group_that_counts(begun: dict[str, Any]) -> None:
    with pytest.raises(
        RecipeError, match=r"unet/mid_block\S+ was frozen by --param_groups, and .*whole groups"
    ) as error:
        resumed(begun, param_groups=None)
    assert "\n" not in str(error.value)


def test_what_is_frozen_later_stays_what_was_evaluated(begun: dict[str, Any]) -> None:
    groups = [*begun["param_groups"], {"pattern": "unet.conv_in.*", "learning_rate": 0}]
    run = resumed(begun, param_groups=groups)
    saved = Path(begun["output_dir"]) / "checkpoint-3"
    y, x = (load_file(saved / folder / UNET_WEIGHTS) for folder in ("unet", "unet_ema"))
    assert not torch.equal(x["conv_in.weight"], y["conv_in.weight"])
    assert_equal(weights(run), {name: x[name] if name.startswith("conv_in.") else each for name, each in y.items()})
    assert_equal(run.state.parts["unet"].evaluated_tensors(), x)


def test_its_average_is_made_for_nothing_but_its_values(begun: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def layout(only_layout: bool) -> dict[tuple[str, str], Any]:
        files = run.state.state_dict(only_layout=only_layout).tensors
        return {(file, name): (each.shape, each.dtype, each.stride(), each.device)
                for file, named in files.items() for name, each in named.items()}  # fmt: skip

    run = build(begun, max_train_steps=4, resume_from_checkpoint="checkpoint-3")
    with monkeypatch.context() as patched:
        patched.setattr(EvaluationWeights, "named_tensors", lambda self: pytest.fail("it was made"))
        restore(run)
        assert has_finite_weights(run.state, run.accelerator)
        found = layout(only_layout=True)
    assert found == layout(only_layout=False)
