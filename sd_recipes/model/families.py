"""Which family a model belongs to. A new family is a file next to this one, and an entry here."""

from __future__ import annotations

import logging

from sd_recipes.assets import Generation
from sd_recipes.errors import RecipeError
from sd_recipes.model.family import Family
from sd_recipes.model.sources import ENCODER_LAYER, MODEL, Folder, SingleFile, Source, open_source
from sd_recipes.model.stable_diffusion import StableDiffusion
from sd_recipes.model.stable_diffusion_xl import StableDiffusionXL
from sd_recipes.recipe import ModelConfig

logger = logging.getLogger(__name__)

FAMILIES: dict[Generation, type[Family]] = {1: StableDiffusion, 2: StableDiffusion, "XL": StableDiffusionXL}
SCALES = {0.18215: "Stable Diffusion 1 and 2", 0.13025: "SDXL"}  # by which VAEs' latents are multiplied


def family_of(config: ModelConfig) -> Family:
    """The family of the model that a recipe names.

    Raises RecipeError if there is no such model, or if it is of a kind that is not trained here, or of another family
    than its --base or its --vae.
    """
    model = open_source(config.pretrained_model_name_or_path or "", MODEL, config)
    if model.recognised.parts == {"vae"}:
        raise RecipeError(f"{model.place} is a VAE alone: give it as --vae, and name a model to train here")
    if isinstance(model, SingleFile):
        logger.info("%s is %s.", model.place, model.recognised.words)
    if config.vae:
        _check_vae_fits(open_source(config.vae, "--vae", config), model)
    missing, generation = model.recognised.missing, model.recognised.generation
    if config.base and (missing or isinstance(model, SingleFile)):
        generation = _common_generation(model, open_source(config.base, "--base", config))
        used = ", ".join(missing) or "the configuration"
        logger.info("%s of --base %s is used.", used, config.base)
    elif config.base:
        logger.warning("--base %s is not used: %s has all parts of a model.", config.base, model.place)
    family = FAMILIES[generation]()
    if config.clip_skip is None and (clip_skip := (model.encoder_layer or 0) - family.text_layer) > 0:
        logger.warning(
            "%s says that it was made with text states of layer %d from the end (%s): --clip_skip %d uses these.",
            model.place, model.encoder_layer, ENCODER_LAYER, clip_skip,
        )  # fmt: skip
    return family


def _check_vae_fits(vae: Source, model: Source) -> None:
    """Check that a VAE is not of the other family, whose latents its UNet would see as others. Raises RecipeError."""
    own, wanted = _latent_scale(vae), _latent_scale(model)
    if "vae" in vae.recognised.parts and own != wanted and own in SCALES and wanted in SCALES:
        raise RecipeError(
            f"{vae.place} is a VAE of {SCALES[own]} (scaling_factor {own}), and {model.place} takes one of "
            f"{SCALES[wanted]} ({wanted}): name such a one, or drop --vae"
        )


def _latent_scale(source: Source) -> float | None:
    """The scaling factor of a model's own VAE, or of its family's; None for a VAE alone in a file, which has none."""
    found = source.recognised
    if isinstance(source, Folder) and "vae" in found.parts:
        config = source.read_json(f"{source.folder_of('vae')}config.json")
        if config is not None:
            return config.get("scaling_factor", 0.18215)  # which older ones do not state
    if found.parts == {"vae"}:
        return None
    return 0.13025 if found.generation == "XL" else 0.18215


def check_trainable(config: ModelConfig) -> None:
    """Raises RecipeError for a model that was distilled to draw in a few steps, which training would undo."""
    if config.train_from_scratch:
        return
    for name, flag in ((config.pretrained_model_name_or_path or "", MODEL), (config.base, "--base")):
        if name is None or "unet" not in (source := open_source(name, flag, config)).recognised.parts:
            continue
        if refusal := source.distilled:
            raise RecipeError(f"{source.place} is {refusal}")
        return


def _common_generation(model: Source, base: Source) -> Generation:
    """Of a model that lacks parts, and the one that has them; only a UNet tells. Raises RecipeError."""
    own, of_base = (FAMILIES[each.recognised.generation] for each in (model, base))
    if "unet" in model.recognised.parts and own is not of_base:
        own_name, base_name = (each.pipeline_class.__name__.removesuffix("Pipeline") for each in (own, of_base))
        raise RecipeError(
            f"{base.place} is a {base_name} model and {model.place} a {own_name} one: name a base of its own kind"
        )
    return base.recognised.generation
