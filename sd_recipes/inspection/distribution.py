"""A data set as a probability distribution, in one streaming pass and constant memory.

Values v lie in [0, 1]. Every summary is a sum over samples in float64 or int64, so that two halves of a
data set, seen by two processes, merge into the summary of the whole.
"""

from __future__ import annotations

import math

import numpy as np

LEVELS = 256  # of an 8-bit channel
PAIR_BINS = 64  # a side, of the green-blue density
JOINT_BINS = 32  # a side, of the density in colour space


class Moments:
    """Mean and covariance of vectors, by the pairwise update of Chan, Golub and LeVeque 1983, eq. 2.1.

    Unlike the sum of squares, it loses no digits where the mean is large compared with the deviation.
    """

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean = np.zeros(dimension)  # (d,)
        self.scatter = np.zeros((dimension, dimension))  # (d, d), sum of (x - mean)(x - mean)ᵀ

    def update(self, values: np.ndarray) -> None:
        """Add the rows of `values` (n, d)."""
        if len(values) == 0:
            return
        part = Moments(values.shape[1])
        part.count = len(values)
        values = values.astype(np.float64)
        part.mean = values.mean(axis=0)
        centred = values - part.mean
        part.scatter = centred.T @ centred
        self.merge(part)

    def merge(self, other: Moments) -> None:
        if other.count == 0:
            return
        total = self.count + other.count
        shift = other.mean - self.mean
        self.scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.count * other.count / total)
        self.mean = self.mean + shift * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), divided by n: the maximum-likelihood estimate. NaN without samples."""
        return self.scatter / self.count if self.count else np.full_like(self.scatter, np.nan)


def gaussian_from_histogram(counts: np.ndarray, bin_width: float, start: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and covariance (d, d) of the density that is constant within each bin of `counts` (n_1, …, n_d).

    All axes begin at `start` with bins of `bin_width`. A bin's own variance, bin_width² / 12 per axis, is
    included; without it, pictures only in gray, or in one colour, would have a singular covariance.
    """
    weights = counts / counts.sum()
    filled = np.argwhere(counts)  # (k, d)
    masses = weights[tuple(filled.T)]
    centres = start + (filled + 0.5) * bin_width
    mean = masses @ centres
    centred = centres - mean
    covariance = (centred * masses[:, None]).T @ centred + np.eye(counts.ndim) * bin_width**2 / 12
    return mean, covariance


def kl_from_gaussian(counts: np.ndarray, bin_width: float) -> float:
    """KL(p ‖ N(μ, Σ)) in nats, of a histogram's density p from the Gaussian with p's own mean and covariance.

    p is constant within each bin of `counts` (n_1, …, n_d), all of `bin_width`. Since the Gaussian has p's
    moments, ∫ p log N = -½ log det(2πe Σ), and the divergence is the difference of two entropies,
    ½ log det(2πe Σ) - h(p), called the negentropy (Comon 1994): never negative, 0 only for a Gaussian, and no
    other Gaussian is nearer to p. From n samples it comes out too large by about (filled bins - 1) / 2n
    (Miller 1955).
    """
    masses = counts[counts > 0] / counts.sum()
    entropy = -np.sum(masses * np.log(masses)) + counts.ndim * math.log(bin_width)
    _, covariance = gaussian_from_histogram(counts, bin_width, 0.0)
    gaussian_entropy = 0.5 * (counts.ndim * math.log(2 * math.pi * math.e) + np.linalg.slogdet(covariance)[1])
    return float(gaussian_entropy - entropy)


