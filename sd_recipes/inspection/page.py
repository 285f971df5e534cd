"""The HTML page: one file without scripts or links to anything, with its figures inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sd_recipes.data.captions import CaptionError
from sd_recipes.data.images import ImageError, open_image
from sd_recipes.inspection import figures
from sd_recipes.inspection.distribution import diffuse, forward_kl
from sd_recipes.inspection.findings import kinds
from sd_recipes.inspection.image_checks import SAMPLED_SIDE
from sd_recipes.inspection.summary import SHOWN_TIMESTEPS, Inspected

THUMBNAIL = 96  # pixels a side, at most
SHOWN = 20  # rows of a table; the JSON file has more
SHOWN_BUCKETS = 25
SHOWN_GROUPS = 12
DIFFUSED = 3  # pictures that are shown at rising t
DIFFUSED_SIDE = 128

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1040px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.7em; margin-bottom: .2em; }
h2 { font-size: 1.25em; margin: 2.2em 0 .4em; border-bottom: 1px solid #ddd; }
h3 { font-size: 1.05em; margin: 1.4em 0 .3em; }
p { max-width: 46em; margin: .5em 0; } p.wide { max-width: none; }
p.formula { font: italic 17px/1.6 Georgia, serif; margin-left: 2em; } sub, sup { font-size: .7em; line-height: 0; }
table { border-collapse: collapse; margin: .6em 0; font-size: 13.5px; } caption { text-align: left; color: #666; }
th, td { padding: .25em .8em .25em 0; text-align: left; vertical-align: top; border-bottom: 1px solid #eee;
  overflow-wrap: break-word; max-width: 44em; }
th { color: #666; font-weight: 600; white-space: nowrap; } td > span { white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } img.thumbnail { max-height: 96px; margin: 2px; vertical-align: top; background: #eee; }
.verdict { padding: .7em 1em; border-radius: 6px; margin: 1em 0; }
.clean { background: #e7f4ea; } .problems { background: #fdf3dc; } .unusable { background: #fbe4e1; }
.bad { color: #b03a2e; font-weight: 600; } .problem { color: #9a6a00; font-weight: 600; } .note { color: #666; }
.diffused td { text-align: center; border: 0; padding: 2px; font-size: 12px; color: #444; }
.diffused img { width: 118px; height: 118px; object-fit: contain; image-rendering: pixelated; }
.muted { color: #666; font-size: 13.5px; }
"""

VERDICTS = {
    "clean": "Clean: nothing that training would trip over.",
    "problems": "Problems: training would skip rows, or learn from them what it should not.",
    "unusable": "Unusable: no row can be trained on.",
}


def write_page(inspected: Inspected, content: dict[str, Any], path: Path) -> None:
    """Write the page; `content` is what the JSON file says."""
    scan = inspected.scan
    parts = [*_head(inspected, content), *_findings(inspected, content), *_duplicates(inspected, content)]
    if scan.rows:
        parts += _sizes(inspected, content)
    if scan.captions.num_captions:
        parts += _captions(inspected, content)
    if scan.rows:
        parts += _pixels(inspected, content)
    if "latents" in content:
        parts += _latents(inspected, content)
    if inspected.pictures:
        parts += _forward(inspected, content)
    path.write_text(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(inspected.source)}: inspection</title><style>{CSS}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n",
        encoding="utf-8",
    )


