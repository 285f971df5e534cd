"""Resume a run from a checkpoint: choose it, check that the settings still fit, and restore everything."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file

from sd_recipes.checkpoints.format import (
    MANIFEST,
    STATE,
    DamagedCheckpoint,
    Manifest,
    find_checkpoint,
    read_json,
    read_manifest,
)
from sd_recipes.data.identity import data_fingerprint
from sd_recipes.data.order import Order
from sd_recipes.data.stream import joined_states
from sd_recipes.errors import RecipeError, one_line
from sd_recipes.optimizers import SCHEDULE_FREE
from sd_recipes.recipe import Recipe, on_resume
from sd_recipes.redaction import in_texts, redacted
from sd_recipes.runtime.agreement import broadcast
from sd_recipes.runtime.out_of_memory import is_out_of_memory
from sd_recipes.training.state import Progress, TrainState

logger = logging.getLogger(__name__)


WAY_OUT = "go back to it, start over with --overwrite, or choose another --output_dir"


class ReaderState(BaseModel):
    """Where a reader of a stream's source stands."""

    model_config = ConfigDict(extra="allow")
    epoch: int = Field(ge=0)
    next_shard: int = Field(ge=0)
    turn: int = Field(ge=0)
    slots: list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]]


class LaneState(BaseModel):
    """Where a lane of a stream stands."""

    model_config = ConfigDict(extra="allow")
    block: int = Field(ge=0)
    waits: bool
    readers: list[ReaderState]


class StreamState(BaseModel):
    """Where a process's stream stands."""

    model_config = ConfigDict(extra="allow")
    num_lanes: int = Field(ge=1)
    shape: list[Annotated[int, Field(ge=1)]] = Field(min_length=2, max_length=2)
    round: int = Field(ge=0)
    done: int = Field(ge=0)
    epoch: int = Field(ge=0)
    lanes: dict[str, LaneState]


class QuietLossState(BaseModel):
    """The quiet loss, as `QuietLoss.state_dict` gives it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    objective: dict[str, Any]
    losses: list[Annotated[float, Field(ge=0)]]
    squares: list[Annotated[float, Field(ge=0)]]
    counts: list[Annotated[float, Field(ge=0)]]
    recent: list[Annotated[float, Field(gt=0)]]
    sum: float = Field(ge=0)
    num_steps: int = Field(ge=0)

    @model_validator(mode="after")
    def is_of_the_same_bins(self) -> QuietLossState:
        if not len(self.losses) == len(self.squares) == len(self.counts):
            raise ValueError("sums of losses, of their squares and of their numbers, in as many bins")
        return self


class StateFile(BaseModel):
    """state.json of a checkpoint: TrainState's values, and where the stream of each process stands."""

    model_config = ConfigDict(extra="forbid")
    progress: Progress
    optimizer: dict[str, Any]
    frozen: list[str] = []  # an earlier version froze none
    schedule_step: int = Field(ge=0)
    scaler: dict[str, Any] | None
    averages: dict[str, Annotated[int, Field(ge=0)]]
    quiet_loss: QuietLossState | None = None  # of an earlier version, which had none
    streams: list[StreamState | None] = Field(min_length=1)


class SavedSettings(BaseModel):
    """Those of a manifest's `settings` without which no run can resume."""

    model_config = ConfigDict(strict=True)
    seed: int = Field(ge=0, lt=2**63)
    train_batch_size: int = Field(ge=1)
    gradient_accumulation_steps: int = Field(ge=1)
    scale_lr: bool


class SavedIdentity(BaseModel):
    """What is compared, and reported, of a manifest's `identity`."""

    model_config = ConfigDict(strict=True)
    base: str
    parts: dict[str, str]
    prediction_type: str
    data: str
    data_fingerprint: Any
    num_rows: int | None
    held_out: str | None = None
    global_batch_size: int = Field(ge=1)
    begun: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None  # an epoch, and its batch size

    @field_validator("begun")
    @classmethod
    def is_an_epoch_and_a_size(cls, begun: list[int] | None) -> list[int] | None:
        if begun is not None and (begun[0] < 0 or begun[1] < 1):
            raise ValueError("an epoch and the size of its batches")
        return begun


# --------------------------------------------------------------------------------------- before loading


