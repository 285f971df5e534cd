"""The state of a run in a folder: safetensors and JSON, nothing that runs code when it is read.

checkpoint-500/
  unet/                  loads as a UNet2DConditionModel
  unet_ema/              the averaged weights, likewise, with --use_ema
  optimizer.safetensors  the optimizer's tensors, named PARAMETER/KEY
  state.json             position, schedule, loss scaler, versions and the optimizer's other values
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import sd_recipes
from sd_recipes.recipe import RecipeError

if TYPE_CHECKING:
    from sd_recipes.build import Training

logger = logging.getLogger(__name__)

FORMAT = 1
# Settings whose change makes a resumed run differ from the uninterrupted one, and is told.
REMEMBERED = (
    "seed", "prediction_type", "snr_gamma", "noise_offset", "input_perturbation", "dream_training", "resolution",
    "center_crop", "crop", "random_flip", "aspect_ratio_buckets", "bucket_step", "max_upscale", "caption_dropout",
    "caption_template", "shuffle_tags", "long_captions", "shuffle_block", "train_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2",
    "adam_weight_decay", "adam_epsilon", "sgd_momentum", "max_grad_norm", "use_ema", "ema_decay",
)  # fmt: skip
UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class Progress:
    """Where a run stands. `samples_seen` is its position in the data and in the random draws."""

    global_step: int = 0  # global batches done
    samples_seen: int = 0
    stream_state: dict[str, Any] | None = None  # where this process's stream stands, if there is one


def save_unet(unet: UNet2DConditionModel, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write `tensors` with the UNet's configuration, so that the folder loads as a UNet2DConditionModel."""
    unet.save_config(folder)
    save_file(_on_cpu(tensors), folder / UNET_WEIGHTS, metadata={"format": "pt"})


