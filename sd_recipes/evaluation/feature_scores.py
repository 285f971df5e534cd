"""How drawn pictures compare with real ones, as scores of their features, (N, D) each.

Features come from any network (`features.py`); scores of different networks cannot be compared. All is in float64, and
memory grows with N, not with N². Intervals come from resampled images (`bootstrap.py`). Of the project, this file knows
only what it imports: the scores stand alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import scipy.linalg

from sd_recipes.evaluation.bootstrap import Bootstrap, Score
from sd_recipes.evaluation.neighbours import among, blocks, nearest, rounding

logger = logging.getLogger(__name__)

# Counters of the generator: a set's resamples, and its subsets.
DRAWN, REAL, DRAWN_SUBSETS, REAL_SUBSETS = range(1, 5)
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
MIN_SUBSET = 50  # so that a subset has two different images in every resample

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def frechet_distance(drawn: np.ndarray, real: np.ndarray, *, bootstrap: Bootstrap | None = None) -> Score:
    """|μ_d - μ_r|² + tr(Σ_d + Σ_r - 2 (Σ_d Σ_r)^½), of normal distributions fitted to both (Heusel et al. 2017, eq. 6).

    With Σ = FᵀF, the trace of the root is the sum of the singular values of F_d F_rᵀ. F is the triangular factor of the
    centred features, so that no covariance is formed or rooted, and singular ones are as exact as others. They are
    singular for N ≤ D, where the score is far above that of more pictures, and a warning says so. It falls with N at
    any size (Chong & Forsyth 2020): compare scores of equally many pictures, of which the interval speaks too.

    Raises ValueError for features that are not (N, D) with N of 2 or more, finite, and within float32's range.
    """
    drawn, real = checked(drawn, real)
    bootstrap = bootstrap or Bootstrap()
    if (fewest := min(len(drawn), len(real))) <= drawn.shape[1]:
        logger.warning(
            "Fréchet distance of %d pictures with %d features each: the covariances are singular, and the score is far "
            "above that of more pictures. Compare it with scores of equally many.",
            fewest, drawn.shape[1],
        )  # fmt: skip
    sets = zip(bootstrap.counts(len(drawn), DRAWN), bootstrap.counts(len(real), REAL), strict=True)
    values = np.array(
        [frechet_of_normals(*normal(drawn, of_drawn), *normal(real, of_real)) for of_drawn, of_real in sets]
    )
    return bootstrap.score(values, 0)


def kernel_distance(
    drawn: np.ndarray,
    real: np.ndarray,
    *,
    subset_size: int = 1000,
    num_subsets: int = 100,
    bootstrap: Bootstrap | None = None,
) -> Score:
    """KID: the unbiased MMD² with the kernel (xᵀy / D + 1)³, averaged over subsets (Bińkowski et al. 2018, § 4).

    Sets of at most `subset_size` are taken whole. Subsets are drawn without repeats within one, from the bootstrap's
    seed. Not scaled: many papers print 1000 times this. Below 0 about as often as above where both are of one
    distribution.

    Raises ValueError as `frechet_distance`, and for settings that are out of range.
    """
    drawn, real = checked(drawn, real)
    bootstrap = bootstrap or Bootstrap()
    if subset_size < MIN_SUBSET:
        raise ValueError(f"subset_size is {subset_size}: give {MIN_SUBSET} or more; smaller sets are taken whole")
    if num_subsets < 1:
        raise ValueError(f"num_subsets is {num_subsets}: give 1 or more")
    if max(len(drawn), len(real)) <= subset_size:
        num_subsets = 1
    subsets = [
        (
            subset(len(drawn), subset_size, bootstrap.generator(DRAWN_SUBSETS, number)),
            subset(len(real), subset_size, bootstrap.generator(REAL_SUBSETS, number)),
        )
        for number in range(num_subsets)
    ]
    return squared_mmd(drawn, real, cubic_kernel, subsets, bootstrap)


def cmmd(drawn: np.ndarray, real: np.ndarray, *, bootstrap: Bootstrap | None = None) -> Score:
    """1000 MMD² with the kernel exp(-‖x - y‖² / 2σ²), σ = 10, of features at unit norm (Jayasumana et al. 2024, § 4).

    The unbiased estimator of the paper's definition. The code published with it keeps the pairs of a picture with
    itself, which adds about 10 (1 - mean cosine) (1/N_d + 1/N_r): little for their 30,000 pictures, much for 100. The
    paper's features are the image embeddings of CLIP ViT-L/14 at 336 pixels.

    Raises ValueError as `frechet_distance`, and for features that are all 0.
    """
    drawn, real = checked(drawn, real)
    bootstrap = bootstrap or Bootstrap()
    whole = [(np.arange(len(drawn)), np.arange(len(real)))]
    score = squared_mmd(at_unit_norm("drawn", drawn), at_unit_norm("real", real), gaussian_kernel, whole, bootstrap)
    return Score(CMMD_SCALE * score.value, CMMD_SCALE * score.low, CMMD_SCALE * score.high)


def precision_recall(
    drawn: np.ndarray, real: np.ndarray, *, k: int = 3, bootstrap: Bootstrap | None = None
) -> tuple[Score, Score]:
    """Shares of drawn pictures among real ones, and of real among drawn, 0 … 1 (Kynkäänniemi et al. 2019, eq. 1, 2).

    A picture is among others if one of them is no farther from it than from its own k-th nearest of its set, itself
    left out. Both shares depend on the numbers of pictures: the paper takes as many of either, and 50,000. Resamples
    have a picture among the others once, however often it was drawn.

    Raises ValueError as `frechet_distance`, and for a k of less than 1, or of N or more.
    """
    drawn, real = checked(drawn, real)
    bootstrap = bootstrap or Bootstrap()
    if not 1 <= k < min(len(drawn), len(real)):
        raise ValueError(
            f"k is {k} for {len(drawn)} drawn and {len(real)} real pictures: give 1 or more, and less than N"
        )
    of_drawn, of_real = bootstrap.counts(len(drawn), DRAWN), bootstrap.counts(len(real), REAL)
    return (
        bootstrap.score(shares(of_drawn, among(drawn, real, of_real, k)), 0, 1),
        bootstrap.score(shares(of_real, among(real, drawn, of_drawn, k)), 0, 1),
    )


def authpct(drawn: np.ndarray, training: np.ndarray, *, bootstrap: Bootstrap | None = None) -> Score:
    """Percentage of drawn pictures that are no copies of training pictures (authenticity of Alaa et al. 2022).

    A picture counts as authentic if its nearest training picture is farther from it than from its own nearest training
    picture. Copies give 0. Fresh samples of the training distribution do not give 100: one is not authentic if it and a
    training picture are each other's nearest, the chance of which is ⅔ on a line, 0.62 in a plane, and falls to ½ with
    the dimension (Cox 1981). That makes 33, 38, … 50; and more than 50 where few pictures are the nearest of many
    others, as in high dimensions. Pictures far from all training pictures give 100. The interval is of other drawn
    pictures and the same training pictures.

    Raises ValueError as `frechet_distance`.
    """
    drawn, training = checked(drawn, training, "training")
    bootstrap = bootstrap or Bootstrap()
    numbers, distances = nearest(drawn, training, 1)
    _, radii = nearest(training, training, 1)
    authentic = (distances > radii[numbers[:, 0]] + rounding(training))[:, 0]
    return bootstrap.score(100 * shares(bootstrap.counts(len(drawn), DRAWN), authentic), 0, 100)


def checked(drawn: np.ndarray, real: np.ndarray, real_name: str = "real") -> tuple[np.ndarray, np.ndarray]:
    """Both as float64. Raises ValueError as `frechet_distance`."""
    for name, features in (("drawn", drawn), (real_name, real)):
        if not isinstance(features, np.ndarray) or features.dtype.kind not in "fiu":
            what = f"of {features.dtype}" if isinstance(features, np.ndarray) else f"a {type(features).__name__}"
            raise ValueError(f"features of the {name} pictures are {what}: give an array of numbers (N, D)")
        if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
            raise ValueError(
                f"features of the {name} pictures are of shape {features.shape}: give (N, D), of 2 pictures or more"
            )
        bad = np.flatnonzero(~(np.abs(features) <= np.finfo(np.float32).max).all(axis=1))  # NaN is not either
        if len(bad):
            raise ValueError(
                f"features of {name} picture {bad[0]} are not finite, or beyond float32 ({len(bad)} of {len(features)} "
                "are): leave such pictures out, or run the network in float32"
            )
    if drawn.shape[1] != real.shape[1]:
        raise ValueError(
            f"drawn pictures have {drawn.shape[1]} features and {real_name} ones {real.shape[1]}: take both from one "
            "network"
        )
    return drawn.astype(np.float64), real.astype(np.float64)


def normal(features: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) of images that come `counts` times, (N,), and F (min(N, D), D) with FᵀF their covariance (by N - 1)."""
    features, counts = features[counts > 0], counts[counts > 0].astype(np.float64)
    size = counts.sum()
    mean = counts @ features / size
    (factor,) = scipy.linalg.qr(np.sqrt(counts / (size - 1))[:, None] * (features - mean), mode="r", check_finite=False)
    return mean, factor[: features.shape[1]]


