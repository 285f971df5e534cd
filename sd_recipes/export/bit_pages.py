"""Bits as pages and terminals show them: rows of tables, the rate-distortion curve, shares of the timesteps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd_recipes.evaluation.encoded_rows import CAPTIONS, NO_CAPTIONS
from sd_recipes.evaluation.sample_errors import HELD_OUT, TRAIN
from sd_recipes.export.charts import BOTTOM, LEFT, RIGHT, TOP, Chart, HeatMap, ticks
from sd_recipes.reading import StrangeFile, read_text
from sd_recipes.runtime.trackers import EVALUATION, EVALUATION_RESULTS

MAX_RESULT_BYTES = 2**24
WIDE, NARROW, HEIGHT = 900, 420, 260  # pixels of the curve
# What a weight of the loss is called, and the style of its bars.
WEIGHTINGS = {"bound": ("the bound", "held-out"), "simple": ("plain loss", "training-rows"),
              "min_snr": ("min-SNR, γ = 5", "quiet")}  # fmt: skip
CASES = [
    (HELD_OUT, CAPTIONS, "held-out"), (HELD_OUT, NO_CAPTIONS, "held-out, no captions"),
    (TRAIN, CAPTIONS, "training rows"), (TRAIN, NO_CAPTIONS, "training rows, no captions"),
]  # fmt: skip
# What each bound says by name, and what it is called.
TERMS = {
    "prior": "prior: what is left at full noise", "denoising": "denoising, all steps but the last",
    "reconstruction": "reconstruction, the last step", "total": "total", "scaling_undone": "total, scaling undone",
}  # fmt: skip
PIXELS = "extra: bits per pixel value"


def summary_rows(compared: Sequence[Mapping[str, Any] | None]) -> list[list[str]]:
    """Rows for a table of all that are compared: what a figure is called, and it of each."""
    found = {
        "bits per latent dimension": (HELD_OUT, CAPTIONS, "total"),
        "bits of the prior": (HELD_OUT, CAPTIONS, "prior"),
        "bits of denoising": (HELD_OUT, CAPTIONS, "denoising"),
        "bits of reconstruction": (HELD_OUT, CAPTIONS, "reconstruction"),
        "bits more than the first": ("change",),
        "bits without captions": (HELD_OUT, NO_CAPTIONS, "total"),
        "bits told by captions": (HELD_OUT, "told_by_captions"),
        "bits of training rows": (TRAIN, CAPTIONS, "total"),
        "bits told of training rows": (TRAIN, "told_by_captions"),
        "bits gap": ("gap",),
        "bits, scaling undone": (HELD_OUT, CAPTIONS, "scaling_undone"),
        PIXELS: (HELD_OUT, CAPTIONS, "pixels"),
    }
    rows = []
    for title, path in found.items():
        figures = [_at(each, path) for each in compared]
        if any(figure is not None for figure in figures):
            rows.append([title, *(with_error(figure) for figure in figures)])
    return rows


def _at(figures: Any, path: Sequence[str]) -> Any:
    for name in path:
        figures = figures.get(name) if figures is not None else None
    return figures


def with_error(figure: Mapping[str, float | None] | None) -> str:
    """A value with as many digits as its error leaves a meaning."""
    if figure is None:
        return "-"
    value, error = figure["value"], figure["error"]
    if not error:
        return f"{value:.4g}"
    digits = min(max(0, 1 - math.floor(math.log10(error))), 6)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def bits_content(name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """What templates/evaluation/bits.html shows of a model's figures."""
    space = figures["space"]
    sets = [case for case in CASES if case[0] in figures]
    bounds = [figures[which][kind] for which, kind, _ in sets]

    def row(title: str, *path: str) -> list[str]:
        return [title, *(with_error(_at(bound, path)) for bound in bounds)]

    table = [row(title, name) for name, title in TERMS.items()]
    others = [name for name in bounds[0]["by_variance"] if name != figures["variance"]]
    table += [row(f"total, {name} variance", "by_variance", name) for name in others]
    table += [row(PIXELS, "pixels")] if "pixels" in bounds[0] else []
    curves = [
        (style, figures[which][kind]["rate_distortion"])
        for which, kind, style in (
            (TRAIN, CAPTIONS, "training-rows"), (HELD_OUT, NO_CAPTIONS, "raw"), (HELD_OUT, CAPTIONS, "held-out")
        )
        if which in figures
    ]  # fmt: skip
    shares = figures["contributions"]
    return {
        "name": name,
        "latents": " × ".join(map(str, space["latents"])),
        "dimensions": space["dimensions"],
        "scaling_factor": f"{space['scaling_factor']:.6g}",
        "scaling_bits": f"{-math.log2(space['scaling_factor']):.4f}",
        "rows": figures[HELD_OUT]["rows"],
        "timesteps": figures["timesteps"],
        "num_train_timesteps": figures["num_train_timesteps"],
        "variance": figures["variance"],
        "head": ["bits per latent dimension", *(f"#{title}" for *_, title in sets)],
        "table": table,
        "has_pixels": "pixels" in bounds[0],
        "sentences": sentences(figures),
        "has_training_rows": TRAIN in figures,
        "curves": [rate_distortion_chart(curves, width) for width in (WIDE, NARROW)],
        "bars": share_bars(shares),
        "share_head": ["timesteps", *(f"#{words}" for words, _ in WEIGHTINGS.values())],
        "shares": [
            [_tenth(number), *(f"{100 * shares[each][number]:.3g} %" for each in WEIGHTINGS)]
            for number in range(len(shares["bound"]))
        ],
    }


