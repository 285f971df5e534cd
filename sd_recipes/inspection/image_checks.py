"""What the bytes of images show: whether they decode, how large they are, what their pixels are.

An image is read and decoded once. Runs in worker processes, and therefore imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import imagehash
import numpy as np
from PIL import Image

from sd_recipes.data.buckets import Buckets
from sd_recipes.data.images import FORMATS, ImageError, open_image, read_size
from sd_recipes.inspection.distribution import PixelDistribution
from sd_recipes.inspection.findings import BoundedCounter, Finding

SAMPLED_SIDE = 64  # a picture gives 64² pixels to the statistics
HASHED_SIDE = 256  # pixels a side, at least, of the picture that is hashed
SIDE_EDGES = 2.0 ** np.arange(2, 15.25, 0.25)  # pixels, four bins per octave
ASPECT_EDGES = 2.0 ** np.arange(-3, 3.0625, 0.125)  # width / height
CUT_OFF = re.compile(r"truncated|unexpected end|premature|broken data stream|not enough image data", re.IGNORECASE)


@dataclass(frozen=True)
class ImageSettings:
    """What the checks need to know from the flags; small, since it is sent to every process."""

    resolution: int
    buckets: Buckets | None  # None if the step is over the resolution
    uses_buckets: bool
    max_upscale: float
    max_image_megapixels: float
    root: str | None  # folder that is left out of names


@dataclass
class ImageSummary:
    """Summary of the images of some rows; two of them merge into the summary of both."""

    pixels: PixelDistribution = field(default_factory=PixelDistribution)
    shorter_sides: np.ndarray = field(default_factory=lambda: np.zeros(len(SIDE_EDGES) - 1, np.int64))
    aspect_ratios: np.ndarray = field(default_factory=lambda: np.zeros(len(ASPECT_EDGES) - 1, np.int64))
    sizes: BoundedCounter = field(default_factory=lambda: BoundedCounter(1000))  # (width, height)
    buckets: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width)
    num_without_bucket: int = 0

    def merge(self, other: ImageSummary) -> None:
        self.pixels.merge(other.pixels)
        self.shorter_sides += other.shorter_sides
        self.aspect_ratios += other.aspect_ratios
        self.sizes.update(other.sizes.counts)
        self.buckets.update(other.buckets)
        self.num_without_bucket += other.num_without_bucket


@dataclass
class InspectedImages:
    """What a chunk of rows gave: a summary, what was found, and two 8-byte hashes for each row that decoded."""

    summary: ImageSummary
    findings: list[Finding]
    rows: np.ndarray  # uint32 (n,), rows that decoded
    contents: np.ndarray  # uint64 (n,), digests of their files
    looks: np.ndarray  # uint64 (n,), their perceptual hashes


def picture_name(encoded: dict[str, Any] | None, row: int, root: str | None) -> str:
    """The name of a row's picture: its image's path, relative to `root` if it is in there, or the row's number."""
    path = (encoded or {}).get("path")
    if not path:
        return f"row {row}"
    return str(path).removeprefix(root).lstrip("/\\") if root and str(path).startswith(root) else str(path)


def inspect_images(rows: Iterable[tuple[int, dict[str, Any] | None]], settings: ImageSettings) -> InspectedImages:
    """Check and summarise the images of `rows`, (number, {"bytes", "path"}) each."""
    summary, findings = ImageSummary(), []
    sampled, decoded, contents, looks = [], [], [], []
    for row, encoded in rows:
        name = picture_name(encoded, row, settings.root)
        try:
            data = _read(encoded)
            encoded = {"bytes": data, "path": name}
            image, notes = _decode(encoded, settings, summary)
        except _Found as found:
            findings.append(Finding(found.kind, row, name, found.detail))
            continue
        findings += [Finding(note.kind, row, name, note.detail) for note in notes]
        decoded.append(row)
        contents.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()))
        looks.append(perceptual_hash(image))
        sampled.append(sample_pixels(image, row))
    if sampled:
        summary.pixels.update(np.concatenate(sampled))
    return InspectedImages(
        summary, findings, np.array(decoded, np.uint32), np.array(contents, np.uint64), np.array(looks, np.uint64)
    )


def get_ready() -> None:
    """Import what the first picture would need: the package of the hash imports scipy only when it is called."""
    perceptual_hash(Image.new("RGB", (8, 8)))