def frechet_of_normals(mean: np.ndarray, factor: np.ndarray, other_mean: np.ndarray, other_factor: np.ndarray) -> float:
    """The Fréchet distance of two normal distributions with covariances FᵀF."""
    traces = np.square(factor).sum() + np.square(other_factor).sum()
    root = np.linalg.svd(factor @ other_factor.T, compute_uv=False).sum()
    # Equal distributions may come out below 0 by rounding.
    return max(0.0, float(np.square(mean - other_mean).sum() + traces - 2 * root))


def cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(xᵀy / D + 1)³ of all pairs, (N, M)."""
    linear = x @ y.T / x.shape[1] + 1
    return linear * linear * linear  # many times faster than **3


def gaussian_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """exp(-‖x - y‖² / 2σ²) of all pairs of unit vectors, (N, M)."""
    return np.exp((x @ y.T - 1) / CMMD_SIGMA**2)


def at_unit_norm(name: str, features: np.ndarray) -> np.ndarray:
    """Raises ValueError for features that are all 0."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not norms.all():
        raise ValueError(
            f"features of {name} picture {np.flatnonzero(norms == 0)[0]} are all 0, and have no direction: leave it out"
        )
    return features / norms


def subset(size: int, subset_size: int, generator: np.random.Generator) -> np.ndarray:
    """Numbers of the images of a subset, or of all if they are no more than that."""
    return np.arange(size) if size <= subset_size else generator.choice(size, subset_size, replace=False)