def save_checkpoint(
    training: Training, progress: Progress, output_dir: Path, streams: list[dict[str, Any] | None]
) -> Path:
    """Write checkpoint-N beside its final place, rename it, then remove those beyond the limit.

    `streams` are the positions of all processes' streams.
    """
    final = output_dir / f"checkpoint-{progress.global_step}"
    temporary = output_dir / f".{final.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    unet = training.components.unet
    save_unet(unet, unet.state_dict(), temporary / "unet")
    if training.ema:
        save_unet(unet, training.ema.named_tensors(), temporary / "unet_ema")
    optimizer_state = training.optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in _flatten(optimizer_state["state"]):
        (tensors if isinstance(value, torch.Tensor) else values)[name] = value
    save_file(_on_cpu(tensors), temporary / "optimizer.safetensors")
    scaler = training.accelerator.scaler
    state = {
        "format": FORMAT,
        "versions": {
            "sd-recipes": sd_recipes.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "progress": {"global_step": progress.global_step, "samples_seen": progress.samples_seen},
        "streams": streams,
        "num_rows": training.num_rows,
        "optimizer": {
            "name": training.recipe.optimizer,
            "values": values,
        },
        "schedule_step": training.schedule.last_epoch,
        "settings": {name: getattr(training.recipe, name) for name in REMEMBERED},
        "scaler": scaler.state_dict() if scaler else None,
        "ema_step": training.ema.model.optimization_step if training.ema else None,
    }
    (temporary / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _prune(final, training.recipe.checkpoints_total_limit)
    return final


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    found = {
        int(match[1]): path
        for path in output_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "state.json").is_file()
    }
    return [found[step] for step in sorted(found)]


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The newest checkpoint for `latest`, or None; otherwise the one at `wanted`, or of that name in the folder.

    Raises RecipeError, listing what there is, if a checkpoint was named that is not one.
    """
    checkpoints = list_checkpoints(output_dir)
    if wanted == "latest":
        return checkpoints[-1] if checkpoints else None
    for path in (Path(wanted), output_dir / wanted):
        if (path / "state.json").is_file():
            return path
    raise RecipeError(
        f"--resume_from_checkpoint {wanted}: no checkpoint there; {output_dir} has "
        f"{[path.name for path in checkpoints] or 'none'}"
    )


def load_checkpoint(training: Training, path: Path) -> Progress:
    """Restore weights, average, optimizer, schedule and scaler. Raises RecipeError if they do not fit."""
    try:
        state = json.loads((path / "state.json").read_text())
        unet_tensors = load_file(path / "unet" / UNET_WEIGHTS)
        optimizer_tensors = load_file(path / "optimizer.safetensors")
        ema_tensors = (
            load_file(path / "unet_ema" / UNET_WEIGHTS) if training.ema and state["ema_step"] is not None else None
        )
    # SafetensorError is no subclass of OSError.
    except Exception as error:
        raise RecipeError(f"--resume_from_checkpoint {path}: cannot be read: {error}") from error
    _check_same_run(training, state, path)
    try:
        training.components.unet.load_state_dict(unet_tensors)
    except RuntimeError as error:
        words = " ".join(str(error).split())[:200]
        raise RecipeError(f"--resume_from_checkpoint {path}: is of another UNet: {words}") from None

    # The state is the checkpoint's; learning rate, decay and the like are the recipe's, which may have changed.
    optimizer_state = _unflatten({**optimizer_tensors, **state["optimizer"]["values"]})
    parameters = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    training.optimizer.load_state_dict(
        {
            "state": {number: _laid_out_as(parameters[number], values) for number, values in optimizer_state.items()},
            "param_groups": training.optimizer.state_dict()["param_groups"],
        }
    )
    schedule = training.schedule
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": state["schedule_step"]})
    rates = [
        base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    schedule.load_state_dict({**schedule.state_dict(), "_last_lr": rates})
    for group, rate in zip(training.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    if training.accelerator.scaler and state["scaler"]:
        training.accelerator.scaler.load_state_dict(state["scaler"])
    if training.ema:
        if ema_tensors is None:
            raise RecipeError(f"--use_ema: {path} has no averaged weights; drop the flag, or start anew")
        training.ema.load(ema_tensors, state["ema_step"])
    streams = state.get("streams", [None])
    if training.recipe.streaming and len(streams) != training.accelerator.num_processes:
        raise RecipeError(
            f"{path}: the stream was read by {len(streams)} processes and its position is theirs; continue with as many"
        )
    stream_state = streams[training.accelerator.process_index] if training.recipe.streaming else None
    return Progress(**state["progress"], stream_state=stream_state)


def _check_same_run(training: Training, state: dict[str, Any], path: Path) -> None:
    if state["format"] != FORMAT:
        raise RecipeError(f"{path} has checkpoint format {state['format']}; this version reads {FORMAT}")
    if state["optimizer"]["name"] != training.recipe.optimizer:
        raise RecipeError(
            f"--optimizer {training.recipe.optimizer}: {path} was written with {state['optimizer']['name']}, whose "
            f"state does not carry over; use --optimizer {state['optimizer']['name']}, or start anew"
        )
    for name, saved in state["settings"].items():
        now = getattr(training.recipe, name)
        if now != saved:
            logger.warning("--%s is %s and was %s in %s: the run goes on with the new value.", name, now, saved, path)
    if state["num_rows"] != training.num_rows:
        logger.warning(
            "The data set has %s rows and had %s: the order of the rows is another from here on.",
            training.num_rows,
            state["num_rows"],
        )


def _prune(newest: Path, limit: int | None) -> None:
    """Remove the oldest beyond `limit`: after the new one stands, so that a crash leaves at least one."""
    if limit is not None:
        others = [path for path in list_checkpoints(newest.parent) if path != newest]
        for path in others[: max(0, len(others) + 1 - limit)]:
            logger.info("Removing %s (--checkpoints_total_limit %d)", path, limit)
            shutil.rmtree(path)


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What safetensors can write: contiguous, and nothing shared (AdamW8bit shares its tables among parameters)."""
    copies: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        copies[name] = copy.clone() if copy.data_ptr() in seen else copy
        seen.add(copy.data_ptr())
    return copies


def _laid_out_as(parameter: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """Give tensors of the parameter's shape its memory format: fused optimizers walk the raw memory."""
    return {
        key: _laid_out_as(parameter, value)
        if isinstance(value, dict)
        else torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
        else value
        for key, value in state.items()
    }


def _flatten(state: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _unflatten(flat: dict[str, Any]) -> dict[Any, Any]:
    """The inverse of _flatten; the first level's keys are parameter numbers."""
    state: dict[Any, Any] = {}
    for name, value in flat.items():
        *parents, key = name.split("/")
        place = state
        for depth, parent in enumerate(parents):
            place = place.setdefault(int(parent) if depth == 0 else parent, {})
        place[key] = value
    return state
