"""The figures of the page, each from counts and moments, as PNG in a data URI."""

from __future__ import annotations

import base64
import io
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from PIL import Image

from sd_recipes.export.pages import picture_uri
from sd_recipes.inspection.caption_checks import CaptionSummary
from sd_recipes.inspection.distribution import LatentDistribution, PixelDistribution, forward_kl
from sd_recipes.inspection.image_checks import ASPECT_EDGES, SIDE_EDGES, ImageSummary

STYLE: Any = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
CHANNELS = ("red", "green", "blue")
COLOURS = ("#c0392b", "#2e8b57", "#2c5fb3")
DOTS = 1500
BARS, LINE = "#8fa9c9", "#333333"


def _uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def thumbnail(pixels: np.ndarray, side: int) -> str:
    """uint8 (H, W, 3) as a data URI, at most `side` pixels a side, in JPEG."""
    return picture_uri(Image.fromarray(np.ascontiguousarray(pixels)), side)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def draw_sizes(images: ImageSummary, resolution: int) -> str:
    """Histograms of the shorter side and of the aspect ratio, on logarithmic axes."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(9, 3)
        side, aspect = figure.subplots(1, 2)
        side.stairs(images.shorter_sides, SIDE_EDGES, fill=True, color=BARS)
        side.axvline(resolution, color=LINE, linestyle="--", linewidth=1, label=f"--resolution {resolution}")
        side.set_xscale("log", base=2)
        filled = np.flatnonzero(images.shorter_sides)
        side.set_xlim(min(SIDE_EDGES[filled[0]], resolution) / 1.5, max(SIDE_EDGES[filled[-1] + 1], resolution) * 1.5)
        side.xaxis.set_major_formatter("{x:.0f}")
        side.set(xlabel="shorter side (pixels)", ylabel="images")
        side.legend()
        aspect.stairs(images.aspect_ratios, ASPECT_EDGES, fill=True, color=BARS)
        aspect.axvline(1, color=LINE, linestyle="--", linewidth=1, label="square")
        aspect.set_xscale("log", base=2)
        ratios = {1 / 4: "1:4", 1 / 2: "1:2", 2 / 3: "2:3", 1: "1:1", 3 / 2: "3:2", 2: "2:1", 4: "4:1"}
        aspect.set_xticks(list(ratios), list(ratios.values()))
        aspect.set_xticks([], minor=True)
        aspect.set(xlabel="width : height", ylabel="images", xlim=(1 / 5, 5))
        aspect.legend()
        return _uri(figure)


def draw_captions(captions: CaptionSummary) -> str:
    """Captions by their number of words and, with a tokenizer, of tokens."""
    with matplotlib.rc_context(STYLE):
        has_tokens = captions.tokenizer is not None
        figure = _figure(9 if has_tokens else 4.5, 3)
        axes = figure.subplots(1, 1 + has_tokens, squeeze=False)[0]
        _draw_lengths(axes[0], captions.word_counts, "words per caption")
        if has_tokens:
            _draw_lengths(axes[1], captions.token_counts, "tokens per caption")
            limit = captions.max_tokens
            axes[1].set_xlim(right=max(limit + 2, axes[1].get_xlim()[1]))
            axes[1].axvline(limit, color=LINE, linestyle="--", linewidth=1, label=f"limit: {limit}")
            axes[1].legend()
        return _uri(figure)


def _draw_lengths(axes: matplotlib.axes.Axes, counts: np.ndarray, label: str) -> None:
    longest = int(np.flatnonzero(counts)[-1])
    axes.bar(np.arange(longest + 1), counts[: longest + 1], width=1, color=BARS)
    axes.set(xlabel=label, ylabel="captions", xlim=(-0.6, longest + 0.6))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))


def draw_channels(pixels: PixelDistribution) -> str:
    """Each channel's density with its 1-D Gaussian N(μ, σ²)."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(9, 2.8)
        width = pixels.bin_width(pixels.marginals.shape[1])
        edges = pixels.start + width * np.arange(pixels.marginals.shape[1] + 1)
        for channel, axes in enumerate(figure.subplots(1, 3)):
            density = pixels.marginals[channel] / pixels.marginals[channel].sum() / width
            mean, deviation = pixels.moments.mean[channel], pixels.moments.covariance[channel, channel] ** 0.5
            axes.stairs(density, edges, fill=True, color=COLOURS[channel], alpha=0.45)
            _draw_gaussian(axes, mean, deviation, edges)
            # One level, such as white paper, may hold most pixels; it would flatten the rest.
            axes.set_ylim(0, 1.4 * max(np.quantile(density, 0.99), 0.4 / max(deviation, 1e-3)))
            axes.set(xlabel=f"{CHANNELS[channel]} value v", xlim=(edges[0], edges[-1]))
            axes.set_title(f"μ = {mean:.3f}   σ = {deviation:.3f}", fontsize=9)
            axes.set_ylabel("density" if channel == 0 else "")
        return _uri(figure)