def squared_mmd(
    drawn: np.ndarray,
    real: np.ndarray,
    kernel: Kernel,
    subsets: list[tuple[np.ndarray, np.ndarray]],
    bootstrap: Bootstrap,
) -> Score:
    """The unbiased MMD² (Gretton et al. 2012, eq. 3), averaged over subsets of both sets, given as numbers of images.

    In a resample, pairs of an image with itself are left out too where it comes twice: they would add a bias.
    """
    counts = bootstrap.counts(len(drawn), DRAWN), bootstrap.counts(len(real), REAL)
    # Σ w_i w_j k_ij and Σ w_i w_j over pairs of drawn, of real, and of one and the other, for every resample.
    sums = np.zeros((3, 2, 1 + bootstrap.num_resamples))
    for numbers in subsets:
        (x, of_x), (y, of_y) = (
            (features[some], times[:, some])
            for features, times, some in zip((drawn, real), counts, numbers, strict=True)
        )
        sums += [pairs(kernel, x, x, of_x, of_x), pairs(kernel, y, y, of_y, of_y), pairs(kernel, x, y, of_x, of_y)]
    of_drawn, of_real, across = sums[:, 0] / sums[:, 1]
    return bootstrap.score(of_drawn + of_real - 2 * across)


def pairs(kernel: Kernel, x: np.ndarray, y: np.ndarray, of_x: np.ndarray, of_y: np.ndarray) -> np.ndarray:
    """Σ_ij w_i w_j k(x_i, y_j) and Σ_ij w_i w_j for each resample's counts w, (2, 1 + R); i ≠ j if x is y."""
    sums = np.zeros((2, len(of_x)))
    for rows in blocks(len(x)):
        left = of_x[:, rows].astype(np.float64)
        for columns in blocks(len(y)):
            values, right = kernel(x[rows], y[columns]), of_y[:, columns].astype(np.float64)
            sums[1] += left.sum(axis=1) * right.sum(axis=1)
            if x is y and rows == columns:
                np.fill_diagonal(values, 0)
                sums[1] -= np.square(left).sum(axis=1)
            sums[0] += np.einsum("rj,rj->r", left @ values, right)
    return sums


def shares(counts: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """(1 + R,) of a set and its resamples: the share of images for which `judged`, (1 + R, N) or (N,) bool, holds."""
    return np.where(judged, counts, 0).sum(axis=1) / counts.shape[1]
