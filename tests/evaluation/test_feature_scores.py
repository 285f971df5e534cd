"""Scores of features against closed forms, against loops over pairs, and against what theory expects of samples."""

from __future__ import annotations

import logging
import math
import re
import tracemalloc
from collections.abc import Callable
from itertools import combinations, permutations, product
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from test_rooms import graph

from sd_recipes.evaluation import neighbours
from sd_recipes.evaluation.bootstrap import Bootstrap, Score
from sd_recipes.evaluation.feature_scores import (
    DRAWN,
    REAL,
    authpct,
    cmmd,
    frechet_distance,
    kernel_distance,
    precision_recall,
)

NO_INTERVAL = Bootstrap(num_resamples=0)


def precision(drawn: np.ndarray, real: np.ndarray, **settings: Any) -> Score:
    return precision_recall(drawn, real, **settings)[0]


def recall(drawn: np.ndarray, real: np.ndarray, **settings: Any) -> Score:
    return precision_recall(drawn, real, **settings)[1]


SCORES: list[Callable[..., Score]] = [frechet_distance, kernel_distance, cmmd, precision, recall, authpct]


def value(score: Callable[..., Score], *features: np.ndarray, **settings: Any) -> float:
    return score(*features, bootstrap=NO_INTERVAL, **settings).value


def samples(*shape: int, seed: int = 0, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, scale, shape)


