"""The recipe: every setting of a run, with its help and its checks.

One flat pydantic model that inherits from small sections: users see flat names, and a function takes only the section
that it needs. A flag, a key of a recipe file and an attribute share one name. A section is in the file that the imports
below name, with the checks of single fields; what fields have to agree on is in `data` and `recipe`, in the order in
which mistakes are told. Other rooms import all of it from here.
Nothing here imports torch or diffusers, so that a mistake on the command line is reported at once.
"""

from sd_recipes.recipe.captions import CaptionConfig
from sd_recipes.recipe.data import OF_ONE_SOURCE, CacheConfig, DataConfig, DataSettings, DataSource
from sd_recipes.recipe.images import ImageConfig, MaskConfig
from sd_recipes.recipe.memory import MemoryConfig
from sd_recipes.recipe.model import LoraConfig, ModelConfig, TextEncoderConfig
from sd_recipes.recipe.objective import ObjectiveConfig
from sd_recipes.recipe.odd import odd_settings
from sd_recipes.recipe.optimization import DIFFUSERS_LENGTH, WIDEST_LENGTH, OptimConfig, ParamGroup
from sd_recipes.recipe.prior_preservation import PriorConfig
from sd_recipes.recipe.recipe import ONLY_IN_FILES, SECTIONS, Recipe, on_resume
from sd_recipes.recipe.run import CheckpointConfig, HubConfig, RunConfig
from sd_recipes.recipe.samplers import OTHER_SAMPLER_NAMES, SAMPLERS_BY_NAME, sampler_class_name
from sd_recipes.recipe.section import Number, OnResume, Section, heading, setting
from sd_recipes.recipe.validation import ValidationConfig

__all__ = [
    "DIFFUSERS_LENGTH", "OF_ONE_SOURCE", "ONLY_IN_FILES", "OTHER_SAMPLER_NAMES", "SAMPLERS_BY_NAME", "SECTIONS",
    "WIDEST_LENGTH", "CacheConfig", "CaptionConfig", "CheckpointConfig", "DataConfig", "DataSettings", "DataSource",
    "HubConfig", "ImageConfig", "LoraConfig", "MaskConfig", "MemoryConfig", "ModelConfig", "Number", "ObjectiveConfig",
    "OnResume", "OptimConfig", "ParamGroup", "PriorConfig", "Recipe", "RunConfig", "Section", "TextEncoderConfig",
    "ValidationConfig", "heading", "odd_settings", "on_resume", "sampler_class_name", "setting",
]  # fmt: skip
