"""Settings that are probably a mistake."""

from sd_recipes.recipe.optimization import DIFFUSERS_LENGTH
from sd_recipes.recipe.recipe import Recipe


def odd_settings(recipe: Recipe) -> list[str]:
    """Warnings about settings that are probably a mistake, but run as they do in diffusers' script."""
    odd = []
    if recipe.dream_training and recipe.input_perturbation:
        odd.append(
            "--dream_training rectifies along the error of a prediction from the perturbed noise of "
            "--input_perturbation, so that both change the UNet's input: usually only one of them is set."
        )
    if isinstance(recipe.micro_batch, int) and recipe.micro_batch > recipe.train_batch_size:
        odd.append(
            f"--micro_batch {recipe.micro_batch} does nothing, for a batch has --train_batch_size "
            f"{recipe.train_batch_size} images."
        )
    if recipe.cudnn_benchmark and recipe.aspect_ratio_buckets:
        odd.append(
            "--cudnn_benchmark times every convolution anew for each of the sizes of --aspect_ratio_buckets, which may "
            "take longer than it saves."
        )
    changing = [
        name for name in ("shuffle_tags", "caption_tag_dropout_rate", "enable_wildcard") if getattr(recipe, name)
    ]
    if recipe.cache_text and changing:
        odd.append(
            f"--cache_text keeps text states of captions that come again, and --{changing[0]} makes new ones in every "
            "epoch: drop --cache_text, which then mostly costs time and memory."
        )
    if recipe.offload_ema and not (recipe.use_ema or recipe.ema_snapshots):
        odd.append("--offload_ema does nothing without --use_ema or --ema_snapshots.")
    if recipe.ema_length != DIFFUSERS_LENGTH and not recipe.use_ema:
        odd.append(f"--ema_length {recipe.ema_length} does nothing without --use_ema.")
    if recipe.ema_snapshots_limit is not None and not recipe.ema_snapshots:
        odd.append(f"--ema_snapshots_limit {recipe.ema_snapshots_limit} does nothing without --ema_snapshots.")
    if recipe.rescale_betas_zero_snr and recipe.weightings and not recipe.learned_uncertainty:
        odd.append(
            f"--{recipe.weightings[0]} gives weight 0 to the last timestep of --rescale_betas_zero_snr: sampling "
            "begins with it, and it is not trained."
        )
    if recipe.rescale_betas_zero_snr and recipe.max_timestep is not None:
        odd.append(
            "--max_timestep may leave out the last timestep of --rescale_betas_zero_snr, in which sampling begins."
        )
    for source in recipe.sources:
        if source.dataset_name is None and source.dataset_config_name is not None:
            odd.append(f"--dataset_config_name {source.dataset_config_name} is not read: {source.flag} has none.")
    return odd
