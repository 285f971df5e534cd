"""A run goes on from a checkpoint: which one, whether the settings still fit, and everything put back."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from sd_recipes.agreement import from_first
from sd_recipes.checkpoint import (
    OPTIMIZER,
    STATE,
    UNET_WEIGHTS,
    DamagedCheckpoint,
    Manifest,
    Progress,
    find_checkpoint,
    list_checkpoints,
    read_json,
    read_manifest,
)
from sd_recipes.data.identity import data_fingerprint
from sd_recipes.data.stream import joined_states
from sd_recipes.recipe import Recipe, RecipeError
from sd_recipes.redaction import in_texts, redacted
from sd_recipes.sharding import divided_like

if TYPE_CHECKING:
    from sd_recipes.build import Training

logger = logging.getLogger(__name__)

Effect = Literal["refused", "told", "compared", "free"]


def _names(words: str, effect: Effect) -> dict[str, Effect]:
    return dict.fromkeys(words.split(), effect)


# What a setting that is another than in the checkpoint means. `refused`: the state would not fit. `told`: the run
# goes on with the new value, and is another than the uninterrupted one. `compared`: by what it stands for
# (`identity_of`), since a folder may have moved. `free`: the weights do not depend on it.
EFFECTS: dict[str, Effect] = {
    **_names("optimizer streaming", "refused"),
    **_names(
        "prediction_type pretrained_model_name_or_path revision variant non_ema_revision train_from_scratch "
        "unet_config dataset_name dataset_config_name dataset_revision train_data_dir train_split data_sources "
        "train_batch_size gradient_accumulation_steps",
        "compared",
    ),
    **_names(
        "seed mixed_precision allow_tf32 image_column max_train_samples shuffle_block resolution center_crop crop "
        "random_flip image_interpolation_mode max_image_megapixels aspect_ratio_buckets bucket_step max_upscale "
        "caption_column caption_columns caption_template shuffle_tags keep_tags tag_separator caption_dropout "
        "blank_captions long_captions caption_chunks cache_latents latent_cache_dtype cache_text snr_gamma "
        "noise_offset input_perturbation dream_training dream_detail_preservation learning_rate scale_lr lr_scheduler "
        "lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon sgd_momentum max_grad_norm use_ema "
        "ema_decay gradient_checkpointing enable_xformers_memory_efficient_attention channels_last compile_unet",
        "told",
    ),
    **_names(
        "config dry_run output_dir overwrite device local_rank cache_dir stream_outage_minutes check_data max_bad_rows "
        "dataloader_num_workers latent_cache_dir num_train_epochs max_train_steps use_8bit_adam offload_ema "
        "foreach_ema checkpointing_steps checkpointing_minutes checkpoints_total_limit resume_from_checkpoint "
        "validation_prompts validation_epochs validation_steps validation_split validate_before_training "
        "validation_inference_steps validation_guidance_scale validation_clip_model logging_dir logging_steps "
        "report_to tracker_project_name push_to_hub hub_model_id hub_token",
        "free",
    ),
}
WAY_OUT = "go back to it, start anew with --overwrite, or choose another --output_dir"


class State(BaseModel):
    """state.json of a checkpoint."""

    model_config = ConfigDict(extra="forbid")
    progress: dict[str, bool | int | float]
    streams: list[dict[str, Any] | None] = Field(min_length=1)
    optimizer_values: dict[str, Any]
    schedule_step: int = Field(ge=0)
    scaler: dict[str, Any] | None
    ema_step: int | None


# --------------------------------------------------------------------------------------- before loading


def choose_checkpoint(recipe: Recipe, is_main: bool) -> tuple[Path, Manifest] | None:
    """The checkpoint that a recipe asks for, verified by the first process for all; None to begin at step 0.

    A recipe without a seed gets that of the run. Raises RecipeError if there is no such checkpoint, or if the
    recipe's settings do not fit it.
    """
    wanted = recipe.resume_from_checkpoint
    if wanted is None:
        return None
    answer: list[Any] = [None, None]
    if is_main:
        try:
            found = find_checkpoint(Path(recipe.output_dir), wanted)
            answer = [str(found[0]) if found else None, None]
        except RecipeError as error:
            answer = [None, str(error)]
    path, problem = from_first(answer)
    if problem:
        raise RecipeError(problem)
    if path is None:
        logger.info("%s has no checkpoint yet: the run starts anew.", recipe.output_dir)
        return None
    try:
        manifest = read_manifest(Path(path))
    except DamagedCheckpoint as error:
        raise RecipeError(
            f"{path} is seen by the first process only ({error}): put --output_dir on storage that all machines share"
        ) from None
    newest = list_checkpoints(Path(recipe.output_dir))[-1:]
    if wanted != "latest" and newest and int(newest[0].name.split("-")[1]) > manifest.step:
        logger.warning(
            "%s is newer than %s, to which --resume_from_checkpoint goes back; it is replaced when the run gets there.",
            newest[0],
            path,
        )
    if recipe.seed is None:
        recipe.seed = manifest.settings["seed"]
    compare_settings(recipe, manifest, path)
    return Path(path), manifest


def compare_settings(recipe: Recipe, manifest: Manifest, path: Path | str) -> None:
    """Tell what changed since the checkpoint. Raises RecipeError for what would not fit."""
    now, then = (in_texts(redacted, settings) for settings in (recipe.model_dump(mode="json"), manifest.settings))
    changed = [name for name, saved in then.items() if name in now and now[name] != saved]
    refused, told = [], []
    for name in changed:
        words = f"--{name} is {now[name]} and was {then[name]}"
        effect = EFFECTS[name]
        if name == "use_ema":
            effect = "refused" if recipe.use_ema else "told"
        elif name == "shuffle_block" and not recipe.streaming:
            effect = "free"
        elif name == "max_train_steps" and not recipe.lr_scheduler.startswith("constant"):
            words += f", by which the {recipe.lr_scheduler} schedule is drawn out anew"
            effect = "told"
        if effect == "refused":
            refused.append(words)
        elif effect == "told":
            told.append(words)
    if refused:
        raise RecipeError(f"{'; '.join(refused)} in {path}, whose state does not carry over: {WAY_OUT}")
    for words in told:
        logger.warning("%s in %s: the run goes on with the new value.", words, path)


def identity_of(training: Training) -> dict[str, Any]:
    """What the settings that are `compared` stand for; the same on all processes, which all have to call it."""
    recipe, unet = training.recipe, training.components.unet
    fingerprint = data_fingerprint(recipe) if training.accelerator.is_main_process else None
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    return {
        "base": redacted(recipe.pretrained_model_name_or_path or ""),
        "unet": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
        "prediction_type": training.objective.prediction_type,
        "data": redacted(" + ".join(source.flag for source in recipe.sources)),
        "data_fingerprint": from_first(fingerprint),
        "num_rows": training.num_rows,
        "global_batch_size": training.global_batch_size,
    }


def global_batch_size(recipe: Recipe, num_processes: int, manifest: Manifest | None) -> int:
    """Images of an optimizer step: those of the settings or, if only the number of processes changed, of the run."""
    size = recipe.train_batch_size * recipe.gradient_accumulation_steps * num_processes
    if manifest is None:
        return size
    settings = ("train_batch_size", "gradient_accumulation_steps")
    changed = any(getattr(recipe, name) != manifest.settings[name] for name in settings)
    return size if changed else manifest.identity["global_batch_size"]


def compare_identity(now: dict[str, Any], manifest: Manifest, path: Path) -> None:
    """As `compare_settings`, for what is known once data and model are loaded."""
    then = in_texts(redacted, manifest.identity)
    differs = {name for name, value in now.items() if name in then and then[name] != value}
    if "unet" in differs:
        raise RecipeError(
            f"the UNet of {now['base']} (configuration {now['unet']}) is another than that of {path} (of "
            f"{then['base']}, configuration {then['unet']}): {WAY_OUT}"
        )
    if "prediction_type" in differs:
        raise RecipeError(
            f"--prediction_type is {now['prediction_type']} and was {then['prediction_type']} in {path}: {WAY_OUT}"
        )
    if "global_batch_size" in differs:
        logger.warning(
            "The global batch (--train_batch_size x --gradient_accumulation_steps x processes) is %s and was %s in %s: "
            "the run goes on with the new one.",
            now["global_batch_size"], then["global_batch_size"], path,
        )  # fmt: skip
    if "base" in differs:
        logger.warning(
            "--pretrained_model_name_or_path is %s and was %s in %s: the VAE and text encoder are the new one's.",
            now["base"], then["base"], path,
        )  # fmt: skip
    if differs & {"data_fingerprint", "num_rows"}:
        logger.warning(
            "The data are %s (%s rows, fingerprint %s) and were %s (%s rows, fingerprint %s) in %s: the run goes on "
            "with the new ones, in another order.",
            now["data"], now["num_rows"], now["data_fingerprint"],
            then["data"], then["num_rows"], then["data_fingerprint"], path,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ load


def load_checkpoint(training: Training, path: Path, manifest: Manifest, identity: dict[str, Any]) -> Progress:
    """Restore weights, average, optimizer, schedule and scaler. Raises RecipeError if they do not fit."""
    recipe = training.recipe
    compare_identity(identity, manifest, path)
    try:
        state = State(**read_json(path / STATE))
        unet_tensors = load_file(path / "unet" / UNET_WEIGHTS)
        optimizer_tensors = load_file(path / OPTIMIZER)
        ema_tensors = load_file(path / "unet_ema" / UNET_WEIGHTS) if training.ema else {}
        weights = training.components.unet.state_dict()
        training.components.unet.load_state_dict(
            {name: divided_like(weights[name], tensor) for name, tensor in unet_tensors.items()}
        )
        _load_optimizer(training, {**optimizer_tensors, **state.optimizer_values})
        _load_schedule(training, state.schedule_step)
        if training.accelerator.scaler and state.scaler:
            training.accelerator.scaler.load_state_dict(state.scaler)
        if training.ema:
            assert state.ema_step is not None, "compare_settings refuses to begin with an average"
            training.ema.load(ema_tensors, state.ema_step)
        progress = Progress(**state.progress)  # type: ignore[arg-type]
    # Its hashes are right: it was written by another version, or made up. SafetensorError is no OSError.
    except Exception as error:
        if isinstance(error, AssertionError):
            raise
        words = " ".join(str(error).split())[:300]
        raise RecipeError(f"{path} does not fit this run ({type(error).__name__}: {words}): {WAY_OUT}") from error
    if (progress.global_step, progress.samples_seen) != (manifest.step, manifest.samples_seen):
        raise RecipeError(f"{path}: {STATE} and manifest name different steps: {WAY_OUT}")
    if recipe.streaming:
        progress.stream_state = joined_states(state.streams)
    return progress


def _load_optimizer(training: Training, flat: dict[str, Any]) -> None:
    """The state is the checkpoint's; learning rate, decay and the like are the recipe's, which may have changed."""
    optimizer = training.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = unflatten(flat)
    if saved and set(saved) != set(range(len(parameters))):
        raise ValueError(f"the optimizer's state is of {len(saved)} parameters and the model has {len(parameters)}")
    optimizer.load_state_dict(
        {
            "state": {number: _laid_out_as(parameters[number], values) for number, values in saved.items()},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )


def _load_schedule(training: Training, step: int) -> None:
    schedule = training.schedule
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step, "_last_lr": rates})
    for group, rate in zip(training.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _laid_out_as(parameter: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """Divide tensors of the parameter's shape as it is, and give them its memory format."""
    return {
        key: _laid_out_as(parameter, value)
        if isinstance(value, dict)
        else _tensor_laid_out_as(parameter, value)
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
        else value
        for key, value in state.items()
    }


def _tensor_laid_out_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return divided_like(parameter, value)
    # Fused optimizers walk the raw memory.
    return torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)


def flatten(state: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(PARAMETER/KEY, value) of an optimizer's state, whose values may be mappings again."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def unflatten(flat: dict[str, Any]) -> dict[int, Any]:
    """The inverse of `flatten`; the first level's keys are parameter numbers."""
    state: dict[Any, Any] = {}
    for name, value in flat.items():
        *parents, key = name.split("/")
        place = state
        for depth, parent in enumerate(parents):
            place = place.setdefault(int(parent) if depth == 0 else parent, {})
        place[key] = value
    return state
