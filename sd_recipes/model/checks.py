"""What a recipe asks of a model, checked against the model that was loaded."""

from __future__ import annotations

from sd_recipes.data.timesteps import check_timesteps
from sd_recipes.errors import RecipeError
from sd_recipes.model.components import Components
from sd_recipes.model.predictions import OF_NOISE_ALONE
from sd_recipes.model.samplers import check_it_draws, drawing_sampler
from sd_recipes.recipe import Recipe


def check_recipe_fits(recipe: Recipe, components: Components) -> None:
    """Raises RecipeError for a setting that does not fit this model."""
    factor, scheduler = components.vae_scale_factor, components.scheduler.config
    if recipe.aspect_ratio_buckets and recipe.bucket_step % factor:
        raise RecipeError(f"--bucket_step {recipe.bucket_step} is not a multiple of the VAE's factor {factor}")
    if recipe.resolution % factor and not recipe.aspect_ratio_buckets:
        lower = recipe.resolution - recipe.resolution % factor
        raise RecipeError(
            f"--resolution {recipe.resolution} is not a multiple of the VAE's factor {factor}: use {lower or factor} "
            f"or {lower + factor}"
        )
    if recipe.dream_training and scheduler.prediction_type != "epsilon" and not recipe.prediction_type:
        raise RecipeError("--dream_training is defined for epsilon, and this model predicts something else: drop it")
    predicts = recipe.prediction_type or scheduler.prediction_type
    if predicts in OF_NOISE_ALONE and recipe.rescale_betas_zero_snr:
        raise RecipeError(
            f"--rescale_betas_zero_snr makes the last timestep pure noise, of which this model's {predicts} tells "
            "nothing: add --prediction_type v_prediction, or drop it"
        )
    if predicts in OF_NOISE_ALONE and scheduler.rescale_betas_zero_snr:
        raise RecipeError(
            "this model's last timestep is pure noise (rescale_betas_zero_snr in its scheduler_config.json), of which "
            f"{predicts} tells nothing: use --prediction_type v_prediction"
        )
    check_timesteps(scheduler.num_train_timesteps, recipe)
    if recipe.validation_prompts and recipe.validation_inference_steps > scheduler.num_train_timesteps:
        raise RecipeError(
            f"--validation_inference_steps {recipe.validation_inference_steps} is over the model's "
            f"{scheduler.num_train_timesteps} timesteps: lower it"
        )


def check_pictures(recipe: Recipe, components: Components) -> None:
    """Raises RecipeError for a sampler that cannot draw what is trained, once the components are as it is exported."""
    if recipe.draws_pictures or recipe.validation_sampler:
        name, num_steps = recipe.validation_sampler, recipe.validation_inference_steps
        check_it_draws(drawing_sampler(components.sampler, name), num_steps, name)
