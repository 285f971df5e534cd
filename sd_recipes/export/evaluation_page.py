"""The page and the table of an evaluation: figures side by side, pictures, and the nearest training pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from sd_recipes.evaluation.bootstrap import Score
from sd_recipes.evaluation.figures import NAMES, NUM_BINS
from sd_recipes.evaluation.latent_bits import LatentBits
from sd_recipes.evaluation.picture_scores import SCORES, Neighbours
from sd_recipes.export.bit_pages import bits_content, summary_rows
from sd_recipes.export.pages import picture_uri, render_page
from sd_recipes.redaction import in_texts, redacted
from sd_recipes.writing import replace_file

PAGE = "evaluation.html"
SHOWN_PICTURES, SHOWN_COPIES, SIDE = 24, 8, 128
FIGURES = {
    "validation_loss": "held-out loss",
    "train_subset_loss": "loss of training rows",
    "validation_gap": "gap",
    "image_text_score": "image-text score",
}


@dataclass
class Evaluated:
    """What was measured of one run, checkpoint or pipeline."""

    name: str
    errors: pa.Table | None
    figures: dict[str, float]
    prompts: list[str]
    pictures: list[Image.Image]
    num_timesteps: int
    run: Path | None  # whose weights they are
    scores: dict[str, Score] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # scores that there are not, and why
    neighbours: Neighbours | None = None
    bits: LatentBits | None = None
    bit_figures: dict[str, Any] | None = None  # what the bits say


def figure_rows(evaluated: Sequence[Evaluated]) -> list[list[str]]:
    """A table with a head and a row for each figure that any of them has, a column for each of them."""
    rows = [["", *(each.name for each in evaluated)]]
    for name, title in FIGURES.items():
        if any(name in each.figures for each in evaluated):
            rows.append([title, *(_number(each.figures.get(name)) for each in evaluated)])
    for name, title in SCORES.items():
        if any(name in each.scores for each in evaluated):
            rows.append([title, *(_with_interval(each.scores.get(name)) for each in evaluated)])
    return rows + summary_rows([each.bit_figures for each in evaluated])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _of_bin(figures: Mapping[str, float], number: int) -> str:
    """The losses in a bin of the timesteps, of held-out and of training rows."""
    return " / ".join(_number(figures.get(f"{name}_loss_bin_{number}")) for name in NAMES.values())


def _with_interval(score: Score | None) -> str:
    return "-" if score is None else f"{score.value:.3g} [{score.low:.3g}, {score.high:.3g}]"


def write_evaluation_page(
    evaluated: Sequence[Evaluated], training_pictures: Sequence[Image.Image], features: str | None, output_dir: Path
) -> Path:
    """Write evaluation.html, one file; returns its path. Raises OSError."""
    head, *rows = figure_rows(evaluated)
    bins = [
        [f"{10 * number} – {10 * number + 10} %", *(_of_bin(each.figures, number) for each in evaluated)]
        for number in range(NUM_BINS)
    ]
    missing = {f"{SCORES[name]}: {why}" for each in evaluated for name, why in each.missing.items()}
    content = {
        "table_head": ["figure", *head[1:]],
        "rows": rows,
        "bin_head": ["timesteps", *head[1:]],
        "bins": bins,
        "bits": [bits_content(each.name, each.bit_figures) for each in evaluated if each.bit_figures],
        "features": features,
        "missing": sorted(missing),
        "targets": [_target(each, training_pictures) for each in evaluated],
    }
    path = output_dir / PAGE
    replace_file(path, render_page("evaluation/page.html", **in_texts(redacted, content)))
    return path


def _target(each: Evaluated, training_pictures: Sequence[Image.Image]) -> dict[str, Any]:
    shown = [
        (picture_uri(picture, SIDE), prompt)
        for picture, prompt in list(zip(each.pictures, each.prompts, strict=True))[:SHOWN_PICTURES]
    ]
    copies = []
    if each.neighbours is not None:
        for place in np.argsort(each.neighbours.ratios, kind="stable")[:SHOWN_COPIES].tolist():
            copies.append(
                {
                    "ratio": f"{each.neighbours.ratios[place]:.2f}",
                    "is_copy": each.neighbours.ratios[place] <= 1,
                    "drawn": picture_uri(each.pictures[place], SIDE),
                    "training": picture_uri(training_pictures[each.neighbours.numbers[place]], SIDE),
                    "prompt": each.prompts[place],
                }
            )
    return {"name": each.name, "pictures": shown, "num_pictures": len(each.pictures), "copies": copies}
