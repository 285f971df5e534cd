"""Numbers out: to the trackers through accelerate, and to metrics.jsonl beside the run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from sd_recipes.recipe import Recipe, RecipeError, recipe_text

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet_ml"}


def check_tracker(report_to: str) -> None:
    """Raise RecipeError if the tracker's package is not installed."""
    package = PACKAGES.get(report_to)
    if package and importlib.util.find_spec(package) is None:
        raise RecipeError(f"--report_to {report_to} needs the package {package}: pip install {package}, or use none")


class Tracker:
    """Logs to `--report_to` and to metrics.jsonl: one line a step, {"step": …, name: value, …}."""

    def __init__(self, accelerator: Accelerator, recipe: Recipe) -> None:
        self.accelerator = accelerator
        self.recipe = recipe
        self.path = Path(recipe.output_dir) / "metrics.jsonl"

    def start_at(self, step: int) -> None:
        """Open the trackers, save the resolved recipe, and drop what an earlier run logged and drew after `step`."""
        recipe = self.recipe
        settings = {
            key: value for key, value in recipe.model_dump().items() if value is not None and key != "hub_token"
        }
        settings = {
            key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in settings.items()
        }
        self.accelerator.init_trackers(recipe.tracker_project_name, settings)
        if self.accelerator.is_main_process:
            (self.path.parent / "recipe.yaml").write_text(recipe_text(recipe))
            for picture in (self.path.parent / "samples").glob("step-*.png"):
                if step == 0 or int(picture.stem.removeprefix("step-")) > step:
                    picture.unlink()
            kept = [line for line in read_metrics(self.path) if line["step"] <= step] if step else []
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def log(self, values: dict[str, Any], step: int) -> None:
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def log_pictures(self, pictures: list[Image.Image], step: int) -> None:
        """(N, H, W, 3) under the name `validation`, where the tracker takes pictures."""
        array = np.stack([np.asarray(picture) for picture in pictures])
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": array}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"validation": pictures}, step=step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, oldest first; none if there is no such file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    # A run that was killed may have left half a last line.
    return [json.loads(line) for line in lines if line.endswith("}")]
