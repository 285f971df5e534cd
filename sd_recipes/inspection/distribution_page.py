"""The sections of the page that show the data set as a distribution: pixels, latents, and the forward process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from sd_recipes.inspection import figures
from sd_recipes.inspection.distribution import diffuse, forward_kl
from sd_recipes.inspection.image_checks import SAMPLED_SIDE
from sd_recipes.inspection.markup import formula, image, table, thumbnail
from sd_recipes.inspection.summary import SHOWN_TIMESTEPS, Inspected

DIFFUSED = 3  # pictures that are shown at rising t
DIFFUSED_SIDE = 128


def pixels_section(inspected: Inspected, content: dict[str, Any]) -> Iterator[str]:
    pixels, found = inspected.scan.images.pixels, content["pixels"]
    kl = found["kl_from_gaussian_nats"]
    yield "<h2>The pixels as a distribution</h2>"
    yield (
        f"<p>Values 0…255 are scaled to v in [0, 1]. From every image that decodes, {SAMPLED_SIDE} × {SAMPLED_SIDE} of "
        "its own pixels are taken, on an even lattice at a random place, so that large images count no more than "
        f"small ones: {found['number']:,} pixels. None is averaged with its neighbours, since averages vary "
        "less than pixels. (JPEGs far over the resolution are decoded at a reduced size, as in training.)</p>"
    )
    yield "<h3>One channel: the 1-D Gaussian</h3>"
    yield formula("N(v; μ, σ²) = exp[−(v − μ)² / 2σ²] / √(2πσ²)")
    yield (
        "<p>The line is the Gaussian with the mean μ and the standard deviation σ of the pixels, the one that makes "
        "them most likely. Peaks at 0 and 1, from black, white and clipped light, are what no Gaussian can follow.</p>"
    )
    yield image(figures.draw_channels(pixels), "histograms of red, green and blue with their Gaussians")
    yield "<h3>Two channels: blue and green</h3>"
    yield formula("N(v; μ, Σ) = exp[−½ (v − μ)ᵀ Σ⁻¹ (v − μ)] / √det(2πΣ)")
    yield (
        "<p>The 2-D Gaussian has a mean μ of two numbers and a covariance matrix Σ: the variances of blue and green on "
        "its diagonal, and beside it how the two rise together. Its lines of equal density are ellipses, here at 1, "
        "2 and 3 deviations: inside them lie 39 %, 86 % and 99 % of a true Gaussian.</p>"
    )
    yield image(figures.draw_green_blue(pixels), "density of blue and green with the ellipses of the Gaussian")
    yield _gaussian_table([2, 1], found)
    yield "<h3>Three channels: colour space</h3>"
    yield (
        "<p>The same formula with three channels. The dots are cells of the RGB cube in their own colours, drawn by "
        "chance, the likelier the more pixels they have. The wire surfaces are the 3-D Gaussian’s at 1 and 2 "
        "deviations, which know nothing of the cube’s walls; the red lines are the directions in which Σ stretches "
        "(its eigenvectors): usually one long axis from dark to bright and two short ones of hue.</p>"
    )
    yield image(figures.draw_colour_space(pixels), "pixels in colour space with the ellipsoids of the Gaussian")
    yield _gaussian_table([0, 1, 2], found)
    yield "<h3>How far from Gaussian?</h3>"
    yield formula("KL(p ‖ N) = ∫ p(v) log [p(v) / N(v; μ, Σ)] dv = ½ log det(2πe Σ) − h(p)")
    yield (
        "<p>The Kullback–Leibler divergence is 0 if the pixels’ density p is its Gaussian. Otherwise it is what a code "
        "made for the Gaussian wastes on each pixel, in nats (1 nat = 1.44 bits). Here p is constant within each bin "
        "of the histogram, h(p) = −∫ p log p dv its entropy, and the Gaussian has p’s mean and covariance.</p>"
    )
    yield table(
        ("", "#KL (nats)", "bins"),
        (
            ("red", f"{kl['red']:.3f}", "256"),
            ("green", f"{kl['green']:.3f}", "256"),
            ("blue", f"{kl['blue']:.3f}", "256"),
            ("green and blue", f"{kl['green_blue']:.3f}", "64 × 64"),
            ("red, green and blue", f"{kl['red_green_blue']:.3f}", "32 × 32 × 32"),
        ),
    )


def _gaussian_table(order: list[int], found: dict[str, Any]) -> str:
    names = [found["channels"][channel] for channel in order]
    return table(
        ("", "#μ", *(f"#Σ {name}" for name in names)),
        (
            (name, f"{found['mean'][i]:.4f}", *(f"{found['covariance'][i][j]:.5f}" for j in order))
            for name, i in zip(names, order, strict=True)
        ),
    )


def latents_section(inspected: Inspected, content: dict[str, Any]) -> Iterator[str]:
    found = content["latents"]
    assert inspected.latents is not None
    yield "<h2>The VAE’s latents</h2>"
    yield (
        f"<p>{found['images']:,} images, drawn at random and fitted to {inspected.config.resolution} × "
        f"{inspected.config.resolution} pixels, through the model’s VAE: z drawn from its posterior and multiplied by "
        "the scaling factor, as in training. Line: the channel’s own Gaussian. Dashed: N(0, 1), the noise it "
        "will be mixed with.</p>"
    )
    yield image(figures.draw_latents(inspected.latents), "histograms of the latents' channels")
    yield table(
        ("#channel", "#μ", "#σ", "#KL from its Gaussian (nats)"),
        (
            (number, *(f"{value:.4f}" for value in values))
            for number, values in enumerate(
                zip(found["mean"], found["deviation"], found["kl_from_gaussian_nats"], strict=True)
            )
        ),
    )
    yield (
        "<p>Latents are scaled to about unit variance (Rombach et al. 2022, appendix G), so that the noise schedule "
        f"means the same for every VAE. In use: <b>{found['scaling_factor']:.5g}</b>. This data alone would "
        f"give 1 / (standard deviation of z) = <b>{found['scaling_factor_of_this_data']:.5g}</b>. A pretrained UNet "
        "expects the one in use, whatever the data; choose another only when training from scratch.</p>"
    )


def forward_section(inspected: Inspected, content: dict[str, Any]) -> Iterator[str]:
    alphas_cumprod = inspected.schedule()
    whose = "the model’s" if inspected.model is not None else "Stable Diffusion’s"
    yield "<h2>The forward process</h2>"
    yield f"<p>Diffusion mixes an image x₀ with noise ε ~ N(0, I), by {whose} schedule ᾱ (Ho et al. 2020, eq. 4):</p>"
    yield formula("x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε,   so   q(x_t | x₀) = N(√ᾱ_t x₀, (1 − ᾱ_t) I)")
    yield "<p>Under each picture stands how far that is from pure noise, in nats a dimension:</p>"
    yield formula("KL(q(x_t | x₀) ‖ N(0, I)) = ½ [ᾱ_t x₀² − ᾱ_t − log(1 − ᾱ_t)]")
    yield (
        "<p>with x₀ in [−1, 1] and x₀² averaged over the picture. At t = T it is the prior term of the variational "
        "bound (Sohl-Dickstein et al. 2015), which should be near 0, since sampling begins from pure noise.</p>"
    )
    curves = {"pixels in [−1, 1], whole data set": (inspected.scan.images.pixels.mean_square, alphas_cumprod)}
    if inspected.latents is not None:
        curves["scaled latents"] = (inspected.latents.mean_square, alphas_cumprod)
    yield image(figures.draw_forward_kl(curves), "KL to pure noise against t")
    steps = [max(1, round(share * len(alphas_cumprod))) for share in SHOWN_TIMESTEPS]
    step = max(1, len(inspected.pictures) // DIFFUSED)
    chosen = inspected.pictures[::step][:DIFFUSED]
    yield f"<h3>Pixels, at {min(DIFFUSED_SIDE, inspected.config.resolution)} pixels a side</h3>"
    yield _diffused_table(steps, alphas_cumprod, (_diffused_pixels(pixels) for _, pixels in chosen))
    if inspected.model is not None:
        yield "<h3>Latents, decoded by the VAE</h3>"
        yield "<p>The noise is added to the scaled latents; the VAE shows what they would be a picture of.</p>"
        yield _diffused_table(
            steps, alphas_cumprod, (_diffused_latents(inspected.model, pixels) for _, pixels in chosen)
        )


def _diffused_pixels(pixels: np.ndarray) -> tuple[np.ndarray, Any]:
    """x_0 in [-1, 1] (3, h, w), and what makes a picture of an x_t."""
    small = Image.fromarray(pixels.transpose(1, 2, 0))
    small.thumbnail((DIFFUSED_SIDE, DIFFUSED_SIDE))
    x_0 = np.asarray(small).transpose(2, 0, 1) / 127.5 - 1
    return x_0, lambda x_t: ((x_t + 1) * 127.5).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def _diffused_latents(model: Any, pixels: np.ndarray) -> tuple[np.ndarray, Any]:
    from sd_recipes.inspection.latents import decode_picture, encode_picture

    z_0 = encode_picture(model.vae, pixels, np.random.default_rng(0))
    return z_0, lambda z_t: decode_picture(model.vae, z_t)


def _diffused_table(steps: list[int], alphas_cumprod: np.ndarray, pictures: Iterable[tuple[np.ndarray, Any]]) -> str:
    rng = np.random.default_rng(0)
    lines = ["<tr>" + "".join(f"<td>{title}</td>" for title in ("x₀", *(f"t = {t}" for t in steps))) + "</tr>"]
    for x_0, to_picture in pictures:
        noise = rng.standard_normal(x_0.shape)
        cells = [f'<img alt="" src="{thumbnail(to_picture(x_0), DIFFUSED_SIDE)}"><br>&nbsp;']
        for t in steps:
            alpha_bar = float(alphas_cumprod[t - 1])
            picture = to_picture(diffuse(x_0, alpha_bar, noise))
            kl = forward_kl(float(np.mean(x_0**2)), alpha_bar)
            cells.append(f'<img alt="" src="{thumbnail(picture, DIFFUSED_SIDE)}"><br>{kl:.2g} nats')
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<table class="diffused">{"".join(lines)}</table>'
