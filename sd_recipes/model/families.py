"""Which family a model is of. A new one is a file beside this one, and an entry here."""

from __future__ import annotations

from sd_recipes.model.family import Family
from sd_recipes.model.stable_diffusion import StableDiffusion
from sd_recipes.recipe import ModelConfig


def family_of(config: ModelConfig) -> Family:
    """The family of the model that a recipe names: there is one, until models are told apart here."""
    return StableDiffusion()