def sentences(figures: Mapping[str, Any]) -> list[str]:
    """What the differences say, in words; a difference counts from two standard errors on."""
    found = []
    for which, row in ((HELD_OUT, "held-out row"), (TRAIN, "training row")):
        if which in figures:
            told, in_all = figures[which]["told_by_captions"], figures[which]["told_by_captions_per_picture"]
            words = {
                1: f"The caption of a {row} tells {with_error(told)} bits a dimension, {with_error(in_all)} in all.",
                0: f"What its caption tells of a {row} is lost in the error: {with_error(told)} bits a dimension.",
                -1: f"With its caption a {row} takes {with_error(_negative(told))} bits a dimension more than without: "
                "it misleads a model that knows its training captions by heart.",
            }
            found.append(words[_sign(told)])
    if "gap" in figures:
        gap = figures["gap"]
        found.append(
            {
                1: f"Held-out rows take {with_error(gap)} bits a dimension more than training rows, since the model "
                "knows these, or since they are easier.",
                0: "Held-out rows take as many bits as training rows, as far as the error lets see: "
                f"{with_error(gap)} more.",
                -1: f"Held-out rows take {with_error(_negative(gap))} bits a dimension less than training rows.",
            }[_sign(gap)]
        )
    if "change" in figures:
        change = figures["change"]
        words = {1: f"{with_error(change)} bits a dimension more", -1: f"{with_error(_negative(change))} less",
                 0: f"as many bits, as far as the error lets see ({with_error(change)} more)"}  # fmt: skip
        found.append(f"Held-out rows take {words[_sign(change)]} than with the first model.")
    return found


def _sign(figure: Mapping[str, float | None]) -> int:
    value, error = figure["value"], figure["error"] or 0
    assert value is not None
    return 0 if abs(value) <= 2 * error else 1 if value > 0 else -1


def _negative(figure: Mapping[str, Any]) -> dict[str, Any]:
    return {**figure, "value": -figure["value"]}


def bits_of_run(output_dir: Path) -> dict[str, Any] | None:
    """`bits_content` of the last of this run's weights in its evaluation, which may be missing, torn or strange."""
    try:
        text = read_text(output_dir / EVALUATION / EVALUATION_RESULTS, MAX_RESULT_BYTES)
        targets = [each for each in json.loads(text)["targets"] if each.get("of_this_run") and each.get("bound")]
        return bits_content(str(targets[-1]["target"]), targets[-1]["bound"]) if targets else None
    except (OSError, StrangeFile, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def rate_distortion_chart(curves: Sequence[tuple[str, Mapping[str, Sequence[float]]]], width: int) -> Chart:
    """Error over bits, one curve for each (style, {"bits", "rmse"})."""
    bits, errors = ([value for _, curve in curves for value in curve[name]] for name in ("bits", "rmse"))
    low, high = min(0.0, *bits), max(bits)
    top = max(errors) * 1.06

    def x(value: float) -> float:
        return round(LEFT + (width - LEFT - RIGHT) * (value - low) / (high - low), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top, 1)

    def points(curve: Mapping[str, Sequence[float]]) -> str:
        return " ".join(f"{x(rate):g},{y(error):g}" for rate, error in zip(curve["bits"], curve["rmse"], strict=True))

    return Chart(
        width,
        HEIGHT,
        [(x(value), f"{value:g}") for value in ticks(low, high, 8 if width > NARROW else 4)],
        [(y(value), f"{value:g}") for value in ticks(0, top, 5)],
        lines=[(style, points(curve)) for style, curve in curves],
    )


def share_bars(shares: Mapping[str, Sequence[float]]) -> HeatMap:
    """A group of bars for each tenth of the timesteps, one for each way to weigh the loss."""
    width, height, bottom = 900, 200, 200 - BOTTOM
    groups = len(shares["bound"])
    group = (width - 12) / groups
    bar = group * 0.8 / len(WEIGHTINGS)
    top = max(max(values) for values in shares.values())
    cells = []
    for place, (name, (words, style)) in enumerate(WEIGHTINGS.items()):
        for number, share in enumerate(shares[name]):
            tall = round((bottom - TOP) * max(share, 0) / top, 1)
            x = round(6 + number * group + group * 0.1 + place * bar, 1)
            cells.append((x, bottom - tall, round(bar, 1), tall, style, 1.0, f"{words}, {_tenth(number)}: {share:.1%}"))
    return HeatMap(width, height, cells, [(round(6 + (n + 0.5) * group, 1), _tenth(n, groups)) for n in range(groups)])


def _tenth(number: int, groups: int = 10) -> str:
    return f"{number / groups:.0%} to {(number + 1) / groups:.0%}"
