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
        "  prior": (HELD_OUT, CAPTIONS, "prior"),
        "  denoising": (HELD_OUT, CAPTIONS, "denoising"),
        "  reconstruction": (HELD_OUT, CAPTIONS, "reconstruction"),
        "  more than the first": ("change",),
        "  without captions": (HELD_OUT, NO_CAPTIONS, "total"),
        "  told by captions": (HELD_OUT, "told_by_captions"),
        "  of training rows": (TRAIN, CAPTIONS, "total"),
        "  gap": ("gap",),
        "  scaling undone": (HELD_OUT, CAPTIONS, "scaling_undone"),
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
    """A value with as many digits as its error has meaning for."""
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
    table += [row(f"total, {name}", "by_variance", name) for name in bounds[0]["by_variance"]]
    table += [row(PIXELS, "pixels")] if "pixels" in bounds[0] else []
    curves = [
        (style, figures[which]["rate_distortion"])
        for which, style in ((TRAIN, "training-rows"), (HELD_OUT, "held-out"))
        if which in figures
    ]
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
        "told": with_error(figures[HELD_OUT]["told_by_captions"]),
        "told_per_picture": with_error(figures[HELD_OUT]["told_by_captions_per_picture"]),
        "gap": with_error(figures["gap"]) if "gap" in figures else None,
        "change": with_error(figures["change"]) if "change" in figures else None,
        "curves": [rate_distortion_chart(curves, width) for width in (WIDE, NARROW)],
        "bars": share_bars(shares),
        "share_head": ["timesteps", *(f"#{words}" for words, _ in WEIGHTINGS.values())],
        "shares": [
            [_tenth(number), *(f"{100 * shares[each][number]:.3g} %" for each in WEIGHTINGS)]
            for number in range(len(shares["bound"]))
        ],
    }


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

    return Chart(
        width,
        HEIGHT,
        [(x(value), f"{value:g}") for value in ticks(low, high, 8 if width > NARROW else 4)],
        [(y(value), f"{value:g}") for value in ticks(0, top, 5)],
        lines=[
            (style, " ".join(f"{x(rate):g},{y(error):g}" for rate, error in zip(*_points(curve), strict=True)))
            for style, curve in curves
        ],
    )


def _points(curve: Mapping[str, Sequence[float]]) -> tuple[Sequence[float], Sequence[float]]:
    return curve["bits"], curve["rmse"]


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
