"""Draw the figures of docs/theory.md: docs/images/theory/NAME.png, one for each of FIGURES. Takes minutes on one core.

    python tools/draw_theory.py

All they show comes from the embedded emoji and the tiny base, by the two commands that the page gives its reader.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from matplotlib.figure import Figure

from sd_recipes.commands.inspect import inspect, read_settings
from sd_recipes.evaluation.bit_figures import MIN_SNR_GAMMA
from sd_recipes.evaluation.diffusion_process import DiffusionProcess
from sd_recipes.evaluation.figures import NUM_BINS
from sd_recipes.evaluation.sample_errors import HELD_OUT, TRAIN
from sd_recipes.evaluation.timestep_sampling import smooth
from sd_recipes.inspection.distribution import diffuse
from sd_recipes.inspection.figures import STYLE, draw_colour_space, draw_green_blue
from sd_recipes.inspection.latents import encode_picture
from sd_recipes.inspection.summary import Inspected
from sd_recipes.model.components import load_scheduler
from sd_recipes.model.latents import decode_latents, encode_pixels, to_pixel_values
from sd_recipes.model.predictions import PREDICTIONS, error_of_latents
from sd_recipes.recipe import ObjectiveConfig
from sd_recipes.training.objective import weights_of

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "images" / "theory"
EVALUATED = ROOT / "build" / "theory"
INSPECT = "sd-recipes inspect --dataset_name sd-recipes/emoji --resolution 64 \
    --pretrained_model_name_or_path sd-recipes/tiny-emoji --output_dir runs/theory/inspection"
EVALUATE = "sd-recipes evaluate sd-recipes/tiny-emoji --dataset_name sd-recipes/emoji --resolution 64 --center_crop \
    --validation_split train_heldout --num_pictures 0 --device cpu --bound \
    --output_dir runs/theory/evaluation"

DPI, WIDTH = 140, 5.2  # so that letters can be read on a phone and on paper
COLUMNS = 6  # of pictures
SHOWN_TIMESTEPS = (1, 100, 250, 500, 750, 1000)
LOSSES = {"bound": "the bound", "simple": "simple loss", "min_snr": "min-SNR, γ = 5"}
# Told apart without colours, too.
LINES: list[dict[str, Any]] = [
    {"color": "#12355b", "linestyle": "-"},
    {"color": "#d1701f", "linestyle": "--"},
    {"color": "#3f8f6b", "linestyle": ":", "linewidth": 2.2},
    {"color": "#8a8a8a", "linestyle": "-."},
]


@dataclass(frozen=True)
class Material:
    """What the figures are drawn from."""

    inspected: Inspected  # of all 1,554 pictures that the tiny base was trained on
    evaluated: Mapping[str, Any]  # what evaluation.json says of the tiny base
    bits: pa.Table  # squared errors of its x̂_0, at the timesteps of the bound
    process: DiffusionProcess

    @property
    def vae(self) -> AutoencoderKL:
        assert self.inspected.model is not None
        return self.inspected.model.vae

    @property
    def pictures(self) -> list[np.ndarray]:
        """uint8 (3, 64, 64) of COLUMNS of them."""
        found = [pixels for _, pixels in self.inspected.pictures]
        return found[:: len(found) // COLUMNS][:COLUMNS]

    def squared_errors(self, which: str, captions: bool) -> np.ndarray:
        """m_t of a set of rows, (T,): the mean of (x_0 - x̂_0)², along lines between timesteps with many samples."""
        bits = self.bits
        chosen = bits.filter(pc.and_(pc.equal(bits["set"], which), pc.equal(bits["captions"], captions)))
        return smooth(chosen["timestep"].to_numpy(), chosen["squared_error"].to_numpy(), len(self.process))


def gather() -> Material:
    """Run both commands; the first looks at all pictures, not only at a sample."""
    torch.set_num_threads(1)
    inspected = inspect(read_settings([*arguments(INSPECT), "--num_samples", "1554", "--num_workers", "0"]))
    command = [sys.executable, "-m", "sd_recipes.commands.cli", "evaluate", *arguments(EVALUATE)]
    subprocess.run(
        [*command, "--output_dir", str(EVALUATED)], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    (target,) = json.loads((EVALUATED / "evaluation.json").read_text(encoding="utf-8"))["targets"]
    return Material(
        inspected=inspected,
        evaluated=target,
        bits=pq.read_table(EVALUATED / "bits-1.parquet"),
        process=DiffusionProcess(load_scheduler(inspected.config)),
    )


def arguments(command: str) -> list[str]:
    """What follows the verb."""
    return command.split()[2:]


# ------------------------------------------------------------------------------------------ Gaussians


def mean_log_likelihood(
    mean: np.ndarray, covariance: np.ndarray, of_mean: np.ndarray, of_covariance: np.ndarray
) -> float:
    """Mean of log N(v; μ, Σ) in nats over data v of this mean (d,) and covariance (d, d), divided by N."""
    scatter = covariance + np.outer(mean - of_mean, mean - of_mean)
    log_determinant = np.linalg.slogdet(2 * np.pi * of_covariance)[1]
    return float(-0.5 * (log_determinant + np.trace(np.linalg.solve(of_covariance, scatter))))


def one_value(material: Material) -> Figure:
    """The greens' histogram with their Gaussian, and the log-likelihood of others."""
    pixels = material.inspected.scan.images.pixels
    mean, covariance = pixels.moments.mean[1:2], pixels.moments.covariance[1:2, 1:2]
    deviation = float(covariance[0, 0] ** 0.5)
    figure = new_figure(5.4)
    histogram, likelihood = figure.subplots(2, 1)
    width = pixels.bin_width(64)
    counts = pixels.marginals[1].reshape(64, -1).sum(axis=1)
    edges = pixels.start + width * np.arange(65)
    histogram.stairs(counts / counts.sum() / width, edges, fill=True, color="#b9c8bd", label="green of all pixels")
    v = np.linspace(-0.2, 1.6, 400)
    own = [np.exp(mean_log_likelihood(np.array([each]), np.zeros((1, 1)), mean, covariance)) for each in v]
    histogram.plot(v, own, **LINES[0], label="N(μ, σ²) of largest likelihood")
    histogram.set(xlabel="value v", ylabel="density (cut off at 4)", ylim=(0, 4), xlim=(-0.2, 1.6))
    histogram.legend(loc="upper left")
    for factor, line in ((1.0, LINES[0]), (0.7, LINES[1]), (1.6, LINES[2])):
        tried = np.linspace(mean[0] - 0.5, mean[0] + 0.5, 201)
        curve = [mean_log_likelihood(mean, covariance, np.array([m]), factor**2 * covariance) for m in tried]
        likelihood.plot(tried, curve, **line, label=f"σ = {factor * deviation:.3f}")
    likelihood.axvline(mean[0], color="#555555", linewidth=0.8)
    likelihood.set(xlabel="μ that is tried", ylabel="mean log-likelihood (nats)", ylim=(-2.2, 0.1))
    likelihood.legend(loc="lower center")
    return figure


