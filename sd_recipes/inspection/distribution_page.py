"""What the page shows of the data set as a distribution: pixels, latents, and the forward process."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from sd_recipes.inspection import figures
from sd_recipes.inspection.distribution import diffuse, forward_kl
from sd_recipes.inspection.image_checks import SAMPLED_SIDE
from sd_recipes.inspection.summary import SHOWN_TIMESTEPS, Inspected

DIFFUSED = 3  # pictures that are shown at rising t
DIFFUSED_SIDE = 128


def pixels_section(inspected: Inspected) -> dict[str, Any]:
    pixels = inspected.scan.images.pixels
    return {
        "side": SAMPLED_SIDE,
        "channels_figure": figures.draw_channels(pixels),
        "green_blue_figure": figures.draw_green_blue(pixels),
        "colour_space_figure": figures.draw_colour_space(pixels),
    }


def latents_section(inspected: Inspected) -> dict[str, Any]:
    assert inspected.latents is not None
    return {"figure": figures.draw_latents(inspected.latents)}


def forward_section(inspected: Inspected) -> dict[str, Any]:
    alphas_cumprod = inspected.schedule()
    curves = {"pixels in [−1, 1], whole data set": (inspected.scan.images.pixels.mean_square, alphas_cumprod)}
    if inspected.latents is not None:
        curves["scaled latents"] = (inspected.latents.mean_square, alphas_cumprod)
    steps = [max(1, round(share * len(alphas_cumprod))) for share in SHOWN_TIMESTEPS]
    alpha_bars = [float(alphas_cumprod[t - 1]) for t in steps]
    chosen = [pixels for _, pixels in inspected.pictures[:: max(1, len(inspected.pictures) // DIFFUSED)][:DIFFUSED]]
    latents = None
    if inspected.model is not None:
        latents = _diffused(alpha_bars, [_diffused_latents(inspected.model, pixels) for pixels in chosen])
    return {
        "figure": figures.draw_forward_kl(curves),
        "side": min(DIFFUSED_SIDE, inspected.config.resolution),
        "steps": steps,
        "pixels": _diffused(alpha_bars, [_diffused_pixels(pixels) for pixels in chosen]),
        "latents": latents,
    }


def _diffused_pixels(pixels: np.ndarray) -> tuple[np.ndarray, Any]:
    """x_0 in [-1, 1] (3, h, w), and the function that turns an x_t into a picture."""
    small = Image.fromarray(pixels.transpose(1, 2, 0))
    small.thumbnail((DIFFUSED_SIDE, DIFFUSED_SIDE))
    x_0 = np.asarray(small).transpose(2, 0, 1) / 127.5 - 1
    return x_0, lambda x_t: ((x_t + 1) * 127.5).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def _diffused_latents(model: Any, pixels: np.ndarray) -> tuple[np.ndarray, Any]:
    from sd_recipes.inspection.latents import decode_picture, encode_picture

    z_0 = encode_picture(model.vae, pixels, np.random.default_rng(0))
    return z_0, lambda z_t: decode_picture(model.vae, z_t)


def _diffused(alpha_bars: list[float], pictures: list[tuple[np.ndarray, Any]]) -> list[dict[str, Any]]:
    """Each picture, alone and with the noise of each ᾱ_t, with its distance from pure noise in nats per dimension."""
    rng = np.random.default_rng(0)
    shown = []
    for x_0, to_picture in pictures:
        noise = rng.standard_normal(x_0.shape)
        diffused = [
            (
                figures.thumbnail(to_picture(diffuse(x_0, alpha_bar, noise)), DIFFUSED_SIDE),
                forward_kl(float(np.mean(x_0**2)), alpha_bar),
            )
            for alpha_bar in alpha_bars
        ]
        shown.append({"uri": figures.thumbnail(to_picture(x_0), DIFFUSED_SIDE), "diffused": diffused})
    return shown
