"""Encoded bytes to RGB pixels of the training resolution."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


class ImageError(ValueError):
    """An image that cannot be used; the message names it."""


def open_image(encoded: dict[str, Any], *, at_least: int | None = None) -> Image.Image:
    """The picture in {"bytes", "path"} as upright RGB, transparency on white.

    With `at_least`, a JPEG may be decoded at a reduced size whose shorter side is still that long,
    which for a 12-megapixel picture is several times faster. Raises ImageError.
    """
    try:
        source = io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else Path(encoded["path"])
        with Image.open(source) as image:
            if at_least is not None:
                image.draft("RGB", (at_least, at_least))
            return _to_rgb(ImageOps.exif_transpose(image))
    # A decompression bomb is not an OSError, and Pillow's decoders raise several kinds on bad data.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{encoded.get('path') or 'an image without a name'}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":  # Pillow would clip 16-bit gray at 255
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        # A transparent pixel's colour is arbitrary and must not show through.
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def fit_image(
    image: Image.Image, resolution: int, *, interpolation: str, crop_u: tuple[float, float], flip: bool
) -> np.ndarray:
    """Resize the shorter side to `resolution`, crop a square, mirror: uint8 (3, resolution, resolution).

    `crop_u` places the crop, each in [0, 1): horizontally and vertically; 0.5 crops the middle.
    """
    scale = resolution / min(image.size)
    size = (max(resolution, round(image.width * scale)), max(resolution, round(image.height * scale)))
    if size != image.size:
        image = image.resize(size, RESAMPLING[interpolation])
    left, top = (int(u * (side - resolution + 1)) for u, side in zip(crop_u, size, strict=True))
    pixels = np.asarray(image.crop((left, top, left + resolution, top + resolution)))
    if flip:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