def _draw_gaussian(axes: matplotlib.axes.Axes, mean: float, deviation: float, edges: np.ndarray) -> None:
    x = np.linspace(edges[0], edges[-1], 400)
    if deviation > 0:
        density = np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))
        axes.plot(x, density, color=LINE, linewidth=1.2)


def draw_green_blue(pixels: PixelDistribution) -> str:
    """The density of (blue, green) with the ellipses of its 2-D Gaussian at 1, 2 and 3 deviations."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = _figure(5.2, 4.4)
        axes = figure.subplots()
        bins = len(pixels.green_blue)
        low, high = pixels.start, pixels.start + bins * pixels.bin_width(bins)
        density = pixels.green_blue / pixels.green_blue.sum() / pixels.bin_width(bins) ** 2
        shown = np.ma.masked_equal(density, 0)
        image = axes.imshow(
            shown, origin="lower", extent=(low, high, low, high), norm=matplotlib.colors.LogNorm(), cmap="Blues",
            aspect="equal", interpolation="nearest",
        )  # fmt: skip
        figure.colorbar(image, ax=axes, label="density (logarithmic)", shrink=0.85)
        order = [2, 1]  # blue across, green up
        mean, covariance = pixels.moments.mean[order], pixels.moments.covariance[np.ix_(order, order)]
        variances, directions = np.linalg.eigh(covariance)
        angle = np.degrees(np.arctan2(directions[1, 1], directions[0, 1]))
        for deviations in (1, 2, 3):
            across, along = 2 * deviations * np.sqrt(variances.clip(0))
            axes.add_patch(
                Ellipse((mean[0], mean[1]), along, across, angle=angle, fill=False, color="#c0392b", linewidth=1.3)
            )
        axes.plot(*mean, "+", color="#c0392b", markersize=9)
        axes.set(xlabel="blue value v", ylabel="green value v", xlim=(low, high), ylim=(low, high))
        return _uri(figure)


def draw_colour_space(pixels: PixelDistribution, views: Sequence[tuple[int, int]] = ((18, -60), (18, 30))) -> str:
    """Cells of the RGB cube in their own colours, with the 3-D Gaussian's surface at 1 and 2 deviations.

    Up to DOTS cells are drawn at random, a cell being likelier the more pixels it has. `views` are elevations and
    azimuths in degrees, side by side.
    """
    with matplotlib.rc_context(STYLE):
        figure = _figure(4.5 * len(views), 4.6)
        bins = len(pixels.joint)
        filled = np.argwhere(pixels.joint)
        shares = pixels.joint[tuple(filled.T)] / pixels.joint.sum()
        chosen = np.random.default_rng(0).choice(len(filled), min(DOTS, len(filled)), replace=False, p=shares)
        places = pixels.start + (filled[chosen] + 0.5) * pixels.bin_width(bins)
        mean, covariance = pixels.moments.mean, pixels.moments.covariance
        variances, directions = np.linalg.eigh(covariance)
        u, v = np.meshgrid(np.linspace(0, 2 * np.pi, 25), np.linspace(0, np.pi, 13))
        ball = np.stack([np.cos(u) * np.sin(v), np.sin(u) * np.sin(v), np.cos(v)], axis=-1)
        surface = (ball * np.sqrt(variances.clip(0))) @ directions.T
        reach = (min(0.0, (mean + 2 * surface).min()), max(1.0, (mean + 2 * surface).max()))
        for number, (elevation, azimuth) in enumerate(views, start=1):
            axes = figure.add_subplot(1, len(views), number, projection="3d")
            axes.computed_zorder = False  # draws the surfaces over the dots, which would hide them
            axes.scatter(*places.T, s=7, c=places.clip(0, 1), alpha=0.6, linewidths=0, depthshade=False, zorder=1)
            for deviations, alpha in ((1, 0.9), (2, 0.45)):
                x, y, z = np.moveaxis(mean + deviations * surface, -1, 0)
                axes.plot_wireframe(x, y, z, color="black", linewidth=0.6, alpha=alpha, zorder=2)
            for variance, direction in zip(variances, directions.T, strict=True):
                axis = mean + 2 * np.sqrt(max(variance, 0)) * np.outer([-1, 1], direction)
                axes.plot(*axis.T, color="#c0392b", linewidth=1.8, zorder=3)
            for corner, other in itertools.combinations(itertools.product((0, 1), repeat=3), 2):
                if sum(map(operator.ne, corner, other)) == 1:
                    axes.plot(*zip(corner, other, strict=True), color="#999999", linewidth=0.8, zorder=1)
            axes.set(xlabel="red", ylabel="green", zlabel="blue", xlim=reach, ylim=reach, zlim=reach)
            axes.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), zticks=(0, 0.5, 1))
            axes.set_box_aspect((1, 1, 1), zoom=0.85)
            axes.view_init(elevation, azimuth)
        return _uri(figure)


def draw_latents(latents: LatentDistribution) -> str:
    """Each channel's density with its own Gaussian and with N(0, 1), which the scaling aims at."""
    with matplotlib.rc_context(STYLE):
        channels = len(latents.histograms)
        columns = min(channels, 4)
        rows = -(-channels // columns)
        figure = _figure(9, 2.5 * rows)
        edges = latents.start + latents.bin_width * np.arange(latents.num_bins + 1)
        assert latents.moments is not None
        covariance = latents.moments.covariance
        for channel, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
            if channel >= channels:
                axes.set_visible(False)
                continue
            counts = latents.histograms[channel]
            mean, deviation = latents.moments.mean[channel], covariance[channel, channel] ** 0.5
            axes.stairs(counts / counts.sum() / latents.bin_width, edges, fill=True, color=BARS)
            _draw_gaussian(axes, mean, deviation, edges)
            x = np.linspace(-4, 4, 200)
            axes.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), color="#c0392b", linestyle="--", linewidth=1)
            reach = max(4.0, *(abs(mean + sign * 4 * deviation) for sign in (-1, 1)))
            axes.set(xlabel=f"channel {channel}, scaled", xlim=(-reach, reach))
            axes.set_title(f"μ = {mean:.2f}   σ = {deviation:.2f}", fontsize=9)
            axes.set_ylabel("density" if channel % columns == 0 else "")
        return _uri(figure)


def draw_forward_kl(curves: dict[str, tuple[float, np.ndarray]]) -> str:
    """KL(q(x_t|x_0) ‖ N(0, I)) against t, for each named (mean of x_0², ᾱ)."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(6, 3)
        axes = figure.subplots()
        for (name, (mean_square, alphas_cumprod)), colour in zip(curves.items(), ("#2c5fb3", "#e08214"), strict=False):
            kl = forward_kl(mean_square, alphas_cumprod)
            axes.plot(np.arange(1, len(alphas_cumprod) + 1), kl, color=colour, label=name)
        axes.set(xlabel="timestep t", ylabel="KL (nats per dimension)", yscale="log")
        axes.legend()
        return _uri(figure)


def draw_buckets(buckets: list[tuple[str, int]], batch_size: int) -> str:
    """The number of images in each bucket, with the size of a batch."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(9, 0.8 + 0.22 * len(buckets))
        axes = figure.subplots()
        names, counts = zip(*reversed(buckets), strict=True)
        axes.barh(names, counts, color=BARS)
        axes.axvline(batch_size, color=LINE, linestyle="--", linewidth=1, label=f"--train_batch_size {batch_size}")
        axes.set(xlabel="images", ylabel="width × height")
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower right")
        return _uri(figure)
