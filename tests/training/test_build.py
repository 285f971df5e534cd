"""What a recipe and a model say together."""

from __future__ import annotations

from typing import Any

import pytest
from training_runs import train

from sd_recipes.errors import RecipeError


def test_more_denoising_steps_than_the_model_has_timesteps(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="--validation_inference_steps 1001 is over the model's 1000 timesteps"):
        train(settings, validation_prompts=["a disc"], validation_inference_steps=1001)
    train(settings, validation_inference_steps=1001, max_train_steps=1)