def two_values(material: Material) -> bytes:
    return of_uri(draw_green_blue(material.inspected.scan.images.pixels))


def three_values(material: Material) -> bytes:
    return of_uri(draw_colour_space(material.inspected.scan.images.pixels, views=((18, -60),)))


def drawn_from_their_gaussian(pictures: np.ndarray, number: int) -> np.ndarray:
    """Draws (number, …) from N(μ, Σ), where μ and Σ are the mean and the covariance of pictures (N, …), divided by N.

    x = μ + Σ_n u_n (x_n - μ) / √N with u_n from N(0, 1) has them exactly, without the D × D numbers of Σ.
    """
    u = np.random.default_rng(0).standard_normal((number, len(pictures)))
    mean = pictures.mean(axis=0)
    return mean + np.tensordot(u, pictures - mean, axes=1) / len(pictures) ** 0.5


def whole_pictures(material: Material) -> Figure:
    """Emoji, and draws from the Gaussian of largest likelihood over whole pictures."""
    pictures = np.stack([pixels for _, pixels in material.inspected.pictures]) / 255
    drawn = as_uint8(drawn_from_their_gaussian(pictures, COLUMNS))
    return picture_rows({"emoji": material.pictures, "from the Gaussian of all 1,554": drawn})


# ------------------------------------------------------------------------------------------ the VAE


