"""The curves, heat maps and pictures of a run's page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from sd_recipes.evaluation.figures import NUM_BINS
from sd_recipes.evaluation.row_rankings import evenly_spaced
from sd_recipes.export.charts import MAX_POINTS, Curve, colour_limit, heat_map, line_chart
from sd_recipes.export.pages import UNREADABLE, picture_uri
from sd_recipes.runtime.trackers import list_samples, step_of

GRIDS, GRID_SIDE = 12, 1000  # pictures over time: so many, and so many pixels a side, at most
SIZES = ((860, 310), (340, 210))  # (width, height) of charts, in pixels
SMALL_CHARTS = {
    "learning rate": ("lr", 1.0),
    "gradient norm before clipping": ("grad_norm", 1.0),
    "images per second": ("images_per_second", 1.0),
    "teraflop/s of the UNet, on each device": ("teraflops", 1.0),
    "teraflop/s, % of the device's peak": ("mfu", 100.0),
    "time spent waiting for data, %": ("data_wait", 100.0),
    "peak memory, GB": ("memory_gb", 1.0),
    "image-text score": ("image_text_score", 1.0),
}


def curves(figures: Mapping[str, dict[int, float]], last_step: int, best_step: int | None) -> dict[str, Any]:
    """The curves of losses and of everything else, and the heat maps."""
    held_out, training_rows, raw, training, quiet = (
        Curve(label, style, figures.get(name, {}), has_dots=style in ("held-out", "training-rows"))
        for label, style, name in (
            ("held-out rows", "held-out", "validation_loss"),
            ("training rows", "training-rows", "train_subset_loss"),
            ("held-out rows before averaging", "raw", "raw_validation_loss"),
            ("training loss", "training", "train_loss"),
            ("quiet twin", "quiet", "quiet_loss"),
        )
    )
    mark = (best_step, f"best: step {best_step}") if best_step is not None else None
    shade = (held_out.values, training_rows.values)
    small = []
    for name, (key, scale) in SMALL_CHARTS.items():
        curve = Curve(name, "one", {step: scale * value for step, value in figures.get(key, {}).items()})
        if chart := line_chart([curve], *SIZES[1], last_step, logarithmic=key == "grad_norm"):
            small.append((name, chart))
    bins = {
        words: [figures.get(f"{prefix}_excess_bin_{number}", {}) for number in range(NUM_BINS)]
        for words, prefix in (("held-out rows", "validation"), ("training rows", "train_subset"))
    }
    limit = colour_limit(ratio for of_set in bins.values() for ratios in of_set for ratio in ratios.values())
    maps = {words: heat_map(of_set, limit, *SIZES[1]) for words, of_set in bins.items()}
    return {
        # Each wide, and narrow for a phone.
        "losses": [
            chart
            for width, height in SIZES
            if (chart := line_chart([raw, training_rows, held_out], width, height, last_step, shade=shade, mark=mark))
        ],
        "training": [
            chart for width, height in SIZES if (chart := line_chart([training, quiet], width, height, last_step))
        ],
        "small_charts": small,
        "heat_maps": [(words, drawing) for words, drawing in maps.items() if drawing],
        "colour_limit": limit,
        "has": {"training_rows": training_rows.values, "raw": raw.values, "quiet": quiet.values},
        "thinned": any(len(values) > MAX_POINTS for values in figures.values()),
    }


def grids(output_dir: Path) -> dict[str, Any]:
    """The grids of pictures as (step, data URI), at most GRIDS of them, evenly chosen; and those that are broken."""
    samples, shown, unreadable = list_samples(output_dir), [], []
    for path in evenly_spaced(samples, GRIDS):
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                shown.append((step_of(path), picture_uri(picture, GRID_SIDE)))
        except UNREADABLE:
            unreadable.append(path.name)
    return {"grids": shown, "num_grids": len(samples), "unreadable": unreadable}
