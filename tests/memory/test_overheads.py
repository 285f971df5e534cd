"""What a plan counts in the host's memory is what a run keeps there."""

from __future__ import annotations

from typing import Any

import pytest
from training_runs import build

from sd_recipes.memory.overheads import on_host
from sd_recipes.memory.step import TracedStep
from sd_recipes.model.placement import kept_as_loaded
from sd_recipes.recipe import Recipe


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, {"vae", "text_encoder", "text_encoder_2"}),
        ({"train_text_encoder": True}, {"vae"}),
        ({"lora_rank": 2}, set()),
        ({"mixed_precision": "no"}, set()),
    ],
    ids=["bf16", "trained text", "LoRA", "float32"],
)
def test_frozen_models_are_kept_for_the_export(
    xl_settings: dict[str, Any], changes: dict[str, Any], kept: set[str]
) -> None:
    run = build(xl_settings, **{"mixed_precision": "bf16", **changes})
    assert run.model.components.as_loaded.keys() == kept == set(kept_as_loaded(run.model.family, run.recipe))


def test_a_plan_counts_them(settings: dict[str, Any]) -> None:
    recipe = Recipe(**settings, mixed_precision="bf16", train_text_encoder=True)
    step = TracedStep(recipe, "cpu", passes=False)
    vae = sum(each.numel() for each in step.components.vae.parameters())
    assert on_host(recipe, step, "cpu")["frozen models as loaded"] == 4 * vae
    lora = recipe.model_copy(update={"lora_rank": 2, "train_text_encoder": False})
    assert "frozen models as loaded" not in on_host(lora, step, "cpu")