def with_moments(mean: np.ndarray, covariance: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Images whose mean and covariance (by N - 1) are exactly these."""
    white = samples(size, len(mean), seed=seed)
    white -= white.mean(axis=0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def closed_form(mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other: np.ndarray) -> float:
    """Heusel et al. 2017, eq. 6, by the root of the product."""
    root = scipy.linalg.sqrtm(covariance @ other)
    return float(((mean - other_mean) ** 2).sum() + np.trace(covariance + other - 2 * root).real)


def random_covariance(dimension: int, seed: int) -> np.ndarray:
    factor = samples(dimension, dimension, seed=seed)
    return factor @ factor.T / dimension + 0.1 * np.eye(dimension)


def test_the_frechet_distance_is_that_of_normal_distributions() -> None:
    means, covariances = samples(2, 6, seed=1), [random_covariance(6, seed=2), random_covariance(6, seed=3)]
    expected = closed_form(means[0], covariances[0], means[1], covariances[1])
    exact = [with_moments(mean, covariance, 50 + 9 * seed, seed) for seed, (mean, covariance) in
             enumerate(zip(means, covariances, strict=True))]  # fmt: skip
    assert value(frechet_distance, *exact) == pytest.approx(expected, rel=1e-10)
    rng = np.random.default_rng(0)
    drawn = [rng.multivariate_normal(*each, 40_000) for each in zip(means, covariances, strict=True)]
    assert value(frechet_distance, *drawn) == pytest.approx(expected, rel=0.03)


def test_the_frechet_distance_of_independent_features() -> None:
    variances, others, shift = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 1e-8]), np.array([1.0, -2.0, 0.0])
    drawn = with_moments(np.zeros(3), np.diag(variances), 20, seed=0)
    real = with_moments(shift, np.diag(others), 30, seed=1)
    expected = 5 + ((np.sqrt(variances) - np.sqrt(others)) ** 2).sum()
    assert value(frechet_distance, drawn, real) == pytest.approx(expected, rel=1e-12)


def test_the_frechet_distance_of_fewer_pictures_than_features(caplog: pytest.LogCaptureFixture) -> None:
    few, others = samples(9, 3, seed=0), samples(12, 3, seed=1, scale=2.0, mean=1.0)
    turn = np.linalg.qr(samples(40, 3, seed=2))[0].T  # into 40 dimensions, of which 37 have no spread
    expected = value(frechet_distance, few, others)
    assert "singular" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert value(frechet_distance, few @ turn, others @ turn) == pytest.approx(expected, rel=1e-10)
    assert "of 9 pictures with 40 features each: the covariances are singular" in caplog.text
    # Without full rank for want of pictures: by the eigenvalues of the product.
    drawn, real = samples(6, 20, seed=3), samples(8, 20, seed=4)
    covariances = np.cov(drawn.T), np.cov(real.T)
    eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1]).real
    root = np.sqrt(np.sort(eigenvalues)[-5:]).sum()  # the others are 0
    expected = ((drawn.mean(axis=0) - real.mean(axis=0)) ** 2).sum() + np.trace(sum(covariances)) - 2 * root
    assert value(frechet_distance, drawn, real) == pytest.approx(expected, rel=1e-8)


def test_the_frechet_distance_of_two_pictures_and_of_constant_ones() -> None:
    drawn, real = samples(2, 5, seed=0), samples(2, 5, seed=1)
    u, v = (drawn[0] - drawn[1]) / math.sqrt(2), (real[0] - real[1]) / math.sqrt(2)
    shift = drawn.mean(axis=0) - real.mean(axis=0)
    assert value(frechet_distance, drawn, real) == pytest.approx(shift @ shift + u @ u + v @ v - 2 * abs(u @ v))
    assert value(frechet_distance, np.ones((4, 3)), np.full((5, 3), 3.0)) == 12
    assert frechet_distance(np.ones((4, 3)), np.ones((9, 3))) == Score(0, 0, 0)
    assert value(frechet_distance, drawn, drawn) == pytest.approx(0, abs=1e-12)


def moments_distance(drawn: np.ndarray, real: np.ndarray) -> float:
    """The expectation of KID for one feature: 3 (Δ E x)² + 3 (Δ E x²)² + (Δ E x³)², from (xy + 1)³."""
    return float(sum(c * (drawn[n] - real[n]) ** 2 for n, c in enumerate((3, 3, 1))))


def test_kid_is_without_bias() -> None:
    normal, shifted = np.array([0.0, 1.0, 0.0]), np.array([0.5, 1.25, 0.5**3 + 3 * 0.5])  # moments of N(0, 1), N(½, 1)
    for mean, moments in ((0.0, normal), (0.5, shifted)):
        expected = moments_distance(normal, moments)
        values = [
            value(kernel_distance, samples(10, 1, seed=2 * n), samples(14, 1, seed=2 * n + 1, mean=mean))
            for n in range(1500)
        ]
        error = np.std(values) / math.sqrt(len(values))
        assert np.mean(values) == pytest.approx(expected, abs=4 * error)
        assert error < 0.25


def squared_mmd_by_loops(drawn: np.ndarray, real: np.ndarray, kernel: Callable[..., float]) -> float:
    """Gretton et al. 2012, eq. 3, for sets of any two sizes."""
    within = [np.mean([kernel(*pair) for pair in permutations(features, 2)]) for features in (drawn, real)]
    return float(sum(within) - 2 * np.mean([kernel(*pair) for pair in product(drawn, real)]))


def cubic(x: np.ndarray, y: np.ndarray) -> float:
    return float((x @ y / len(x) + 1) ** 3)


def gaussian(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    return math.exp(-((x - y) ** 2).sum() / (2 * 10**2))


def test_kernel_distances_are_those_of_loops_over_pairs() -> None:
    drawn, real = samples(7, 4, seed=0), samples(9, 4, seed=1, mean=0.5)
    assert value(kernel_distance, drawn, real) == pytest.approx(squared_mmd_by_loops(drawn, real, cubic), rel=1e-10)
    assert value(cmmd, drawn, real) == pytest.approx(1000 * squared_mmd_by_loops(drawn, real, gaussian), rel=1e-9)
    assert value(cmmd, 3 * drawn, 1e-6 * real) == pytest.approx(value(cmmd, drawn, real), rel=1e-9)
    for score in (kernel_distance, cmmd):
        assert value(score, np.ones((3, 2)), np.ones((2, 2))) == pytest.approx(0, abs=1e-12)
        assert score(np.ones((3, 2)), np.ones((2, 2))).high == pytest.approx(0, abs=1e-12)


def test_subsets_of_kid_give_what_all_images_give() -> None:
    drawn, real = samples(400, 3, seed=0), samples(90, 3, seed=1, mean=0.3)
    whole = value(kernel_distance, drawn, real)
    single = [
        kernel_distance(drawn, real, subset_size=50, num_subsets=1, bootstrap=Bootstrap(0, seed=seed)).value
        for seed in range(100)
    ]
    assert len(set(single)) == 100
    assert np.mean(single) == pytest.approx(whole, abs=4 * np.std(single) / 10)
    many = value(kernel_distance, drawn, real, subset_size=50, num_subsets=100)
    assert abs(many - whole) < np.std(single) / 2
    # The subsets' interval is of the images: hardly narrower for more subsets of the same ones.
    intervals = [
        kernel_distance(drawn, real, subset_size=50, num_subsets=number, bootstrap=Bootstrap(300))
        for number in (100, 400)
    ]
    widths = [each.high - each.low for each in [*intervals, kernel_distance(drawn, real, bootstrap=Bootstrap(300))]]
    assert widths == pytest.approx([widths[-1]] * 3, rel=0.2)


def test_published_cmmd_is_higher_by_what_is_said() -> None:
    drawn, real = samples(40, 8, seed=0, mean=1.0), samples(60, 8, seed=1, mean=1.0)
    with_themselves = 1000 * sum(
        sign * np.mean([gaussian(*pair) for pair in product(x, y)])
        for sign, x, y in ((1, drawn, drawn), (1, real, real), (-2, drawn, real))
    )
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (drawn, real)]
    cosine = np.mean([np.mean([x @ y for x, y in combinations(features, 2)]) for features in unit])
    said = 10 * (1 - cosine) * (1 / 40 + 1 / 60)
    assert with_themselves - value(cmmd, drawn, real) == pytest.approx(said, rel=0.05)


def distance(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sqrt(((x - y) ** 2).sum()))


def share_among(judged: np.ndarray, others: np.ndarray, k: int) -> float:
    """Kynkäänniemi et al. 2019, eq. 1 and 2, by loops."""
    radii = [sorted(distance(x, y) for j, y in enumerate(others) if j != i)[k - 1] for i, x in enumerate(others)]
    return float(np.mean([any(distance(x, y) <= r for y, r in zip(others, radii, strict=True)) for x in judged]))


def authpct_by_loops(drawn: np.ndarray, training: np.ndarray) -> float:
    authentic = []
    for x in drawn:
        nearest = min(range(len(training)), key=lambda i: distance(x, training[i]))
        others = np.delete(training, nearest, axis=0)
        authentic.append(distance(x, training[nearest]) > min(distance(training[nearest], y) for y in others))
    return 100 * float(np.mean(authentic))


@pytest.mark.parametrize("seed", range(2))
def test_nearest_neighbours_are_those_of_loops_over_pairs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, real = samples(23, 3, seed=seed), samples(31, 3, seed=100 + seed, scale=1.2)
    drawn[:4] = real[:4]  # copies
    real[-3:] = real[5:8]  # twice
    drawn[-6:-3] = drawn[8:11]
    for block in (2048, 7, 1):
        monkeypatch.setattr(neighbours, "BLOCK", block)
        for k in (1, 3, 22):
            assert value(precision, drawn, real, k=k) == share_among(drawn, real, k)
            assert value(recall, drawn, real, k=k) == share_among(real, drawn, k)
        assert value(authpct, drawn, real) == pytest.approx(authpct_by_loops(drawn, real))


@pytest.mark.parametrize("score", SCORES)
def test_neither_the_order_nor_blocks_change_a_score(
    score: Callable[..., Score], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, real = samples(37, 5, seed=0), samples(44, 5, seed=1, mean=0.4)
    expected = score(drawn, real)
    turned = np.random.default_rng(0).permutation(37), np.random.default_rng(1).permutation(44)
    assert value(score, drawn[turned[0]], real[turned[1]]) == pytest.approx(expected.value, rel=1e-10)
    monkeypatch.setattr(neighbours, "BLOCK", 10)
    assert vars(score(drawn, real)) == pytest.approx(vars(expected), rel=1e-9)


def test_what_is_turned_and_moved_has_the_same_distances() -> None:
    drawn, real = samples(60, 5, seed=0), samples(50, 5, seed=1, mean=0.4)
    turn = np.linalg.qr(samples(5, 5, seed=2))[0]
    for score in (frechet_distance, precision, recall, authpct):
        moved = value(score, drawn @ turn + 100, real @ turn + 100)
        assert moved == pytest.approx(value(score, drawn, real), rel=1e-9)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_features_whose_squares_overflow_their_type(kind: type) -> None:
    scale = 1e30 if kind == np.float32 else 1e4
    drawn, real = (samples(20, 3, seed=seed, mean=seed / 3) for seed in (0, 1))
    large = [(scale * each).astype(kind) for each in (drawn, real)]
    tolerance = 0.01 if kind == np.float16 else 1e-4
    assert value(frechet_distance, *large) / scale**2 == pytest.approx(value(frechet_distance, drawn, real), rel=0.02)
    assert value(cmmd, *large) == pytest.approx(value(cmmd, drawn, real), rel=tolerance)
    for score in (precision, recall, authpct):
        assert value(score, *large) == value(score, drawn, real)
    # Only the highest power is left.
    cube = squared_mmd_by_loops(drawn, real, lambda x, y: float((x @ y / 3) ** 3))
    assert value(kernel_distance, *large) / scale**6 == pytest.approx(cube, rel=tolerance)


@pytest.mark.parametrize("score", SCORES)
def test_two_pictures_of_each(score: Callable[..., Score]) -> None:
    settings = {"k": 1} if score in (precision, recall) else {}
    result = score(samples(2, 4, seed=0), samples(2, 4, seed=1), **settings)
    assert np.isfinite([result.value, result.low, result.high]).all()
    assert result.low <= result.high


def test_copies_are_no_authentic_pictures() -> None:
    training = samples(200, 16, seed=0)
    assert authpct(training, training) == Score(0, 0, 0)
    assert value(authpct, np.repeat(training[:3], 50, axis=0), training) == 0
    near = training + 0.01 * samples(200, 16, seed=1)
    assert value(authpct, near, training) == 0
    assert value(authpct, samples(200, 16, seed=2, mean=50.0), training) == 100
    half = np.concatenate([near[:100], samples(100, 16, seed=3, mean=50.0)])
    assert authpct(half, training).low < 50 < authpct(half, training).high


def test_a_copy_of_a_picture_that_is_there_twice_is_a_copy_whatever_rounding_adds() -> None:
    """A float32 network in another batch: of the same picture, features a few 1e-7 apart, and as many to either."""
    training = np.concatenate([samples(50, 16, seed=0)] * 2).astype(np.float32)
    rounded = [training * (1 + 3e-7 * samples(100, 16, seed=seed)) for seed in (1, 2)]
    assert len(np.unique(np.concatenate(rounded), axis=0)) == 200
    assert value(authpct, *rounded) == 0
    assert value(precision, *rounded, k=1) == value(recall, *rounded, k=1) == 1


def chance_of_nearest_to_each_other(dimension: int) -> float:
    """Of two points of many: a ball's volume by that of the union with an equal one, whose centre is on its surface."""
    both = scipy.special.betainc((dimension + 1) / 2, 0.5, 3 / 4)  # two caps of height ½ of a unit ball
    return 1 / (2 - both)


def test_fresh_samples_are_authentic_as_often_as_theory_says() -> None:
    assert chance_of_nearest_to_each_other(1) == pytest.approx(2 / 3)
    assert chance_of_nearest_to_each_other(2) == pytest.approx(6 * math.pi / (8 * math.pi + 3 * math.sqrt(3)))
    for dimension in (1, 2, 5):
        expected = 100 * (1 - chance_of_nearest_to_each_other(dimension))
        fresh = np.random.default_rng(0).random((2000, dimension)), np.random.default_rng(1).random((2000, dimension))
        assert value(authpct, *fresh) == pytest.approx(expected, abs=3)
    assert value(authpct, samples(1000, 64, seed=0), samples(1000, 64, seed=1)) > 50


def test_neighbours_among_constant_features() -> None:
    for constant in (0.0, 3.0):
        same = np.full((6, 4), constant)
        assert precision_recall(same, same[:5]) == (Score(1, 1, 1), Score(1, 1, 1))
        assert authpct(same, same[:5]) == Score(0, 0, 0)
        assert precision_recall(same, same[:5] + 1) == (Score(0, 0, 0), Score(0, 0, 0))
        assert authpct(same, same[:5] + 1) == Score(100, 100, 100)


def test_precision_is_of_the_drawn_and_recall_of_the_real() -> None:
    real = np.concatenate([samples(100, 2, seed=0), samples(100, 2, seed=1, mean=100.0)])
    collapsed = samples(200, 2, seed=2, scale=0.5)
    assert value(precision, collapsed, real) > 0.95
    assert value(recall, collapsed, real) < 0.5
    assert value(precision, real, collapsed) == value(recall, collapsed, real)
    assert [each.value for each in precision_recall(real, real)] == [1, 1]
    assert [each.value for each in precision_recall(real, real + 1000)] == [0, 0]


def test_resamples_are_images_drawn_with_repeats() -> None:
    counts = Bootstrap(200).counts(50, DRAWN)
    assert (counts[0] == 1).all()
    assert (counts.sum(axis=1) == 50).all()
    assert np.count_nonzero(counts[1:] == 0) / counts[1:].size == pytest.approx(math.exp(-1), abs=0.02)
    assert len(np.unique(counts, axis=0)) == 201
    # By number: more of them begin with the same ones; other seeds and the other set have others.
    assert (Bootstrap(20).counts(50, DRAWN) == counts[:21]).all()
    for other in (Bootstrap(200).counts(50, REAL), Bootstrap(200, seed=1).counts(50, DRAWN)):
        assert not (other[1:] == counts[1:]).all(axis=1).any()
    assert (Bootstrap(500).counts(2, DRAWN) == 1).all()  # one picture alone has no spread


def mean_over_pairs(kernel: Callable[..., float], x: np.ndarray, y: np.ndarray, *times: np.ndarray) -> float:
    """Of images that come several times, but none with itself."""
    pairs = [(i, j) for i, j in product(range(len(x)), range(len(y))) if x is not y or i != j]
    weights = [float(times[0][i]) * float(times[1][j]) for i, j in pairs]
    return float(np.average([kernel(x[i], y[j]) for i, j in pairs], weights=weights))


def resampled_mmd(kernel: Callable[..., float], x: np.ndarray, y: np.ndarray, *times: np.ndarray) -> float:
    within = mean_over_pairs(kernel, x, x, times[0], times[0]) + mean_over_pairs(kernel, y, y, times[1], times[1])
    return within - 2 * mean_over_pairs(kernel, x, y, *times)


def resampled_frechet(x: np.ndarray, y: np.ndarray, *times: np.ndarray) -> float:
    x, y = np.repeat(x, times[0], axis=0), np.repeat(y, times[1], axis=0)
    return closed_form(x.mean(axis=0), np.cov(x.T), y.mean(axis=0), np.cov(y.T))


RESAMPLED: dict[Callable[..., Score], Callable[..., float]] = {
    frechet_distance: resampled_frechet,
    kernel_distance: lambda *images: resampled_mmd(cubic, *images),
    cmmd: lambda *images: 1000 * resampled_mmd(gaussian, *images),
    precision: lambda x, y, *times: share_among(np.repeat(x, times[0], axis=0), y[times[1] > 0], 3),
    recall: lambda x, y, *times: share_among(np.repeat(y, times[1], axis=0), x[times[0] > 0], 3),
    authpct: lambda x, y, *times: authpct_by_loops(np.repeat(x, times[0], axis=0), y),
}


@pytest.mark.parametrize("score", SCORES)
def test_an_interval_is_that_of_the_scores_of_resamples(score: Callable[..., Score]) -> None:
    bootstrap = Bootstrap(30, confidence=0.8, seed=3)
    images = samples(12, 3, seed=0), samples(14, 3, seed=1, mean=0.5)
    counts = bootstrap.counts(12, DRAWN), bootstrap.counts(14, REAL)
    values = np.array([RESAMPLED[score](*images, *times) for times in zip(*counts, strict=True)])
    moved = values[1:] - values[1:].mean() + values[0]
    if score not in (kernel_distance, cmmd):
        moved = moved.clip(0, {precision: 1, recall: 1, authpct: 100}.get(score))
    result = score(*images, bootstrap=bootstrap)
    assert result.value == pytest.approx(values[0], rel=1e-8)
    assert [result.low, result.high] == pytest.approx(np.quantile(moved, [0.1, 0.9]), rel=1e-6, abs=1e-9)
    assert math.isnan(score(*images, bootstrap=NO_INTERVAL).low)


@pytest.mark.parametrize("score", SCORES)
def test_intervals_hold_the_expected_score_about_as_often_as_they_say(score: Callable[..., Score]) -> None:
    training = samples(60, 3, seed=10_000, mean=0.7)
    results = [
        score(
            samples(50, 3, seed=n),
            training if score is authpct else samples(60, 3, seed=500 + n, mean=0.7),
            bootstrap=Bootstrap(100, confidence=0.9),
        )
        for n in range(60)
    ]
    expected = np.mean([each.value for each in results])
    held = np.mean([each.low <= expected <= each.high for each in results])
    assert 0.77 < held < 0.99


def test_memory_is_that_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", 100)
    drawn, real = samples(1500, 2, seed=0), samples(1500, 2, seed=1)
    for score in (kernel_distance, cmmd, precision, authpct):
        tracemalloc.start()
        value(score, drawn, real, **{"subset_size": 1500} if score is kernel_distance else {})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4e6, f"{score.__name__}: all pairs are 18 MB"


def test_they_know_no_other_part_of_the_project() -> None:
    arrows = graph()
    files = {f"evaluation.{name}" for name in ("feature_scores", "neighbours", "bootstrap")}
    assert set().union(*(arrows[name] for name in files)) <= files


FEATURES = samples(5, 3)
BROKEN = FEATURES.copy()
BROKEN[[1, 3]] = [[0, math.nan, 0], [0, 0, math.inf]]
BAD_INPUT = {
    "a tensor": ([torch.ones(5, 3), FEATURES], "features of the drawn pictures are a Tensor: give an array of numbers"),
    "words": ([FEATURES, np.array([["a"], ["b"]])], "features of the real pictures are of <U1: give an array"),
    "one picture": ([FEATURES[:1], FEATURES], "are of shape (1, 3): give (N, D), of 2 pictures or more"),
    "none": ([FEATURES, FEATURES[:0]], "features of the real pictures are of shape (0, 3): give (N, D)"),
    "no features": ([FEATURES[:, :0], FEATURES], "are of shape (5, 0): give (N, D)"),
    "one axis": ([FEATURES[:, 0], FEATURES], "are of shape (5,): give (N, D)"),
    "patches": ([FEATURES[None], FEATURES], "are of shape (1, 5, 3): give (N, D)"),
    "NaN": (
        [FEATURES, BROKEN], "picture 1 are not finite, or beyond float32 (2 of 5 are): leave such pictures out"
    ),
    "beyond float32": ([1e39 * np.ones((2, 3)), FEATURES], "features of drawn picture 0 are not finite, or beyond"),
    "two networks": ([FEATURES, FEATURES[:, :2]], "drawn pictures have 3 features and"),
}  # fmt: skip


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("features", "said"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_features_are_answered_in_one_line(
    score: Callable[..., Score], features: list[np.ndarray], said: str
) -> None:
    said = said.replace("real", "training") if score is authpct else said
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        score(*features)
    assert "\n" not in str(caught.value)


BAD_SETTINGS = {
    "small subsets": (
        lambda: kernel_distance(FEATURES, FEATURES, subset_size=49),
        "subset_size is 49: give 50 or more",
    ),
    "no subsets": (lambda: kernel_distance(FEATURES, FEATURES, num_subsets=0), "num_subsets is 0: give 1 or more"),
    "no neighbour": (lambda: precision_recall(FEATURES, FEATURES, k=0), "k is 0 for 5 drawn and 5 real pictures: give"),
    "too many": (lambda: precision_recall(FEATURES, FEATURES[:3]), "k is 3 for 5 drawn and 3 real pictures: give 1"),
    "no direction": (
        lambda: cmmd(FEATURES, 0 * FEATURES),
        "features of real picture 0 are all 0, and have no",
    ),
    "resamples": (lambda: Bootstrap(-1), "num_resamples is -1: give 0, for no interval, or more"),
    "confidence": (lambda: Bootstrap(confidence=95), "confidence is 95: give a number between 0 and 1, such as 0.95"),
    "seed": (lambda: Bootstrap(seed=-1), "seed is -1: give a number from 0 to 2**64 - 1"),
}


@pytest.mark.parametrize(("call", "said"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_answered_in_one_line(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        call()
    assert "\n" not in str(caught.value)
