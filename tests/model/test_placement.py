"""How the models run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from training_runs import forget_accelerator, train

from sd_recipes.commands.cache import fill_cache
from sd_recipes.inspection.latents import load_model
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import allow_tf32


@pytest.fixture(autouse=True)
def _no_precision_is_left() -> Iterator[None]:
    was = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = was
    forget_accelerator()


def fill(settings: dict[str, Any]) -> None:
    forget_accelerator()
    fill_cache(Recipe(**settings))


@pytest.mark.parametrize("command", [train, fill])
@pytest.mark.parametrize("allowed", [False, True])
def test_defect_14_tf32_is_allowed_in_products_and_convolutions_or_in_neither(
    settings: dict[str, Any], command: Callable[[dict[str, Any]], Any], allowed: bool
) -> None:
    allow_tf32(not allowed)
    command(settings | {"allow_tf32": allowed, "center_crop": True, "max_train_steps": 1})
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")


def test_defect_14_figures_of_data_are_float32s(settings: dict[str, Any]) -> None:
    allow_tf32(True)
    load_model(Recipe(**settings))
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, False)
