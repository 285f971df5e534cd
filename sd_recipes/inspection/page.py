"""The HTML page: one file without scripts or links to anything, with its figures inside."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from sd_recipes.data.captions import CaptionError
from sd_recipes.data.images import ImageError, open_image
from sd_recipes.inspection import figures
from sd_recipes.inspection.distribution_page import forward_section, latents_section, pixels_section
from sd_recipes.inspection.findings import kinds
from sd_recipes.inspection.markup import Raw, image, table, thumbnail
from sd_recipes.inspection.summary import Inspected
from sd_recipes.redaction import redacted

THUMBNAIL = 96  # pixels a side, at most
SHOWN = 20  # rows of a table; the JSON file has more
SHOWN_BUCKETS = 25
SHOWN_GROUPS = 12

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
        parts += pixels_section(inspected, content)
    if "latents" in content:
        parts += latents_section(inspected, content)
    if inspected.pictures:
        parts += forward_section(inspected, content)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(inspected.source)}: inspection</title><style>{CSS}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    path.write_text(redacted(page), encoding="utf-8")  # names of files, and captions, come from anywhere


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
    yield table(
        ("", "#rows", "what", "meaning"),
        (
            (Raw(f'<span class="{found["severity"]}">{found["severity"]}</span>'), f"{found['count']:,}",
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
        yield table(
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
    yield table(
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
            yield table(
                ("#rows", "pictures", "names"),
                (
                    (
                        f"{group['rows']:,}",
                        Raw("".join(
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
        yield table(
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
    yield image(figures.draw_sizes(inspected.scan.images, config.resolution), "shorter sides and aspect ratios")
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
            yield image(figures.draw_buckets(names, config.train_batch_size), "images of each bucket")
        yield table(
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
    yield image(figures.draw_captions(inspected.scan.captions), "lengths of captions")
    words = list(found["common_words"].items())[:60]
    yield "<p><b>Commonest words:</b> " + ", ".join(f"{escape(word)} {number:,}" for word, number in words) + "</p>"
    if not found["words_complete"]:
        yield '<p class="muted">There are so many words that the rarest were forgotten on the way.</p>'
    yield table(
        ("name", "captions drawn at random"),
        ((name, _caption(inspected, row)) for row, name, _ in inspected.scan.samples[:8]),
    )


def _thumbnail(pixels: np.ndarray) -> str:
    return thumbnail(pixels.transpose(1, 2, 0), THUMBNAIL)


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
