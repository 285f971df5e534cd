"""What would change a plan, and the cheapest set of it that fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sd_recipes.errors import RecipeError
from sd_recipes.memory.plan import Planner
from sd_recipes.memory.remedies import differing, fastest_that_fits, in_flags, variations
from sd_recipes.memory.show import (
    EIGHTHS,
    WIDTH,
    as_json,
    bar,
    best_in_lines,
    draw,
    in_lines,
    rows,
    variations_in_lines,
)
from sd_recipes.recipe import Recipe


def recipe_of(model: Path, **settings: Any) -> Recipe:
    common = {"train_data_dir": "unread", "resolution": 64, "train_batch_size": 8, "use_ema": True}
    return Recipe(pretrained_model_name_or_path=str(model), **{**common, **settings})


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner("cuda")


def test_every_remedy_takes_less_or_says_that_it_does_not(tiny_pipeline: Path, planner: Planner) -> None:
    recipe = recipe_of(tiny_pipeline)
    plan = planner.plan(recipe)
    found = {each.words: each for each in variations(planner, recipe)}
    smaller = {
        "half as many images at once", "mixed precision", "gradient checkpointing", "8-bit AdamW",
        "average on the host", "steps in the backward pass", "latents from the cache",
    }  # fmt: skip
    assert smaller < found.keys()
    for words in ("half as many images at once", "gradient checkpointing", "8-bit AdamW"):
        assert found[words].plan.total < plan.total, words
    assert found["FSDP over 8 GPUs"].plan.by_kind["weights"] == plan.by_kind["weights"] // 8
    assert found["latents from the cache"].plan.moments["encoding"].total == 0


def test_numbers_of_images_in_between_are_on_the_line_or_below(tiny_pipeline: Path, planner: Planner) -> None:
    recipe = recipe_of(tiny_pipeline, micro_batch=4)
    exact, about = planner.plan(recipe).tensors, planner.plan(recipe, about=True).tensors
    assert exact == pytest.approx(about, rel=0.02)


def test_a_plan_does_not_depend_on_what_was_planned_before(tiny_pipeline: Path) -> None:
    recipe = recipe_of(tiny_pipeline, optimizer="adamw", micro_batch=4)
    other = Planner("cuda")
    other.plan(recipe.model_copy(update={"optimizer": "adamw8bit", "micro_batch": 1}))
    other.plan(recipe.model_copy(update={"optimizer": "sgd", "micro_batch": None, "use_ema": False}))
    fresh = Planner("cuda").plan(recipe, about=True)
    assert other.plan(recipe, about=True).moments["forward"].total == fresh.moments["forward"].total


@pytest.mark.parametrize("share", [1.0, 0.95, 0.85])
def test_what_fits_keeps_the_batch_and_changes_the_least(tiny_pipeline: Path, planner: Planner, share: float) -> None:
    recipe = recipe_of(tiny_pipeline, mixed_precision="no")
    asked = planner.plan(recipe)
    planner.capacity = asked.total - int((1 - share) * asked.tensors)
    plan = fastest_that_fits(planner, recipe, "--budget")
    assert plan.total <= planner.capacity
    assert plan.recipe.train_batch_size == 8
    assert plan.recipe.mixed_precision == "no", "it was given"
    assert differing(recipe, plan.recipe).keys() <= {
        "micro_batch", "gradient_checkpointing", "optimizer", "offload_ema", "vae_slicing"
    }  # fmt: skip
    assert (plan.recipe == recipe) == (share == 1.0)


def test_a_budget_that_is_too_small_is_told_the_least_and_what_it_takes(tiny_pipeline: Path, planner: Planner) -> None:
    planner.capacity = 10**8
    with pytest.raises(
        RecipeError, match=r"--budget 0.1 GB is too little .* at 64 pixels: it takes \d\.\d GB, with --"
    ):
        fastest_that_fits(planner, recipe_of(tiny_pipeline), "--budget")


def test_several_processes_are_not_offered_what_they_refuse(tiny_pipeline: Path) -> None:
    recipe, several = recipe_of(tiny_pipeline), Planner("cuda", num_processes=2)
    assert "steps in the backward pass" not in {each.words for each in variations(several, recipe)}
    assert several.plan(recipe).overhead["NCCL"] > 0
    with pytest.raises(RecipeError, match="and there are 2: train on one process"):
        several.plan(recipe.model_copy(update={"fused_backward_pass": True, "max_grad_norm": 0}))


def test_weights_of_a_type_that_is_not_computed_in_are_refused(tiny_pipeline: Path, planner: Planner) -> None:
    with pytest.raises(RecipeError, match="add --mixed_precision bf16, or drop --weights_dtype"):
        planner.plan(recipe_of(tiny_pipeline, weights_dtype="bf16"))


def test_each_average_on_the_host_has_a_block_of_its_own(tiny_pipeline: Path, planner: Planner) -> None:
    one, four = (
        planner.plan(recipe_of(tiny_pipeline, offload_ema=True, **more)).moments["encoding"].by_kind["workspace"]
        for more in ({}, {"ema_snapshots": True})
    )
    assert four > 1.9 * one > 0


def test_flags_can_be_pasted() -> None:
    changes = {"optimizer": "adamw8bit", "gradient_checkpointing": True, "micro_batch": 2, "max_grad_norm": 0}
    assert in_flags(changes) == "--gradient_checkpointing --max_grad_norm 0 --micro_batch 2 --optimizer adamw8bit"


def test_it_is_shown_in_words_as_a_bar_as_json_and_as_a_drawing(
    tiny_pipeline: Path, planner: Planner, tmp_path: Path
) -> None:
    planner.capacity = 10**9
    recipe = recipe_of(tiny_pipeline)
    plan = planner.plan(recipe)
    assert sum(size for _, size in rows(plan)) == plan.total
    found = list(variations(planner, recipe))
    best = fastest_that_fits(planner, recipe, "--budget")
    text = "\n".join([in_lines(plan), variations_in_lines(plan, found), best_in_lines(plan, best)])
    assert f"in the step's {plan.phase} phase" in text
    assert "of 1.0 GB" in text
    assert "fastest set that fits" in text
    told = as_json(plan, [], best, None)
    assert told["total"] == told["tensors"] + sum(told["overhead"].values())
    assert told["fastest"]["flags"] == in_flags(differing(recipe, best.recipe))
    draw(plan, tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").read_text().count("<rect") == 1 + 2 * len(rows(plan))


def test_a_bar_is_as_long_as_its_share() -> None:
    assert bar(0) == ""
    assert bar(1) == bar(1.5) == EIGHTHS[8] * WIDTH
    assert bar(0.5) == EIGHTHS[8] * (WIDTH // 2)
