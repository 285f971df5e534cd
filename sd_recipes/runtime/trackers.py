"""Where figures go: to the trackers through accelerate, and to metrics.jsonl in the run's folder."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from sd_recipes.errors import RecipeError, one_line
from sd_recipes.flags import recipe_text
from sd_recipes.reading import StrangeFile, open_regular
from sd_recipes.recipe import Recipe
from sd_recipes.redaction import in_texts, redacted
from sd_recipes.writing import replacing

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 2**16  # of metrics.jsonl; real ones are below 1 KiB
VALIDATION = "validation"  # the folder of the tables of errors
EVALUATION, EVALUATION_RESULTS = "evaluation", "evaluation.json"  # what `sd-recipes evaluate` leaves
SAMPLE = re.compile(r"step-[0-9]{6,18}\.png")  # as a validation names its pictures
TABLE = re.compile(r"step-[0-9]{6,18}\.parquet")
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet_ml"}


def check_tracker(report_to: str) -> None:
    """Raise RecipeError if the tracker's package is not installed."""
    package = PACKAGES.get(report_to)
    if package and importlib.util.find_spec(package) is None:
        raise RecipeError(f"--report_to {report_to} needs the package {package}: pip install {package}, or use none")


class Tracker:
    """Logs to `--report_to` and to metrics.jsonl: one line per step, {"step": …, name: value, …}.

    Each on its own: one that fails, on a full disk or without its server, is reported once and not tried again. The
    others and the run continue. Only metrics.jsonl is tried again, since the disk may have room by then.
    """

    def __init__(self, accelerator: Accelerator, recipe: Recipe) -> None:
        self.accelerator = accelerator
        self.recipe = recipe
        self.path = Path(recipe.output_dir) / "metrics.jsonl"
        self.failed = False
        self.line_is_torn = False  # it may be, if the disk became full in the middle of it

    def start_at(self, step: int) -> None:
        """Save the resolved recipe, open the trackers, and drop what an earlier run logged and drew after `step`."""
        recipe = self.recipe
        settings = {
            key: value
            for key, value in in_texts(redacted, recipe.model_dump(exclude={"hub_token"})).items()
            if value is not None
        }
        settings = {
            key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in settings.items()
        }
        # When it reads, TensorBoard then drops all events of earlier files from this step on.
        purges = {"tensorboard": {"purge_step": step + 1 if step else 0}}
        if self.accelerator.is_main_process:
            # Before anything else: it marks the folder as a run's, wherever the start may be cut short.
            replace_file(self.path.parent / "recipe.yaml", recipe_text(recipe))
        try:
            self.accelerator.init_trackers(recipe.tracker_project_name, None if step else settings, init_kwargs=purges)
        except Exception as error:  # see _each
            raise RecipeError(
                f"--report_to {recipe.report_to} cannot be started ({one_line(error)}): fix it, or use none"
            ) from error
        if self.accelerator.is_main_process:
            for found in [*list_samples(self.path.parent), *list_tables(self.path.parent)]:
                if step == 0 or step_of(found) > step:
                    found.unlink()
            kept = [line for line in read_metrics(self.path, tell=True) if line["step"] <= step] if step else []
            replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def log(self, values: dict[str, Any], step: int) -> None:
        self._each(lambda tracker: tracker.log(values, step=step))
        if self.accelerator.is_main_process:
            begun, self.line_is_torn = "\n" if self.line_is_torn else "", True
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(f"{begun}{json.dumps({'step': step, **values})}\n")
                self.line_is_torn = False
            except OSError as error:  # a disk may have room again
                if not self.failed:
                    self.failed = True
                    logger.warning("%s cannot be written (%s): training continues without it.", self.path, error)

    def flush(self) -> None:
        """Write out what the trackers buffer, so that a kill does not lose it."""
        if self.accelerator.is_main_process:
            self._each(lambda tracker: tracker.writer.flush() if tracker.name == "tensorboard" else None)

    def close(self) -> None:
        """Let the trackers write what they hold, however the run ends. Waits for no other process."""
        self._each(lambda tracker: tracker.finish())
        self.accelerator.trackers = []

    def _each(self, call: Callable[[Any], None]) -> None:
        """Do something with each tracker. One that fails is reported and dropped."""
        for tracker in list(self.accelerator.trackers):
            try:
                call(tracker)
            # Their errors have no common base: OSError of a full disk, those of an unreachable server, wandb's own.
            except Exception as error:
                self.accelerator.trackers.remove(tracker)
                words = one_line(error)
                logger.warning("%s fails (%s): training continues without it.", tracker.name, words)

    def log_pictures(self, pictures: list[Image.Image], step: int) -> None:
        """Log pictures of one size under the name `validation`, to trackers that take pictures."""
        array = np.stack([np.asarray(picture) for picture in pictures])

        def log_images(tracker: Any) -> None:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": array}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"validation": pictures}, step=step)

        self._each(log_images)


def replace_file(path: Path, text: str) -> None:
    """Write a text so that a kill leaves the old or the new one."""
    with replacing(path) as beside, beside.open("x", encoding="utf-8") as file:
        file.write(text)


def read_metrics(path: Path, *, tell: bool = False) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, oldest first; none if there is no such file.

    A run that was killed, or had no room, may have left a torn line anywhere: what is not a line of figures is dropped,
    with a warning if `tell` is set. Raises RecipeError if it is not a regular file.
    """
    lines: list[dict[str, Any]] = []
    dropped: list[int] = []
    try:
        with open_regular(path) as file:
            for number, content in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
                line = _figures(content)
                if line is not None:
                    lines.append(line)
                elif content.strip():
                    dropped.append(number)
    except FileNotFoundError:
        return []
    except StrangeFile as error:
        raise RecipeError(f"{path} {error}: remove it, or choose another --output_dir") from None
    if dropped and tell:
        logger.warning("%s: dropped %d torn or malformed lines: %s", path, len(dropped), _numbers(dropped))
    return lines


def _numbers(lines: list[int]) -> str:
    return ", ".join(map(str, lines[:5])) + (" and more" if len(lines) > 5 else "")


def _figures(content: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, or None if it is not one."""
    try:
        line = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    return line if all(isinstance(value, (int, float)) for value in line.values()) else None


def list_samples(output_dir: Path) -> list[Path]:
    """The pictures that validations drew, in order of steps; other files there are left out."""
    return _of_steps(output_dir / "samples", SAMPLE)


def list_tables(output_dir: Path) -> list[Path]:
    """The tables of errors that validations wrote, in order of steps."""
    return _of_steps(output_dir / VALIDATION, TABLE)


def _of_steps(folder: Path, name: re.Pattern[str]) -> list[Path]:
    found = [path for path in folder.glob("step-*") if name.fullmatch(path.name)]
    return sorted((path for path in found if path.is_file() and not path.is_symlink()), key=step_of)


def step_of(path: Path) -> int:
    """The step after which a picture was drawn, or a table written."""
    return int(path.stem.removeprefix("step-"))
