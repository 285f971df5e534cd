"""The geometry of curves and heat maps: where a value lies, what its ticks say, what is left out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sd_recipes.export.charts import (
    MAX_COLUMNS,
    MAX_POINTS,
    Curve,
    colour_limit,
    heat_map,
    line_chart,
    log_ticks,
    thinned,
    ticks,
)


def corners(points: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, _, y in (each.partition(",") for each in points.split())]


def test_points_lie_on_the_scale_that_the_ticks_show() -> None:
    chart = line_chart([Curve("loss", "one", {0: 0.0, 50: 1.0, 100: 0.5}, has_dots=True)], 340, 210, 200)
    assert chart is not None
    x_of, y_of = {label: x for x, label in chart.x_ticks}, {label: y for y, label in chart.y_ticks}
    ((_, line),) = chart.lines
    assert corners(line) == [(x_of["0"], y_of["0"]), (x_of["50"], y_of["1"]), (x_of["100"], y_of["0.5"])]
    assert x_of["0"] == chart.left
    assert x_of["200"] == chart.right
    assert y_of["1"] < y_of["0"] <= chart.bottom
    assert [words for *_, words in chart.dots] == ["loss, step 0: 0", "loss, step 50: 1", "loss, step 100: 0.5"]


def test_no_values_give_no_chart_and_one_value_gives_one() -> None:
    assert line_chart([Curve("loss", "one", {})], 340, 210, 10) is None
    chart = line_chart([Curve("loss", "one", {3: 0.2}), Curve("other", "two", {})], 340, 210, 0)
    assert chart is not None
    assert len(chart.lines) == 1
    assert len(chart.y_ticks) > 1


def test_the_gap_is_shaded_where_both_curves_are_and_the_best_step_marked() -> None:
    upper, lower = {0: 1.0, 10: 2.0, 20: 3.0}, {10: 1.0, 20: 1.0, 30: 1.0}
    chart = line_chart(
        [Curve("a", "a", upper), Curve("b", "b", lower)], 340, 210, 30, shade=(upper, lower), mark=(10, "best")
    )
    assert chart is not None
    ((style, polygon),) = chart.bands
    assert style == "gap"
    x_of = {label: x for x, label in chart.x_ticks}
    assert [x for x, _ in corners(polygon)] == [x_of["10"], x_of["20"], x_of["20"], x_of["10"]]
    assert chart.mark == (x_of["10"], "best")


def test_long_curves_are_thinned_to_means_over_a_band_of_extremes() -> None:
    values = dict(enumerate(np.random.default_rng(0).random(10_007).tolist(), 1))
    values[5000] = 9.0
    steps, means, lowest, highest = thinned(values)
    assert len(steps) == len(means) == MAX_POINTS
    assert highest.max() == 9.0
    assert lowest.min() == min(values.values())
    assert means.mean() == pytest.approx(np.mean(list(values.values())), rel=1e-3)
    chart = line_chart([Curve("loss", "one", values, has_dots=True)], 340, 210, 0)
    assert chart is not None
    assert [style for style, _ in chart.bands] == ["one spread"]
    assert len(corners(chart.lines[0][1])) == MAX_POINTS
    assert chart.dots == []


def test_one_stray_value_does_not_flatten_the_rest() -> None:
    values = dict.fromkeys(range(1000), 0.2) | {1: 0.3, 500: 1000.0}
    values = {step: value + 0.001 * (step % 7) for step, value in values.items()}
    chart = line_chart([Curve("loss", "one", values)], 340, 210, 0)
    assert chart is not None
    assert max(float(label) for _, label in chart.y_ticks) < 1
    assert min(y for _, points in [*chart.lines, *chart.bands] for _, y in corners(points)) >= 0, "it leaves by the top"


def test_a_logarithmic_axis_needs_values_above_0() -> None:
    for values, straight in (({0: 1.0, 1: 10.0, 2: 100.0}, True), ({0: 0.0, 1: 10.0, 2: 100.0}, False)):
        chart = line_chart([Curve("norm", "one", values)], 340, 210, 0, logarithmic=True)
        assert chart is not None
        (_, a), (_, b), (_, c) = corners(chart.lines[0][1])
        assert (abs((a - b) - (b - c)) < 0.2) is straight


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 3), (0.127, 0.131), (-2, 5), (0, 1e6), (1e-6, 3e-6)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 3 <= len(found) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert len({round(math.log10(step) % 1, 6) for step in np.diff(found)}) == 1


def test_logarithmic_ticks() -> None:
    assert log_ticks(0.5, 2000) == [1.0, 10.0, 100.0, 1000.0]
    assert log_ticks(0.9, 6) == [1.0, 2.0, 5.0]


def test_a_heat_map_shows_below_and_above_1_with_the_least_noise_at_the_bottom() -> None:
    bins = [{0: 1.0, 10: 0.5}, {0: 1.0, 10: 1.5}, {0: 1.0}]
    limit = colour_limit(ratio for ratios in bins for ratio in ratios.values())
    assert limit == 2
    drawn = heat_map(bins, limit, 340, 210)
    assert drawn is not None
    cells = {words: (style, opacity, x, y) for x, y, _, _, style, opacity, words in drawn.cells}
    assert cells["bin 0, step 10: 0.5"][:2] == ("below", 1.0)
    style, opacity, *_ = cells["bin 1, step 10: 1.5"]
    assert (style, 0 < opacity < 1) == ("above", True)
    assert cells["bin 0, step 0: 1"][1] == 0
    assert len(cells) == 5, "a missing value has no cell"
    assert cells["bin 0, step 0: 1"][3] > cells["bin 2, step 0: 1"][3]
    assert cells["bin 0, step 0: 1"][2] < cells["bin 0, step 10: 0.5"][2]


def test_a_heat_map_of_many_validations_is_thinned_and_of_none_is_none() -> None:
    drawn = heat_map([dict.fromkeys(range(0, 10000, 10), 0.9)], 1.2, 340, 210)
    assert drawn is not None
    assert len(drawn.cells) == MAX_COLUMNS
    assert drawn.cells[-1][-1].startswith("bin 0, step 9990")
    assert heat_map([{}, {}], 2, 340, 210) is None
    assert colour_limit([]) > 1
    assert colour_limit([0.0, -1.0, 1.001]) == colour_limit([])
