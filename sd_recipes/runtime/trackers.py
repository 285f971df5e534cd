"""Where figures go: to the trackers through accelerate, and to metrics.jsonl in the run's folder; and incidents."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from sd_recipes.errors import RecipeError, one_line
from sd_recipes.flags import recipe_text
from sd_recipes.recipe import Recipe
from sd_recipes.redaction import in_texts, redacted
from sd_recipes.runtime.history import HistoryFile, read_lines
from sd_recipes.writing import replace_file

logger = logging.getLogger(__name__)

VALIDATION = "validation"  # the folder of the tables of errors
PROFILE = "profile"  # the folder of what was profiled
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

    Incidents go to incidents.jsonl, {"step": …, "kind": …, "rows": […], …}, which is there once there has been one.

    Each on its own: one that fails, on a full disk or without its server, is reported once and not tried again. The
    others and the run continue. Only the two files are tried again, since the disk may have room by then.
    """

    def __init__(self, accelerator: Accelerator, recipe: Recipe) -> None:
        self.accelerator = accelerator
        self.recipe = recipe
        self.path = Path(recipe.output_dir) / "metrics.jsonl"
        self.metrics = HistoryFile(self.path, _are_figures)
        self.incidents = HistoryFile(self.path.with_name("incidents.jsonl"), _is_incident)

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
            self.metrics.start_at(step)
            if os.path.lexists(self.incidents.path):
                self.incidents.start_at(step)

    def log(self, values: dict[str, Any], step: int) -> None:
        self._each(lambda tracker: tracker.log(values, step=step))
        if self.accelerator.is_main_process:
            self.metrics.append({"step": step, **values})

    def record(self, kind: str, step: int, **details: Any) -> None:
        """Write an incident of a step into incidents.jsonl."""
        if self.accelerator.is_main_process:
            self.incidents.append(in_texts(redacted, {"step": step, "kind": kind, **details}))

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


def read_metrics(path: Path, *, tell: bool = False) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, oldest first, as `read_lines` reads them. Raises RecipeError."""
    return read_lines(path, _are_figures, tell=tell)


def _are_figures(line: dict[str, Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in line.values())


def read_incidents(path: Path, *, tell: bool = False) -> list[dict[str, Any]]:
    """The lines of an incidents.jsonl, oldest first, as `read_lines` reads them. Raises RecipeError."""
    return read_lines(path, _is_incident, tell=tell)


def _is_incident(line: dict[str, Any]) -> bool:
    return isinstance(line.get("kind"), str) and isinstance(line.get("rows"), list)


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