class PixelDistribution:
    """The colours of a data set: moments and histograms of red, green and blue in [0, 1].

    A level k of 0…255 stands for the interval of width 1/255 around k/255; in histograms of fewer bins
    it is a part of a bin. The first bin begins at -½/255 and the last ends at 1 + ½/255.
    """

    start = -0.5 / (LEVELS - 1)

    def __init__(self) -> None:
        self.moments = Moments(3)
        self.marginals = np.zeros((3, LEVELS), np.int64)
        self.green_blue = np.zeros((PAIR_BINS, PAIR_BINS), np.int64)
        self.joint = np.zeros((JOINT_BINS, JOINT_BINS, JOINT_BINS), np.int64)

    def update(self, pixels: np.ndarray) -> None:
        """Add `pixels`, uint8 (n, 3) in the order red, green, blue."""
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 2
        assert pixels.shape[1] == 3
        self.moments.update(pixels / (LEVELS - 1))
        for channel in range(3):
            self.marginals[channel] += np.bincount(pixels[:, channel], minlength=LEVELS)
        levels = pixels.astype(np.int64)
        pair = levels * PAIR_BINS // LEVELS
        self.green_blue += _count(pair[:, 1:], PAIR_BINS)
        self.joint += _count(levels * JOINT_BINS // LEVELS, JOINT_BINS)

    def merge(self, other: PixelDistribution) -> None:
        self.moments.merge(other.moments)
        self.marginals += other.marginals
        self.green_blue += other.green_blue
        self.joint += other.joint

    @staticmethod
    def bin_width(bins: int) -> float:
        """That of a histogram with this many bins a side, in units of v."""
        return LEVELS / bins / (LEVELS - 1)

    def kl_from_gaussians(self) -> dict[str, float]:
        """`kl_from_gaussian` of each channel, of green with blue, and of all three, in nats."""
        names = ("red", "green", "blue")
        one = self.bin_width(LEVELS)
        kl = {name: kl_from_gaussian(counts, one) for name, counts in zip(names, self.marginals, strict=True)}
        kl["green_blue"] = kl_from_gaussian(self.green_blue, self.bin_width(PAIR_BINS))
        kl["red_green_blue"] = kl_from_gaussian(self.joint, self.bin_width(JOINT_BINS))
        return kl

    @property
    def mean_square(self) -> float:
        """Mean of x² over pixels and channels, for x = 2v - 1, which is what a diffusion model is given."""
        mean, variance = self.moments.mean, np.diag(self.moments.covariance)
        return float(np.mean((2 * mean - 1) ** 2 + 4 * variance))


def _count(indices: np.ndarray, bins: int) -> np.ndarray:
    """Histogram (bins, …, bins) of integer rows (n, d)."""
    dimension = indices.shape[1]
    flat = np.ravel_multi_index(tuple(indices.T), (bins,) * dimension)
    return np.bincount(flat, minlength=bins**dimension).reshape((bins,) * dimension)


class LatentDistribution:
    """The VAE's latents, channel by channel: moments, and histograms on a grid that the first picture sets.

    The grid spans the first picture's mean ± 8 deviations; what falls beyond it is counted in the outermost
    bins and in `num_outside`.
    """

    num_bins = 128

    def __init__(self) -> None:
        self.moments: Moments | None = None
        self.num_outside = 0

    def update(self, latents: np.ndarray) -> None:
        """Add the latents (C, h, w) of one picture."""
        values = latents.reshape(len(latents), -1).T.astype(np.float64)  # (h w, C)
        if self.moments is None:
            self.moments = Moments(values.shape[1])
            reach = 8 * max(float(values.std()), 1e-6)
            self.start = float(values.mean()) - reach
            self.bin_width = 2 * reach / self.num_bins
            self.histograms = np.zeros((values.shape[1], self.num_bins), np.int64)
        self.moments.update(values)
        bins = np.floor((values - self.start) / self.bin_width).astype(np.int64)
        self.num_outside += int(np.sum((bins < 0) | (bins >= self.num_bins)))
        for channel, found in enumerate(bins.clip(0, self.num_bins - 1).T):
            self.histograms[channel] += np.bincount(found, minlength=self.num_bins)

    @property
    def deviation(self) -> float:
        """Standard deviation over all channels and positions, about their common mean."""
        assert self.moments is not None
        mean = self.moments.mean
        return float(np.sqrt(np.mean(np.diag(self.moments.covariance) + (mean - mean.mean()) ** 2)))

    def kl_from_gaussians(self) -> list[float]:
        """`kl_from_gaussian` of each channel, in nats."""
        return [kl_from_gaussian(counts, self.bin_width) for counts in self.histograms]

    @property
    def mean_square(self) -> float:
        """Mean of z² over channels and positions."""
        assert self.moments is not None
        return float(np.mean(np.diag(self.moments.covariance) + self.moments.mean**2))


def stable_diffusion_alphas_cumprod() -> np.ndarray:
    """ᾱ_t for t = 1…1000 of Stable Diffusion's schedule, whose √β_t is linear in t (Rombach et al. 2022)."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas)


def forward_kl(mean_square: float | np.ndarray, alpha_bar: float | np.ndarray) -> float | np.ndarray:
    """KL(q(x_t | x_0) ‖ N(0, I)) in nats per dimension, averaged over the x_0 whose mean of x_0² is given.

    q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I) (Ho et al. 2020, eq. 4), so that the divergence of the two Gaussians
    is ½ [ᾱ_t x_0² - ᾱ_t - log(1 - ᾱ_t)] per dimension. At t = T it is the prior term of the variational bound
    (Sohl-Dickstein et al. 2015, eq. 14; Ho et al. 2020, eq. 5).
    """
    return 0.5 * (alpha_bar * (mean_square - 1) - np.log1p(-alpha_bar))


def diffuse(x_0: np.ndarray, alpha_bar: float, noise: np.ndarray) -> np.ndarray:
    """x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε (Ho et al. 2020, eq. 4), of any shape."""
    return math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * noise