def choose_checkpoint(recipe: Recipe, is_main: bool) -> tuple[Path, Manifest] | None:
    """The checkpoint that a recipe asks for, verified by the first process for all; None to begin at step 0.

    Raises RecipeError if there is no such checkpoint, or if the recipe's settings do not fit it.
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
    path, problem = broadcast(answer)
    if problem:
        raise RecipeError(problem)
    if path is None:
        logger.info("%s has no checkpoint yet: the run starts from step 0.", recipe.output_dir)
        return None
    try:
        manifest = read_manifest(Path(path))
    except (DamagedCheckpoint, OSError) as error:
        raise RecipeError(
            f"{path} is seen only by the first process ({error}): put --output_dir on storage that all machines share"
        ) from None
    try:
        SavedSettings.model_validate(manifest.settings)
        SavedIdentity.model_validate(manifest.identity)
    except ValidationError as error:
        raise RecipeError(f"{path}: {MANIFEST} does not describe a run ({one_line(error)}): {WAY_OUT}") from None
    compare_settings(recipe, manifest, path)
    return Path(path), manifest


def compare_settings(recipe: Recipe, manifest: Manifest, path: Path | str) -> None:
    """Warn about what changed since the checkpoint. Raises RecipeError for what would not fit."""
    now, then = (in_texts(redacted, settings) for settings in (recipe.model_dump(mode="json"), manifest.settings))
    if recipe.seed is None:
        now["seed"] = then["seed"]  # which the run then uses
    changed = [name for name, saved in then.items() if name in now and now[name] != saved]
    refused, warned = [], []
    for name in changed:
        words = f"--{name} is {one_line(now[name])} and was {one_line(then[name])}"
        effect = on_resume(name)
        if name in ("use_ema", "ema_snapshots"):
            effect = "refused" if getattr(recipe, name) else "warned"
        elif name == "adam_beta1" and recipe.optimizer == SCHEDULE_FREE:
            effect = "refused"  # with it the evaluated weights follow from those that are saved
        elif name == "shuffle_block" and not recipe.streaming:
            effect = "free"
        if effect == "refused":
            refused.append(words)
        elif effect == "warned":
            warned.append(words)
    if refused:
        raise RecipeError(f"{'; '.join(refused)} in {path}, whose state does not carry over: {WAY_OUT}")
    for words in warned:
        logger.warning("%s in %s: the run continues with the new value.", words, path)


def identity_of(
    recipe: Recipe,
    state: TrainState,
    order: Order | None,
    *,
    prediction_type: str,
    num_rows: int | None,
    global_batch_size: int,
    num_steps: int,
    is_main: bool,
) -> dict[str, Any]:
    """What the settings that are `compared` stand for; the same on all processes, which all have to call it."""
    return {
        "base": redacted(recipe.pretrained_model_name_or_path or ""),
        "parts": {name: _config_hash(part.config) for name, part in state.parts.items()},
        "prediction_type": prediction_type,
        "data": redacted(" + ".join(source.flag for source in recipe.sources)),
        "data_fingerprint": broadcast(data_fingerprint(recipe) if is_main else None),
        "num_rows": num_rows,
        "held_out": recipe.validation_split if recipe.divides_rows else None,
        "global_batch_size": global_batch_size,
        "begun": order and order.begun and list(order.begun),
        "schedule": schedule_in_words(recipe, num_steps),
    }


def _config_hash(config: str) -> str:
    """Hash of a model's configuration, without the names that begin with an underscore: they do not change it."""
    settings = {name: value for name, value in json.loads(config).items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def schedule_in_words(recipe: Recipe, num_steps: int) -> str:
    """A schedule's name and, where the rates depend on it, its length."""
    name = recipe.lr_scheduler
    return name if name.startswith("constant") else f"{name} over {num_steps} steps"


def global_batch_size(recipe: Recipe, num_processes: int, manifest: Manifest | None) -> int:
    """Images per optimizer step: by the settings or, if only the number of processes changed, the same as before."""
    size = recipe.train_batch_size * recipe.gradient_accumulation_steps * num_processes
    if manifest is None:
        return size
    settings = ("train_batch_size", "gradient_accumulation_steps")
    changed = any(getattr(recipe, name) != manifest.settings[name] for name in settings)
    return size if changed else manifest.identity["global_batch_size"]


def finish_epoch(order: Order, manifest: Manifest) -> Order:
    """The order in which a run resumes: with buckets, an epoch that was begun keeps its batches.

    Another global batch size would deal it out again, so that some of its rows came twice and others never.
    """
    then, epoch = manifest.identity, manifest.samples_seen // order.num_rows
    if order.buckets is None or manifest.samples_seen % order.num_rows == 0 or then["num_rows"] != order.num_rows:
        return order
    begun = then.get("begun")  # by an earlier run, which the checkpoint's run resumed with yet another size
    size = begun[1] if begun and begun[0] == epoch else then["global_batch_size"]
    return order if size == order.global_batch_size else replace(order, begun=(epoch, size))


def compare_identity(now: dict[str, Any], manifest: Manifest, path: Path) -> None:
    """Like `compare_settings`, for what is known once data and model are loaded."""
    then = in_texts(redacted, manifest.identity)
    differs = {name for name, value in now.items() if name in then and then[name] != value}
    if now["parts"].keys() != then["parts"].keys():
        raise RecipeError(
            f"this run trains {', '.join(now['parts'])}, and {path} is of one that trains {', '.join(then['parts'])}: "
            f"{WAY_OUT}"
        )
    for name, config in now["parts"].items():
        if config != then["parts"][name]:
            raise RecipeError(
                f"the {name} of {now['base']} (configuration {config}) differs from that of {path} (of "
                f"{then['base']}, configuration {then['parts'][name]}): {WAY_OUT}"
            )
    if "prediction_type" in differs:
        raise RecipeError(
            f"--prediction_type is {now['prediction_type']} and was {then['prediction_type']} in {path}: {WAY_OUT}"
        )
    if "global_batch_size" in differs:
        words = "the run continues with the new one"
        if now["begun"]:
            words += f" after this epoch, whose buckets are dealt out in batches of {now['begun'][1]}"
        if manifest.settings["scale_lr"]:
            words += ", and with the learning rate of --scale_lr for it"
        logger.warning(
            "The global batch (--train_batch_size x --gradient_accumulation_steps x processes) is %s and was %s in %s: "
            "%s.",
            now["global_batch_size"], then["global_batch_size"], path, words,
        )  # fmt: skip
    if "schedule" in differs:
        logger.warning(
            "The learning rate's schedule is %s and was %s in %s (--lr_scheduler, --max_train_steps, or "
            "--num_train_epochs, rows and batch): it is computed again, and its value may jump.",
            now["schedule"], then["schedule"], path,
        )  # fmt: skip
    if "base" in differs:
        logger.warning(
            "--pretrained_model_name_or_path is %s and was %s in %s: the VAE and text encoder are the new one's.",
            now["base"], then["base"], path,
        )  # fmt: skip
    if "held_out" in differs:
        logger.warning(
            "--validation_split is %s and was %s in %s: rows change sides, and the held-out loss may be of rows that "
            "the run was trained on.", now["held_out"], then["held_out"], path,
        )  # fmt: skip
    elif differs & {"data_fingerprint", "num_rows"}:
        logger.warning(
            "The data are %s (%s rows, fingerprint %s) and were %s (%s rows, fingerprint %s) in %s: the run continues "
            "with the new ones, in another order.",
            now["data"], now["num_rows"], now["data_fingerprint"],
            then["data"], then["num_rows"], then["data_fingerprint"], path,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ load


def load_checkpoint(state: TrainState, path: Path, manifest: Manifest, *, is_main: bool) -> None:
    """Restore the state of a checkpoint that was compared with this run.

    Raises RecipeError if it does not fit, if there is no memory for it, or if it cannot be read, and says which.
    """
    try:
        # Its hashes are right: if it does not fit, it was written by another version, or made up.
        try:
            saved = StateFile(**read_json(path / STATE))
            if (saved.progress.global_step, saved.progress.samples_seen) != (manifest.step, manifest.samples_seen):
                raise ValueError(f"{STATE} and {MANIFEST} name different steps")
            if saved.schedule_step > manifest.step:
                raise ValueError(f"{STATE} has a schedule at step {saved.schedule_step} after {manifest.step} steps")
            values = saved.model_dump(exclude={"streams"})
            wanted = state.state_dict(only_layout=True).tensors
            if missing := sorted(wanted.keys() - manifest.files.keys()):
                raise ValueError(f"it has no {missing[0]}")
            tensors = {name: load_file(path / name) for name in wanted}
            state.check_state_dict(tensors, values)
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            if "os error" in str(error):  # in a SafetensorError, which is not an OSError
                raise OSError(str(error)) from error
            raise RecipeError(
                f"{path} does not fit this run ({type(error).__name__}: {one_line(error)}): {WAY_OUT}"
            ) from error
        state.load_state_dict(tensors, values)
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read ({one_line(error)}): check the disk and the permissions there, and repeat the "
            "command"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RecipeError(
            f"there is not enough memory to load {path} ({one_line(error)}): make room on the device and in host "
            "memory, and repeat the command; the checkpoint is whole"
        ) from error
    progress = state.progress
    progress.stream_state = joined_states([each.model_dump() if each else None for each in saved.streams])
    if not is_main:
        progress.loss_sum = 0.0  # it is the sum over all processes
    logger.info("Resuming from %s: step %d, %d samples.", path, progress.global_step, progress.samples_seen)
