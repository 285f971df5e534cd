"""What a recipe asks of a model, checked against its noise schedule, and against the model that was loaded."""

from __future__ import annotations

from diffusers import DDPMScheduler, SchedulerMixin

from sd_recipes.data.timesteps import check_timesteps
from sd_recipes.errors import RecipeError
from sd_recipes.model.components import ZERO_SNR, Components
from sd_recipes.model.predictions import OF_NOISE_ALONE
from sd_recipes.model.samplers import check_it_draws, drawing_sampler
from sd_recipes.recipe import Recipe


def check_schedule(recipe: Recipe, scheduler: DDPMScheduler) -> None:
    """Raises RecipeError for a setting that does not fit the model's schedule, before anything else is loaded."""
    config = scheduler.config
    if recipe.dream_training and config.prediction_type != "epsilon" and not recipe.prediction_type:
        raise RecipeError("--dream_training is defined for epsilon, and this model predicts something else: drop it")
    predicts = recipe.prediction_type or config.prediction_type
    if predicts in OF_NOISE_ALONE and recipe.rescale_betas_zero_snr:
        raise RecipeError(
            f"--rescale_betas_zero_snr makes the last timestep pure noise, of which this model's {predicts} tells "
            "nothing: add --prediction_type v_prediction, or drop it"
        )
    if predicts in OF_NOISE_ALONE and config.rescale_betas_zero_snr:
        raise RecipeError(
            "this model's last timestep is pure noise (rescale_betas_zero_snr in its scheduler_config.json), of which "
            f"{predicts} tells nothing: use --prediction_type v_prediction"
        )
    if predicts == "score" and scheduler.alphas_cumprod[0] == 1:
        raise RecipeError(
            "this model's schedule adds no noise at the first timestep (its beta is 0), where the score is infinite: "
            "use --prediction_type epsilon, or raise beta_start in its scheduler_config.json"
        )
    if recipe.trains_lora and predicts != config.prediction_type:
        raise RecipeError(
            f"--prediction_type {predicts} is not the model's {config.prediction_type}, and a LoRA's file has no "
            "scheduler that could say so: drop it, or train the whole UNet"
        )
    if recipe.trains_lora and recipe.rescale_betas_zero_snr and not config.rescale_betas_zero_snr:
        raise RecipeError(
            "--rescale_betas_zero_snr changes the model's noise schedule, and a LoRA's file has no scheduler that "
            "could say so: drop it, or train the whole UNet"
        )
    if recipe.prior_preservation == "model" and predicts != config.prediction_type:
        raise RecipeError(
            "--prior_preservation model takes the model's own predictions as targets, which are "
            f"{config.prediction_type} and not {predicts}: drop --prediction_type, or use --prior_preservation pictures"
        )
    check_timesteps(config.num_train_timesteps, recipe)
    if recipe.draws_pictures and recipe.validation_inference_steps > config.num_train_timesteps:
        raise RecipeError(
            f"--validation_inference_steps {recipe.validation_inference_steps} is over the model's "
            f"{config.num_train_timesteps} timesteps: lower it"
        )
    if recipe.validation_sampler:  # the model's own is tried when it is loaded
        zero_snr = ZERO_SNR if recipe.rescale_betas_zero_snr else {}
        check_pictures(recipe, DDPMScheduler.from_config(config, prediction_type=predicts, **zero_snr))


def check_recipe_fits(recipe: Recipe, components: Components) -> None:
    """Raises RecipeError for a size of pictures that does not fit this model."""
    factor = components.vae_scale_factor
    if recipe.aspect_ratio_buckets and recipe.bucket_step % factor:
        raise RecipeError(f"--bucket_step {recipe.bucket_step} is not a multiple of the VAE's factor {factor}")
    if recipe.resolution % factor and not recipe.aspect_ratio_buckets:
        lower = recipe.resolution - recipe.resolution % factor
        raise RecipeError(
            f"--resolution {recipe.resolution} is not a multiple of the VAE's factor {factor}: use {lower or factor} "
            f"or {lower + factor}"
        )


def check_pictures(recipe: Recipe, sampler: SchedulerMixin) -> None:
    """Raises RecipeError if validation pictures cannot be drawn; `sampler` is one that says what is trained."""
    if recipe.draws_pictures or recipe.validation_sampler:
        name, num_steps = recipe.validation_sampler, recipe.validation_inference_steps
        check_it_draws(drawing_sampler(sampler, name), num_steps, name)
