"""Which family a model belongs to. A new family is a file next to this one, and an entry here."""

from __future__ import annotations

from sd_recipes.model.family import Family
from sd_recipes.model.stable_diffusion import StableDiffusion
from sd_recipes.recipe import ModelConfig


def family_of(config: ModelConfig) -> Family:
    """The family of the model that a recipe names. So far there is only one; this is where to tell several apart."""
    return StableDiffusion()
