"""Checkpoints of diffusers' train_text_to_image.py: recognised, and taken over into a run of this program.

accelerate's `save_state` wrote them:

checkpoint-500/
  unet/, unet_ema/       the UNet, and its average with --use_ema
  optimizer.bin          the optimizer's state by the number of the parameter, a pickle
  scheduler.bin          the schedule, which here follows from the step
  random_states_0.pkl    of generators that are not used here

Read are safetensors, JSON, and optimizer.bin by torch's `weights_only`, which runs no code.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sd_recipes.checkpoints.format import FORMAT, MANIFEST, MAX_JSON_BYTES, Manifest, list_checkpoints, step_of
from sd_recipes.errors import RecipeError, one_line
from sd_recipes.flags import written_settings
from sd_recipes.model.lora_files import LORA_FILE
from sd_recipes.reading import read_text
from sd_recipes.recipe import Recipe
from sd_recipes.training.state import AVERAGE, CONFIG, OPTIMIZER, Progress, TrainedPart, TrainState

logger = logging.getLogger(__name__)

FILES = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl")
ADAM_STATE = {"step", "exp_avg", "exp_avg_sq"}


def is_of_diffusers(path: Path) -> bool:
    """Whether accelerate wrote that folder, as it does for diffusers' scripts."""
    is_named_so = re.fullmatch(r"checkpoint-\d{1,18}", path.resolve().name)
    return bool(is_named_so) and not (path / MANIFEST).exists() and any((path / name).is_file() for name in FILES)


def refuse_folder(output_dir: Path, model: str | None) -> None:
    """Raises RecipeError if the folder holds checkpoints of diffusers' script, with the ways to go on from them."""
    found = [path for path in list_checkpoints(output_dir) if is_of_diffusers(path)]
    if found:
        names, newest = ", ".join(path.name for path in found[-3:]), found[-1]
        ways = only_unet(newest, model)
        if (newest / "unet").is_dir():
            ways = f"add --resume_from_checkpoint {newest}, which takes over UNet, optimizer and average, or {ways}"
        raise RecipeError(
            f"--output_dir {output_dir} holds no run of this program, but checkpoints of diffusers' script ({names}): "
            f"choose a new or an empty folder, and {ways}"
        )


def only_unet(path: Path, model: str | None) -> str:
    """How to start from a checkpoint's UNet and nothing else of it."""
    if (lora := path / LORA_FILE).is_file():
        return f"start from its LoRA alone by --lora_weights {lora}"
    if not (path / "unet").is_dir():
        return f"start from the model itself, since {path.name} has no folder unet/"
    average = f" ({path.name}/unet_ema is its average)" if (path / "unet_ema").is_dir() else ""
    return f"start from its UNet alone by --pretrained_model_name_or_path {path / 'unet'} --base {model}{average}"


def taken_over(recipe: Recipe, num_processes: int) -> tuple[Path, Manifest] | None:
    """The checkpoint of diffusers' script that a recipe resumes from, and a manifest as this run would write it.

    None if it resumes from none, or from one of this program. The position in the data is that of as many full global
    batches as there were steps: diffusers' script had another order, so none could be exact.
    """
    path = Path(recipe.resume_from_checkpoint or "")
    if recipe.resume_from_checkpoint in (None, "latest") or not is_of_diffusers(path):
        return None
    if recipe.streaming:
        raise RecipeError(
            f"--resume_from_checkpoint {path} is of diffusers' script and knows no position in a stream: "
            f"{only_unet(path, recipe.pretrained_model_name_or_path)}"
        )
    batch_size = recipe.train_batch_size * recipe.gradient_accumulation_steps * num_processes
    step = step_of(path.resolve())
    manifest = Manifest(
        format=FORMAT,
        step=step,
        samples_seen=step * batch_size,
        world_size=num_processes,
        versions={},
        settings=written_settings(recipe),
        identity={"global_batch_size": batch_size, "num_rows": None},
    )
    return path, manifest


def load_from_diffusers(state: TrainState, path: Path, manifest: Manifest, recipe: Recipe) -> None:
    """Take over UNet, optimizer and average. Raises RecipeError if they do not fit, with the way to use the UNet."""
    try:
        (part,) = state.parts.values()  # diffusers' script trains the UNet
        tensors = {f"{part.name}/{part.weights_file}": load_file(path / part.name / part.weights_file)}
        averages = {}
        if part.average:
            tensors[f"{part.name}{AVERAGE}/{part.weights_file}"], averages[part.name] = _average(path, part)
        if recipe.optimizer != "adamw":
            raise ValueError(f"--optimizer is {recipe.optimizer}, and adamw's state is all that can be taken over")
        tensors[OPTIMIZER] = _adam_state(path / "optimizer.bin", state)
        progress = Progress(manifest.step, manifest.samples_seen, logged_step=manifest.step)
        values = {
            "progress": vars(progress),
            "optimizer": {},
            "schedule_step": manifest.step,
            "scaler": None,
            "quiet_loss": None,
            "averages": averages,
        }
        state.check_state_dict(tensors, values)
    # Whatever safetensors, pickle and torch raise for a file that is not what its name says, and a misfit.
    except Exception as error:
        raise RecipeError(
            f"--resume_from_checkpoint {path}, of diffusers' script, cannot be taken over ({one_line(error, 120)}): "
            f"drop it, and {only_unet(path, recipe.pretrained_model_name_or_path)}"
        ) from error
    state.load_state_dict(tensors, values)
    logger.info(
        "Took over %s of diffusers' script: UNet, optimizer%s; the run goes on at step %d, in an order of its own.",
        path, " and average" if averages else "", manifest.step,
    )  # fmt: skip


def _average(path: Path, part: TrainedPart) -> tuple[dict[str, torch.Tensor], int]:
    """A part's averaged weights, and the number of updates behind them; from its weights where it has none."""
    folder = path / f"{part.name}{AVERAGE}"
    if not folder.is_dir():
        logger.warning("%s has no average: --use_ema begins one from its UNet.", path)
        return load_file(path / part.name / part.weights_file), 0
    config = json.loads(read_text(folder / CONFIG, MAX_JSON_BYTES))
    return load_file(folder / part.weights_file), int(config["optimization_step"])


def _adam_state(path: Path, state: TrainState) -> dict[str, torch.Tensor]:
    """AdamW's tensors as PART/PARAMETER/KEY. Raises ValueError if they are not those of the state's parameters.

    Numbers become names by the order of the parameters, which is the model's own.
    """
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    parameters = state.parameters
    by_number = saved["state"]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if numbers != list(range(len(parameters))) or by_number.keys() != set(numbers):
        raise ValueError(f"{path.name} has the state of {len(by_number)} parameters, and the model {len(parameters)}")
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, parameter) in enumerate(parameters.items()):
        of_parameter = by_number[number]
        if of_parameter.keys() != ADAM_STATE:
            raise ValueError(f"{path.name} is not AdamW's: it has {', '.join(sorted(map(str, of_parameter)))}")
        for key in ("exp_avg", "exp_avg_sq"):
            if of_parameter[key].shape != parameter.shape:
                raise ValueError(f"{key} of {name} is {[*of_parameter[key].shape]}, not {[*parameter.shape]}")
        tensors |= {f"{name}/{key}": torch.as_tensor(value) for key, value in of_parameter.items()}
    return tensors
