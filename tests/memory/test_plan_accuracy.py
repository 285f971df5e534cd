"""The plan against what a step really takes: on the CPU, by the same tracer over real tensors and by torch's own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch.distributed._tools.mem_tracker import MemTracker

from sd_recipes.memory.plan import plan_memory
from sd_recipes.memory.step import blank_batch
from sd_recipes.model.components import load_scheduler
from sd_recipes.model.families import family_of
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import forget_accelerator, start_accelerator
from sd_recipes.training.build_model import build_model
from sd_recipes.training.build_parts import choose_trained

SCRIPT = ROOT / "benchmarks" / "plan_accuracy.py"


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "settings",
    [
        {"train_batch_size": 4},
        {"train_batch_size": 16, "mixed_precision": "bf16"},
        {"train_batch_size": 16, "gradient_checkpointing": True, "optimizer": "adamw8bit"},
        {"train_batch_size": 4, "mixed_precision": "bf16", "gradient_checkpointing": True, "optimizer": "sgd"},
        {"train_batch_size": 4, "use_ema": True, "optimizer": "adafactor"},
        {"train_batch_size": 4, "lora_rank": 4, "mixed_precision": "bf16"},
        {"train_batch_size": 4, "mixed_precision": "bf16", "weights_dtype": "bf16"},
        {"train_batch_size": 4, "fused_backward_pass": True, "max_grad_norm": 0.0, "train_text_encoder": True},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_the_plan_is_the_memory_of_the_real_step(
    tiny_pipeline: Path, accuracy: ModuleType, settings: dict[str, Any]
) -> None:
    recipe = accuracy.recipe_of(tiny_pipeline, "cpu", resolution=64, **settings)
    found = accuracy.measure(recipe).allocated
    assert plan_memory(recipe, "cpu").tensors == pytest.approx(found, rel=accuracy.MOST)


@pytest.mark.slow
def test_the_whole_grid_is_within_a_tenth(accuracy: ModuleType, tmp_path: Path) -> None:
    errors = {
        name: plan_memory(recipe, "cpu").tensors / accuracy.measure(recipe).allocated - 1
        for name, recipe in accuracy.recipes("cpu", tmp_path)
    }
    assert {name: error for name, error in errors.items() if abs(error) > accuracy.MOST} == {}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"mixed_precision": "bf16"}, {"gradient_checkpointing": True}])
def test_the_plan_is_what_torchs_own_tracker_says(
    tiny_pipeline: Path, accuracy: ModuleType, changes: dict[str, Any]
) -> None:
    recipe = accuracy.recipe_of(tiny_pipeline, "cpu", resolution=64, train_batch_size=8, **changes)
    assert plan_memory(recipe, "cpu").tensors == pytest.approx(by_mem_tracker(recipe, accuracy), rel=accuracy.MOST)


class TrackerOfFrozen(MemTracker):
    """torch's (2.13) hooks gradients of frozen parameters too, which have none."""

    def _track_module_params_and_buffers(
        self, module: torch.nn.Module, install_grad_hooks: bool = True
    ) -> tuple[int, int]:
        is_trained = all(each.requires_grad for each in module.parameters())
        return super()._track_module_params_and_buffers(module, install_grad_hooks and is_trained)


def by_mem_tracker(recipe: Recipe, accuracy: ModuleType) -> int:
    """The peak of a run's second step."""
    forget_accelerator()
    accelerator = start_accelerator(recipe)
    family = family_of(recipe)
    components = family.load(recipe, load_scheduler(recipe), (), weights=False)
    choose_trained(recipe, family, components)
    modules = [getattr(components, name) for name in ("unet", "vae", *family.text_models)]
    for module in modules:
        accuracy.draw_weights(module, torch.device("cpu"))
    model, state = build_model(
        recipe, family, components, accelerator, vae_dtype=torch.float32, batch_size=8, num_steps=2, num_rows=None
    )
    batch = blank_batch(recipe, family, components, recipe.train_batch_size)
    accuracy.one_step(batch, model, state, accelerator, recipe)
    tracker = TrackerOfFrozen()
    tracker.track_external(*modules, state.optimizer.optimizer)  # whose state is there from the first step on
    with tracker:
        accuracy.one_step(batch, model, state, accelerator, recipe)
    snapshot = tracker.get_tracker_snapshot("peak")
    return int(snapshot[torch.device("cpu")]["Total"])