@torch.no_grad()
def posterior_kl(vae: AutoencoderKL, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """KL(q(z|x) ‖ N(0, I)) in nats a dimension, by channel (C,), and the mean deviation of q(z|x), before scaling.

    The mean over pictures, uint8 (3, H, W) each, and over a latent's places.
    """
    moments = encode_pixels(vae, to_pixel_values(torch.from_numpy(np.stack(pictures)), torch.float32))
    posterior = DiagonalGaussianDistribution(moments)
    by_channel = [
        DiagonalGaussianDistribution(torch.cat(each, dim=1)).kl().mean().item() / each[0][0].numel()
        for each in zip(posterior.mean.split(1, dim=1), posterior.logvar.split(1, dim=1), strict=True)
    ]
    return np.array(by_channel), posterior.std.mean().item()


def vae(material: Material) -> Figure:
    """Pictures, what the decoder makes of their latents, and what it makes of latents from N(0, I)."""
    rng = np.random.default_rng(0)
    latents = [encode_picture(material.vae, pixels, rng) for pixels in material.pictures]
    # decode_latents undoes the scaling.
    noise = [material.vae.config.scaling_factor * rng.standard_normal(each.shape) for each in latents]
    return picture_rows({
        "x": material.pictures,
        "decoded from z of q(z | x)": decoded(material.vae, latents),
        "decoded from z of N(0, I)": decoded(material.vae, noise),
    })  # fmt: skip


# ------------------------------------------------------------------------------------------ diffusion


def forward(material: Material) -> Figure:
    """x_t of a picture over t, in pixels and in latents."""
    (pixels,), rng = material.pictures[1:2], np.random.default_rng(0)
    alpha_bars = [float(material.process.alphas_cumprod[t - 1]) for t in SHOWN_TIMESTEPS]
    x_0, z_0 = pixels / 127.5 - 1, encode_picture(material.vae, pixels, rng)
    of_pixels, of_latents = (rng.standard_normal(each.shape) for each in (x_0, z_0))
    in_pixels = [(diffuse(x_0, alpha_bar, of_pixels) + 1) / 2 for alpha_bar in alpha_bars]
    in_latents = [diffuse(z_0, alpha_bar, of_latents) for alpha_bar in alpha_bars]
    titles = [f"t = {t}\nᾱ = {alpha_bar:.3f}" for t, alpha_bar in zip(SHOWN_TIMESTEPS, alpha_bars, strict=True)]
    rows = {"pixels": as_uint8(np.stack(in_pixels)), "latents, decoded": decoded(material.vae, in_latents)}
    return picture_rows(rows, titles)


def terms(material: Material) -> Figure:
    """L_{t-1} of each t, in bits."""
    figure = new_figure(3.4)
    axes = figure.subplots()
    cases = {"held out": (HELD_OUT, True), "held out, no caption": (HELD_OUT, False), "trained on": (TRAIN, True)}
    for (name, case), line in zip(cases.items(), LINES, strict=False):
        squared_errors = material.squared_errors(*case)
        constants, slopes = material.process.terms("fitted", squared_errors)
        bits = (constants + slopes * squared_errors) / np.log(2)
        axes.loglog(np.arange(2, len(bits) + 1), bits[1:], **line, label=name)
    axes.set(xlabel="timestep t", ylabel="$L_{t-1}$, bits per dimension")
    axes.legend()
    return figure


def shares(material: Material) -> Figure:
    """The share of each tenth of the timesteps in the bound and in two losses."""
    figure = new_figure(3.4)
    axes = figure.subplots()
    places = np.arange(NUM_BINS)
    shares_of = material.evaluated["bound"]["contributions"]
    for number, (key, shade) in enumerate({"bound": "#12355b", "simple": "#d98a4a", "min_snr": "#d9d9d9"}.items()):
        left, heights = places + (number - 1) * 0.28, 100 * np.array(shares_of[key])
        axes.bar(left, heights, 0.28, color=shade, edgecolor="black", linewidth=0.4, label=LOSSES[key])
    axes.set(xlabel="tenth of the timesteps (0: least noise)", ylabel="share (%)", xticks=places)
    axes.grid(axis="x", visible=False)
    axes.legend()
    return figure


def epsilon_weights(process: DiffusionProcess) -> dict[str, np.ndarray]:
    """The weight of ε's squared error at every timestep, (T,): in the bound with variance β_t, and in two losses."""
    _, slopes = process.terms("fixed_large", np.ones(len(process)))
    snr = torch.from_numpy(process.alphas_cumprod / (1 - process.alphas_cumprod))
    min_snr = ObjectiveConfig(snr_gamma=MIN_SNR_GAMMA)
    return {
        "bound": slopes * error_of_latents("epsilon", process.signal, process.sigma) ** 2,
        "simple": weights_of(snr, "epsilon", ObjectiveConfig()).numpy(),
        "min_snr": weights_of(snr, "epsilon", min_snr).numpy(),
    }


def weights(material: Material) -> Figure:
    """Those of `epsilon_weights`, each divided by its mean."""
    figure = new_figure(3.2)
    axes = figure.subplots()
    for (key, values), line in zip(epsilon_weights(material.process).items(), LINES, strict=False):
        axes.semilogy(np.arange(1, len(values) + 1), values / values.mean(), **line, label=LOSSES[key])
    axes.set(xlabel="timestep t", ylabel="weight of ε's error, over its mean")
    axes.legend()
    return figure


def predictions(material: Material) -> Figure:
    """The mean squared error of the same network as that of every prediction, on training rows."""
    process, squared_errors = material.process, material.squared_errors(TRAIN, True)
    names = {"epsilon": "ε", "v_prediction": "v", "sample": "x₀", "score": "score"}
    figure = new_figure(3.4)
    axes = figure.subplots()
    for name, line in zip(PREDICTIONS, LINES, strict=True):
        error = squared_errors / error_of_latents(name, process.signal, process.sigma) ** 2
        axes.loglog(np.arange(1, len(process) + 1), error, **line, label=names[name])
    axes.set(xlabel="timestep t", ylabel="mean squared error")
    axes.legend(ncols=4, loc="upper center")
    return figure


def held_out(material: Material) -> Figure:
    """The error of v in each tenth of the timesteps, of both sets."""
    figure = new_figure(3.2)
    axes = figure.subplots()
    names = {"validation": "held-out emoji", "train_subset": "emoji trained on"}
    for (key, name), line in zip(names.items(), LINES, strict=False):
        means = [material.evaluated["figures"][f"{key}_loss_bin_{number}"] for number in range(NUM_BINS)]
        axes.plot(np.arange(NUM_BINS), means, **line, marker="o", markersize=4, label=name)
    axes.set(xlabel="tenth of the timesteps (0: least noise)", ylabel="mean squared error of v", xticks=range(NUM_BINS))
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


# ------------------------------------------------------------------------------------------ pictures and files


def decoded(vae: AutoencoderKL, latents: Sequence[np.ndarray]) -> np.ndarray:
    """Scaled latents (C, h, w) each to uint8 (N, 3, H, W)."""
    return decode_latents(vae, torch.from_numpy(np.stack(latents)).float()).round().byte().numpy()


def as_uint8(values: np.ndarray) -> np.ndarray:
    """Values, 0 black and 1 white, to 0 … 255."""
    return (255 * values).round().clip(0, 255).astype(np.uint8)


def new_figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def picture_rows(rows: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str] = ()) -> Figure:
    """Rows of pictures, uint8 (3, H, W), each row under its name, and titles under the last one's columns."""
    side, gap, name_height, title_height = 0.8, 0.08, 0.24, 0.38 if titles else 0  # in inches
    height = len(rows) * (side + name_height) + title_height
    figure = Figure(figsize=(COLUMNS * (side + gap), height))
    top = height
    for name, pictures in rows.items():
        top -= name_height + side
        figure.text(gap / (2 * figure.get_figwidth()), (top + side + 0.05) / height, name, fontsize=9)
        for column, pixels in enumerate(pictures):
            left = (column * (side + gap) + gap / 2) / figure.get_figwidth()
            axes = figure.add_axes((left, top / height, side / figure.get_figwidth(), side / height))
            axes.imshow(pixels.transpose(1, 2, 0), interpolation="nearest")
            axes.axis("off")
            if titles and top < side:
                axes.text(0.5, -0.05, titles[column], transform=axes.transAxes, fontsize=8, va="top", ha="center")
    return figure


def of_uri(uri: str) -> bytes:
    """The file in a data URI."""
    return base64.b64decode(uri.partition(",")[2])


DRAWN = (
    one_value, two_values, three_values, whole_pictures, vae, forward, terms, shares, weights, predictions, held_out
)  # fmt: skip
FIGURES: dict[str, Callable[[Material], Figure | bytes]] = {draw.__name__: draw for draw in DRAWN}


def main() -> None:
    material = gather()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        path = FOLDER / f"{name}.png"
        with matplotlib.rc_context({**STYLE, "font.size": 10, "legend.fontsize": 9}):
            drawn = draw(material)
            if isinstance(drawn, bytes):
                path.write_bytes(drawn)
            else:
                drawn.savefig(path, dpi=DPI)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
