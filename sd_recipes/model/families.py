"""Which family a model belongs to. A new family is a file next to this one, and an entry here."""

from __future__ import annotations

import logging

from sd_recipes.errors import RecipeError
from sd_recipes.model.family import Family
from sd_recipes.model.recognise import PARTS
from sd_recipes.model.sources import MODEL, SingleFile, open_source
from sd_recipes.model.stable_diffusion import StableDiffusion
from sd_recipes.recipe import ModelConfig

logger = logging.getLogger(__name__)


def family_of(config: ModelConfig) -> Family:
    """The family of the model that a recipe names. So far there is only one; this is where to tell several apart.

    Raises RecipeError if there is no such model, or if it is of a kind that is not trained here.
    """
    model = open_source(config.pretrained_model_name_or_path or "", MODEL, config)
    if model.recognised.parts == {"vae"}:
        raise RecipeError(f"{model.place} is a VAE alone: give it as --vae, and name a model to train here")
    if isinstance(model, SingleFile):
        logger.info("%s is %s.", model.place, model.recognised.words)
    missing = [part for part in PARTS if part not in model.recognised.parts]
    if config.base and missing:
        logger.info("%s of --base %s is used.", ", ".join(missing), config.base)
    elif config.base and not isinstance(model, SingleFile):
        logger.warning("--base %s is not used: %s has all parts of a model.", config.base, model.place)
    return StableDiffusion()
