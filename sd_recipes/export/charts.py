"""Curves and heat maps as geometry, which templates/run/charts.html draws as SVG: sharp, small, and quick to make."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sd_recipes.evaluation.row_rankings import evenly_spaced

MAX_POINTS = 240  # of a curve; more would not be seen
MAX_DOTS = 60
MAX_COLUMNS = 40  # of a heat map
MIN_COLOUR_LIMIT = 1.02  # less than 2 % is pale
LEFT, RIGHT, TOP, BOTTOM = 50, 20, 14, 24  # pixels around the plot, for the ticks' labels


@dataclass(frozen=True)
class Curve:
    """A figure by step. `style` is the CSS class that gives its colour."""

    label: str
    style: str
    values: Mapping[int, float]  # by step, in order of steps
    has_dots: bool = False  # a dot, which says its value, at each point, where these are few


@dataclass
class Chart:
    """Geometry in pixels of a `width` by `height` drawing; y grows downwards."""

    width: int
    height: int
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    bands: list[tuple[str, str]] = field(default_factory=list)  # (style, points of a polygon)
    lines: list[tuple[str, str]] = field(default_factory=list)  # (style, points)
    dots: list[tuple[str, float, float, str]] = field(default_factory=list)  # (style, x, y, words)
    mark: tuple[float, str] | None = None  # a vertical line, and its words
    left: int = LEFT
    top: int = TOP

    @property
    def right(self) -> int:
        return self.width - RIGHT

    @property
    def bottom(self) -> int:
        return self.height - BOTTOM


@dataclass(frozen=True)
class HeatMap:
    """Cells (x, y, width, height, style, opacity, words) of a drawing, and the labels of its columns."""

    width: int
    height: int
    cells: list[tuple[float, float, float, float, str, float, str]]
    x_ticks: list[tuple[float, str]]


def line_chart(
    curves: Sequence[Curve],
    width: int,
    height: int,
    last_step: int,
    *,
    logarithmic: bool = False,
    shade: tuple[Mapping[int, float], Mapping[int, float]] | None = None,
    mark: tuple[int, str] | None = None,
) -> Chart | None:
    """Curves over the steps from 0 to `last_step` or the last point; None if no curve has one.

    A curve of more than MAX_POINTS points is thinned to the means of as many stretches, over a band from the lowest to
    the highest of each. A few stray values may leave the drawing: the axis ends at the 99th percentile, doubled.
    `shade` fills the space between two curves at the steps that both have; `mark` draws a line at a step.
    """
    drawn = [(curve, *thinned(curve.values)) for curve in curves if curve.values]
    if not drawn:
        return None
    everything = np.concatenate([list(curve.values.values()) for curve, *_ in drawn])
    logarithmic = logarithmic and float(everything.min()) > 0
    low, high = _range(everything, logarithmic)
    last_step = max([last_step, *(int(steps[-1]) for _, steps, *_ in drawn), 1])

    def x(step: float) -> float:
        return round(LEFT + (width - LEFT - RIGHT) * float(step) / last_step, 1)

    scale = math.log if logarithmic else float

    def y(value: float) -> float:
        place = (scale(value) - scale(low)) / (scale(high) - scale(low))
        return round(height - BOTTOM - (height - TOP - BOTTOM) * min(max(place, 0), 1.02), 1)

    def points(steps: Iterable[float], values: Iterable[float]) -> str:
        return " ".join(f"{x(step):g},{y(value):g}" for step, value in zip(steps, values, strict=True))

    chart = Chart(
        width,
        height,
        [(x(step), _number(step)) for step in ticks(0, last_step, 5 if width > 400 else 4) if step == int(step)],
        [(y(value), _number(value)) for value in (log_ticks(low, high) if logarithmic else ticks(low, high, 5))],
    )
    if shade:
        both = sorted(shade[0].keys() & shade[1].keys())
        if len(both) > 1:
            upper, lower = (points(both, (side[step] for step in both)) for side in shade)
            chart.bands.append(("gap", f"{upper} {' '.join(reversed(lower.split()))}"))
    for curve, steps, mean, lowest, highest in drawn:
        if len(curve.values) > len(steps):
            back = " ".join(reversed(points(steps, lowest).split()))
            chart.bands.append((f"{curve.style} spread", f"{points(steps, highest)} {back}"))
        chart.lines.append((curve.style, points(steps, mean)))
        if curve.has_dots and len(curve.values) <= MAX_DOTS:
            chart.dots += [
                (curve.style, x(step), y(value), f"{curve.label}, step {int(step)}: {value:.4g}")
                for step, value in zip(steps, mean, strict=True)
            ]
    if mark:
        chart.mark = (x(mark[0]), mark[1])
    return chart


def colour_limit(ratios: Iterable[float]) -> float:
    """The ratio above 1 at which, or at whose inverse, the colour of heat maps is full: the farthest from 1."""
    return max([MIN_COLOUR_LIMIT, *(max(ratio, 1 / ratio) for ratio in ratios if ratio > 0)])


def heat_map(bins: Sequence[Mapping[int, float]], limit: float, width: int, height: int) -> HeatMap | None:
    """Ratios by step, one mapping for each row of cells from the bottom up; None if there are none.

    A cell's style is `below` or `above` 1, its opacity √(|log ratio| / log limit), so that small changes show.
    """
    steps = evenly_spaced(sorted(set().union(*bins)), MAX_COLUMNS)
    if not steps:
        return None
    left, bottom = 14, height - BOTTOM
    column, row = (width - 2 * left) / len(steps), bottom / len(bins)
    cells = []
    for number, ratios in enumerate(bins):
        for place, step in enumerate(steps):
            ratio = ratios.get(step, 0)
            if ratio > 0:
                opacity = round(math.sqrt(abs(math.log(ratio)) / math.log(limit)), 3)
                words = f"bin {number}, step {step}: {ratio:.3g}"
                x, y = round(left + place * column, 2), round(bottom - (number + 1) * row, 2)
                style = "below" if ratio < 1 else "above"
                cells.append((x, y, round(column, 2), round(row, 2), style, opacity, words))
    if not cells:
        return None
    shown = evenly_spaced(range(len(steps)), 5)
    return HeatMap(width, height, cells, [(round(left + (n + 0.5) * column, 1), _number(steps[n])) for n in shown])


def thinned(values: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, means, lowest and highest of at most MAX_POINTS stretches of equally many points."""
    steps, figures = np.fromiter(values, float), np.fromiter(values.values(), float)
    number = min(len(steps), MAX_POINTS)
    starts = np.arange(number) * len(steps) // number
    sizes = np.diff(starts, append=len(steps))
    mean_steps, means = (np.add.reduceat(each, starts) / sizes for each in (steps, figures))
    return mean_steps, means, np.minimum.reduceat(figures, starts), np.maximum.reduceat(figures, starts)