def _head(inspected: Inspected, content: dict[str, Any]) -> Iterator[str]:
    rows, status = content["rows"], content["status"]
    yield f"<h1>{escape(inspected.source)}</h1>"
    yield f'<div class="verdict {status}"><b>{VERDICTS[status]}</b></div>'
    available = rows["available"]
    if available is None:
        scope = f"the first {rows['inspected']:,} rows of a stream"
    elif available > rows["inspected"]:
        scope = f"{rows['inspected']:,} of {available:,} rows, drawn at random"
    else:
        scope = f"all {available:,} rows"
    yield (
        f"<p>Inspected: {scope}; {rows['usable']:,} can be trained on, {rows['bad']:,} cannot. The full lists are in "
        "inspection.json beside this page.</p>"
    )
    yield '<p class="wide">' + "".join(
        f'<img class="thumbnail" alt="{escape(name)}" title="{escape(name)}" src="{_thumbnail(pixels)}">'
        for name, pixels in inspected.pictures[:: max(1, len(inspected.pictures) // 9)][:9]
    ) + "</p>"  # fmt: skip


def _findings(inspected: Inspected, content: dict[str, Any]) -> Iterator[str]:
    yield "<h2>Findings</h2>"
    if not content["findings"]:
        yield "<p>None.</p>"
        return
    yield (
        '<p>A <span class="bad">bad</span> row cannot be trained on and is skipped. A <span class="problem">problem'
        '</span> should be mended. A <span class="note">note</span> is for information and leaves a data set clean.</p>'
    )
    told = kinds(inspected.config)
    yield _table(
        ("", "#rows", "what", "meaning"),
        (
            (_raw(f'<span class="{found["severity"]}">{found["severity"]}</span>'), f"{found['count']:,}",
             found["title"], told[kind].meaning)
            for kind, found in content["findings"].items()
        ),
    )  # fmt: skip
    for kind, found in content["findings"].items():
        yield f"<h3>{escape(found['title'].capitalize())} ({found['count']:,})</h3>"
        thumbnails = [
            uri for listed in inspected.scan.findings.listed[kind][:8] if (uri := _row_thumbnail(inspected, listed.row))
        ]
        if thumbnails:
            yield (
                '<p class="wide">'
                + "".join(f'<img class="thumbnail" alt="" src="{uri}">' for uri in thumbnails)
                + "</p>"
            )
        listed = found["listed"][:SHOWN]
        yield _table(
            ("#row", "name", "what is wrong"),
            (("" if each["row"] is None else each["row"], each["name"], each["detail"]) for each in listed),
        )
        if found["count"] > len(listed):
            yield f'<p class="muted">and {found["count"] - len(listed):,} more</p>'


def _duplicates(inspected: Inspected, content: dict[str, Any]) -> Iterator[str]:
    yield "<h2>Duplicates</h2>"
    duplicates = content["duplicates"]
    yield (
        "<p>A picture that occurs often is learned by heart. <b>Same file</b>: equal bytes. <b>Looks alike</b>: "
        "different files whose perceptual hash (the signs of the 64 lowest frequencies of the picture in gray, "
        "ImageHash’s phash) differs in at most 3 of its 64 bits; it sees no difference that is "
        "one of colour alone. Linked pairs make a group, so look before deleting. "
        "<b>Same caption</b>: equal but for space around it. All are notes.</p>"
    )
    names = {"images": "same file", "near_images": "looks alike", "captions": "same caption"}
    yield _table(
        ("", "#groups", "#rows in them", "#rows too many"),
        (
            (title, *(f"{duplicates[name][key]:,}" for key in ("groups", "rows", "surplus")))
            for name, title in names.items()
        ),
    )
    if not duplicates["near_images"]["search_complete"]:
        yield (
            '<p class="muted">Very many hashes share a quarter of their bits; those were compared with their '
            "nearest 256 in sorted order only, so some pairs that look alike may be missing.</p>"
        )
    for name in ("images", "near_images"):
        groups = duplicates[name]["largest"][:SHOWN_GROUPS]
        if groups:
            yield f"<h3>{names[name].capitalize()}</h3>"
            yield _table(
                ("#rows", "pictures", "names"),
                (
                    (
                        f"{group['rows']:,}",
                        _raw("".join(
                            f'<img class="thumbnail" alt="" src="{uri}">'
                            for row in group["first_rows"][:5]
                            if (uri := _row_thumbnail(inspected, row))
                        )),
                        ", ".join(group["names"][:5]) + (", …" if group["rows"] > 5 else ""),
                    )
                    for group in groups
                ),
            )  # fmt: skip
    groups = duplicates["captions"]["largest"][:SHOWN_GROUPS]
    if groups:
        yield "<h3>Same caption</h3>"
        yield _table(
            ("#captions", "caption", "names"),
            (
                (f"{group['rows']:,}", _caption(inspected, group["first_rows"][0]), ", ".join(group["names"][:5]))
                for group in groups
            ),
        )


def _sizes(inspected: Inspected, content: dict[str, Any]) -> Iterator[str]:
    config = inspected.config
    yield "<h2>Sizes</h2>"
    yield (
        "<p>Upright width and height, by the header. Images left of the dashed line are enlarged for training. "
        "Both axes are logarithmic: each step is a factor.</p>"
    )
    yield _image(figures.draw_sizes(inspected.scan.images, config.resolution), "shorter sides and aspect ratios")
    buckets = content["images"]["buckets"]
    yield "<h3>Aspect-ratio buckets</h3>"
    use = "are used" if config.aspect_ratio_buckets else "would be used with --aspect_ratio_buckets"
    yield (
        f"<p>These shapes of about {config.resolution}² pixels {use}. A batch has one shape: a bucket with fewer "
        f"images than a batch ({config.train_batch_size}) always makes small batches, whose gradients are noisier. "
        f"{content['images']['too_small_for_buckets']:,} images are too small for any.</p>"
    )
    if buckets:
        names = [(f"{bucket['width']} × {bucket['height']}", bucket["images"]) for bucket in buckets[:SHOWN_BUCKETS]]
        if len(buckets) > 1:
            yield _image(figures.draw_buckets(names, config.train_batch_size), "images of each bucket")
        yield _table(
            ("#width", "#height", "#images", "#batches an epoch", "#images in the last"),
            (tuple(f"{value:,}" for value in bucket.values()) for bucket in buckets[:SHOWN_BUCKETS]),
        )


def _captions(inspected: Inspected, content: dict[str, Any]) -> Iterator[str]:
    found = content["captions"]
    yield "<h2>Captions</h2>"
    yield f"<p>{found['number']:,} captions, {found['words_mean']:.1f} words on average."
    if "tokens_limit" in found:
        over = inspected.scan.findings.counts["long_caption"]
        yield (
            f" {found['tokens_mean']:.1f} tokens on average; {found['tokens_limit']} reach the model, beside the marks "
            f"of start and end. {over:,} captions are longer and lose {found['tokens_lost']:,} tokens together."
        )
    yield "</p>"
    yield _image(figures.draw_captions(inspected.scan.captions), "lengths of captions")
    words = list(found["common_words"].items())[:60]
    yield "<p><b>Commonest words:</b> " + ", ".join(f"{escape(word)} {number:,}" for word, number in words) + "</p>"
    if not found["words_complete"]:
        yield '<p class="muted">There are so many words that the rarest were forgotten on the way.</p>'
    yield _table(
        ("name", "captions drawn at random"),
        ((name, _caption(inspected, row)) for row, name, _ in inspected.scan.samples[:8]),
    )


def _pixels(inspected: Inspected, content: dict[str, Any]) -> Iterator[str]:
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
    yield _formula("N(v; μ, σ²) = exp[−(v − μ)² / 2σ²] / √(2πσ²)")
    yield (
        "<p>The line is the Gaussian with the mean μ and the standard deviation σ of the pixels, the one that makes "
        "them most likely. Peaks at 0 and 1, from black, white and clipped light, are what no Gaussian can follow.</p>"
    )
    yield _image(figures.draw_channels(pixels), "histograms of red, green and blue with their Gaussians")
    yield "<h3>Two channels: blue and green</h3>"
    yield _formula("N(v; μ, Σ) = exp[−½ (v − μ)ᵀ Σ⁻¹ (v − μ)] / √det(2πΣ)")
    yield (
        "<p>The 2-D Gaussian has a mean μ of two numbers and a covariance matrix Σ: the variances of blue and green on "
        "its diagonal, and beside it how the two rise together. Its lines of equal density are ellipses, here at 1, "
        "2 and 3 deviations: inside them lie 39 %, 86 % and 99 % of a true Gaussian.</p>"
    )
    yield _image(figures.draw_green_blue(pixels), "density of blue and green with the ellipses of the Gaussian")
    yield _gaussian_table([2, 1], found)
    yield "<h3>Three channels: colour space</h3>"
    yield (
        "<p>The same formula with three channels. The dots are cells of the RGB cube in their own colours, drawn by "
        "chance, the likelier the more pixels they have. The wire surfaces are the 3-D Gaussian’s at 1 and 2 "
        "deviations, which know nothing of the cube’s walls; the red lines are the directions in which Σ stretches "
        "(its eigenvectors): usually one long axis from dark to bright and two short ones of hue.</p>"
    )
    yield _image(figures.draw_colour_space(pixels), "pixels in colour space with the ellipsoids of the Gaussian")
    yield _gaussian_table([0, 1, 2], found)
    yield "<h3>How far from Gaussian?</h3>"
    yield _formula("KL(p ‖ N) = ∫ p(v) log [p(v) / N(v; μ, Σ)] dv = ½ log det(2πe Σ) − h(p)")
    yield (
        "<p>The Kullback–Leibler divergence is 0 if the pixels’ density p is its Gaussian. Otherwise it is what a code "
        "made for the Gaussian wastes on each pixel, in nats (1 nat = 1.44 bits). Here p is constant within each bin "
        "of the histogram, h(p) = −∫ p log p dv its entropy, and the Gaussian has p’s mean and covariance.</p>"
    )
    yield _table(
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
    return _table(
        ("", "#μ", *(f"#Σ {name}" for name in names)),
        (
            (name, f"{found['mean'][i]:.4f}", *(f"{found['covariance'][i][j]:.5f}" for j in order))
            for name, i in zip(names, order, strict=True)
        ),
    )


def _latents(inspected: Inspected, content: dict[str, Any]) -> Iterator[str]:
    found = content["latents"]
    assert inspected.latents is not None
    yield "<h2>The VAE’s latents</h2>"
    yield (
        f"<p>{found['images']:,} images, drawn at random and fitted to {inspected.config.resolution} × "
        f"{inspected.config.resolution} pixels, through the model’s VAE: z drawn from its posterior and multiplied by "
        "the scaling factor, as in training. Line: the channel’s own Gaussian. Dashed: N(0, 1), the noise it "
        "will be mixed with.</p>"
    )
    yield _image(figures.draw_latents(inspected.latents), "histograms of the latents' channels")
    yield _table(
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


def _forward(inspected: Inspected, content: dict[str, Any]) -> Iterator[str]:
    alphas_cumprod = inspected.schedule()
    whose = "the model’s" if inspected.model is not None else "Stable Diffusion’s"
    yield "<h2>The forward process</h2>"
    yield f"<p>Diffusion mixes an image x₀ with noise ε ~ N(0, I), by {whose} schedule ᾱ (Ho et al. 2020, eq. 4):</p>"
    yield _formula("x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε,   so   q(x_t | x₀) = N(√ᾱ_t x₀, (1 − ᾱ_t) I)")
    yield "<p>Under each picture stands how far that is from pure noise, in nats a dimension:</p>"
    yield _formula("KL(q(x_t | x₀) ‖ N(0, I)) = ½ [ᾱ_t x₀² − ᾱ_t − log(1 − ᾱ_t)]")
    yield (
        "<p>with x₀ in [−1, 1] and x₀² averaged over the picture. At t = T it is the prior term of the variational "
        "bound (Sohl-Dickstein et al. 2015), which should be near 0, since sampling begins from pure noise.</p>"
    )
    curves = {"pixels in [−1, 1], whole data set": (inspected.scan.images.pixels.mean_square, alphas_cumprod)}
    if inspected.latents is not None:
        curves["scaled latents"] = (inspected.latents.mean_square, alphas_cumprod)
    yield _image(figures.draw_forward_kl(curves), "KL to pure noise against t")
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
        cells = [f'<img alt="" src="{_thumbnail_of(to_picture(x_0), DIFFUSED_SIDE)}"><br>&nbsp;']
        for t in steps:
            alpha_bar = float(alphas_cumprod[t - 1])
            picture = to_picture(diffuse(x_0, alpha_bar, noise))
            kl = forward_kl(float(np.mean(x_0**2)), alpha_bar)
            cells.append(f'<img alt="" src="{_thumbnail_of(picture, DIFFUSED_SIDE)}"><br>{kl:.2g} nats')
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<table class="diffused">{"".join(lines)}</table>'


def _formula(text: str) -> str:
    """A formula on its own line, with `_t` as a subscript."""
    return f'<p class="formula">{escape(text).replace("_t", "<sub>t</sub>")}</p>'


class _raw(str):
    """HTML already, which is not escaped."""


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Columns whose title begins with # hold numbers."""
    head = list(head)
    classes = [' class="number"' if title.startswith("#") else "" for title in head]
    lines = ["".join(f"<th{kind}>{escape(t.removeprefix('#'))}</th>" for kind, t in zip(classes, head, strict=True))]
    for row in rows:
        cells = (cell if isinstance(cell, _raw) else escape(str(cell)) for cell in row)
        lines.append("".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(classes, cells, strict=True)))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _image(uri: str, alt: str) -> str:
    return f'<p class="wide"><img alt="{escape(alt)}" src="{uri}"></p>'


def _thumbnail(pixels: np.ndarray) -> str:
    return _thumbnail_of(pixels.transpose(1, 2, 0), THUMBNAIL)


def _thumbnail_of(pixels: np.ndarray, side: int) -> str:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((side, side))
    return figures.picture_uri(picture)


def _row_thumbnail(inspected: Inspected, row: int | None) -> str | None:
    """The row's picture, if it can be had."""
    found = None if row is None else inspected.rows.read(row)
    if found is None:
        return None
    try:
        picture = open_image(
            found[inspected.config.image_column],
            at_least=(THUMBNAIL, THUMBNAIL),
            max_megapixels=inspected.config.max_image_megapixels,
        )
    except ImageError:
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return figures.picture_uri(picture)


def _caption(inspected: Inspected, row: int) -> str:
    """The row's captions, in the words of the data set."""
    found = inspected.rows.read(row)
    if found is None:
        found = next((values for number, _, values in inspected.scan.samples if number == row), None)
    if found is None:
        return f"of row {row}"
    try:
        return " | ".join(inspected.scan.captions.captions_of(found))
    except CaptionError:  # told among the findings
        return ""
