"""The HTML page of an inspection: what templates/inspection/page.html shows, besides what the JSON file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sd_recipes.data.captions import CaptionError
from sd_recipes.data.images import ImageError, open_image
from sd_recipes.export.pages import render_page
from sd_recipes.inspection import figures
from sd_recipes.inspection.distribution_page import forward_section, latents_section, pixels_section
from sd_recipes.inspection.findings import kinds
from sd_recipes.inspection.summary import Inspected
from sd_recipes.redaction import redacted

THUMBNAIL = 96  # pixels a side, at most
SHOWN = 20  # rows of a table; the JSON file has more
SHOWN_BUCKETS = 25
SHOWN_GROUPS = 12


def write_page(inspected: Inspected, content: dict[str, Any], path: Path) -> None:
    """Write the page; `content` is what the JSON file says."""
    scan = inspected.scan
    first = inspected.pictures[:: max(1, len(inspected.pictures) // 9)][:9]
    page = render_page(
        "inspection/page.html",
        content=content,
        config=inspected.config,
        first_pictures=[(name, figures.thumbnail(pixels.transpose(1, 2, 0), THUMBNAIL)) for name, pixels in first],
        **_findings(inspected, content),
        **_duplicates(inspected, content),
        **_sizes(inspected, content),
        **_captions(inspected),
        pixels=pixels_section(inspected) if scan.rows else None,
        latents=latents_section(inspected) if "latents" in content else None,
        forward=forward_section(inspected) if inspected.pictures else None,
    )
    path.write_text(redacted(page), encoding="utf-8")  # file names and captions come from anywhere


def _findings(inspected: Inspected, content: dict[str, Any]) -> dict[str, Any]:
    told, listed = kinds(inspected.config), inspected.scan.findings.listed
    findings = [
        {
            **found,
            "meaning": told[kind].meaning,
            "thumbnails": _thumbnails(inspected, [f.row for f in listed[kind][:8]]),
        }
        for kind, found in content["findings"].items()
    ]
    return {"findings": findings, "SHOWN": SHOWN}


def _duplicates(inspected: Inspected, content: dict[str, Any]) -> dict[str, Any]:
    largest = {name: found["largest"][:SHOWN_GROUPS] for name, found in content["duplicates"].items()}
    same_files, alike = (
        [{**group, "thumbnails": _thumbnails(inspected, group["first_rows"][:5])} for group in largest[name]]
        for name in ("images", "near_images")
    )
    same_captions = [{**group, "caption": _caption(inspected, group["first_rows"][0])} for group in largest["captions"]]
    return {"same_files": same_files, "alike": alike, "same_captions": same_captions}


def _sizes(inspected: Inspected, content: dict[str, Any]) -> dict[str, Any]:
    config, buckets = inspected.config, content["images"]["buckets"][:SHOWN_BUCKETS]
    names = [(f"{bucket['width']} × {bucket['height']}", bucket["images"]) for bucket in buckets]
    return {
        "sizes_figure": figures.draw_sizes(inspected.scan.images, config.resolution) if inspected.scan.rows else None,
        "buckets": buckets,
        "buckets_figure": figures.draw_buckets(names, config.train_batch_size) if len(buckets) > 1 else None,
    }


def _captions(inspected: Inspected) -> dict[str, Any]:
    scan = inspected.scan
    return {
        "captions_figure": figures.draw_captions(scan.captions) if scan.captions.num_captions else None,
        "num_long_captions": scan.findings.counts["long_caption"],
        "sampled_captions": [(name, _caption(inspected, row)) for row, name, _ in scan.samples[:8]],
    }


def _thumbnails(inspected: Inspected, rows: list[int | None]) -> list[str]:
    """Thumbnails of the rows' pictures, where they can be read."""
    return [uri for row in rows if (uri := _thumbnail(inspected, row)) is not None]


def _thumbnail(inspected: Inspected, row: int | None) -> str | None:
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
    return figures.thumbnail(np.asarray(picture), THUMBNAIL)


def _caption(inspected: Inspected, row: int) -> str:
    """The row's captions, with their tags in order."""
    found = inspected.rows.read(row)
    if found is None:
        found = next((values for number, _, values in inspected.scan.samples if number == row), None)
    if found is None:
        return f"of row {row}"
    try:
        return " | ".join(inspected.scan.captions.captions_of(found))
    except CaptionError:  # it is among the findings
        return ""