class _Found(Exception):
    def __init__(self, kind: str, detail: str) -> None:
        self.kind, self.detail = kind, detail


def _read(encoded: dict[str, Any] | None) -> bytes:
    """The file's bytes."""
    if encoded is None or (encoded["bytes"] is None and not encoded["path"]):
        raise _Found("missing_file", "the image is null")
    data = encoded["bytes"]
    if data is None:
        try:
            if "://" in encoded["path"]:
                with fsspec.open(encoded["path"], "rb") as file:
                    data = file.read()
            else:
                data = Path(encoded["path"]).read_bytes()
        except FileNotFoundError:
            raise _Found("missing_file", "no such file") from None
        except OSError as error:
            raise _Found("undecodable", f"cannot be read: {error.strerror or error}") from None
    if not data:
        raise _Found("empty_file", "0 bytes")
    return data


def _decode(
    encoded: dict[str, Any], settings: ImageSettings, summary: ImageSummary
) -> tuple[Image.Image, list[_Found]]:
    """The picture, and what is to be reported about it; its size is added to the summary."""
    notes = []
    try:
        width, height = read_size(encoded, max_megapixels=settings.max_image_megapixels)
        at_least = (settings.resolution, settings.resolution)
        too_small = min(width, height) * settings.max_upscale < settings.resolution
        if settings.buckets is not None:
            try:
                bucket = settings.buckets.size_for(width, height)
                summary.buckets[bucket] += 1
                if settings.uses_buckets:
                    at_least, too_small = (bucket[1], bucket[0]), False
            except ImageError:
                summary.num_without_bucket += 1
                if settings.uses_buckets:
                    raise _Found("too_small", f"{width} × {height} pixels") from None
        if too_small:
            notes.append(_Found("too_small", f"{width} × {height} pixels"))
        if _is_animated(encoded["bytes"]):
            notes.append(_Found("animated", "it has several frames"))
        image = open_image(encoded, at_least=at_least, max_megapixels=settings.max_image_megapixels)
    except ImageError as error:
        detail = str(error).removeprefix(f"{encoded['path']}: ")
        kind = "truncated" if CUT_OFF.search(detail) else "undecodable"
        raise _Found("too_many_pixels" if "--max_image_megapixels" in detail else kind, detail) from None
    summary.sizes.update([(width, height)])
    _count(summary.shorter_sides, SIDE_EDGES, min(width, height))
    _count(summary.aspect_ratios, ASPECT_EDGES, width / height)
    return image, notes


def _is_animated(data: bytes) -> bool:
    """Whether a GIF, WebP, PNG or AVIF file has several frames."""
    if data[:2] == b"\xff\xd8":  # a JPEG: its further pictures are previews, or the other eye's
        return False
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return getattr(image, "is_animated", False)
    # Looking for a second frame makes Pillow raise many kinds on bad data; decoding tells whether it matters.
    except Exception:
        return False


def _count(histogram: np.ndarray, edges: np.ndarray, value: float) -> None:
    """Add one to the bin of `value`; the outermost bins take what lies beyond them."""
    histogram[min(max(int(np.searchsorted(edges, value, side="right")) - 1, 0), len(histogram) - 1)] += 1


def sample_pixels(image: Image.Image, row: int) -> np.ndarray:
    """SAMPLED_SIDE² of the picture's own pixels, uint8 (n, 3), on a lattice whose offset is drawn by the row's number.

    Every pixel is as likely as any other, so that moments and histograms are those of all pixels on average;
    a reduced picture would show averages instead, whose variance is smaller.
    """
    u, v = np.random.default_rng(row).random(2)
    width, height = image.width / SAMPLED_SIDE, image.height / SAMPLED_SIDE
    # Pillow takes the pixel under width (x + ½) + c, for x = 0, 1, …
    lattice = (width, 0, (u - 0.5) * width, 0, height, (v - 0.5) * height)
    pixels = image.transform((SAMPLED_SIDE, SAMPLED_SIDE), Image.Transform.AFFINE, lattice, Image.Resampling.NEAREST)
    return np.asarray(pixels).reshape(-1, 3)


def perceptual_hash(image: Image.Image) -> int:
    """The 64 bits of ImageHash's phash: the signs of the lowest frequencies of a small gray picture."""
    factor = max(1, min(image.size) // HASHED_SIDE)
    bits = imagehash.phash(image.reduce(factor)).hash
    return int.from_bytes(np.packbits(bits).tobytes())