def ticks(low: float, high: float, number: int) -> list[float]:
    """About `number` round values from `low` to `high`."""
    rough = (high - low) / number
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    return [round(n * step, 12) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`; with their multiples by 2 and 5 where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [f * 10.0**n for n in decades for f in factors if low <= f * 10.0**n <= high]
        if len(found) > 2:
            break
    return found[:: math.ceil(len(found) / 6) or 1]


def _range(values: np.ndarray, logarithmic: bool) -> tuple[float, float]:
    """The lowest and the highest value of an axis, with a margin; without strays above the 99th percentile, doubled."""
    low, high = float(values.min()), float(values.max())
    if not logarithmic:
        usual = float(np.quantile(values, 0.99))
        high = min(high, usual + max(usual - low, 0)) if usual > low else high
    if high <= low:
        high = low + (abs(low) or 1) * 0.1
    if logarithmic:
        return low / 1.2, high * 1.2
    margin = (high - low) * 0.06
    # Losses, speeds and norms are above 0: an axis that nearly reaches 0 begins there.
    return (0.0 if 0 <= low < (high - low) / 2 else low - margin), high + margin


def _number(value: float) -> str:
    """A tick's label: 20000 as 20k, 0.00001 as 1e-05."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 and value % 100 == 0 else f"{value:g}"
