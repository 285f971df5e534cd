"""Encoded bytes to RGB pixels of the training size."""

from __future__ import annotations

import functools
import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, UnidentifiedImageError

from sd_recipes.data.bad_rows import BadRow
from sd_recipes.data.picture_kinds import (
    FORMATS,
    RAW,
    START,
    is_camera_raw,
    jp2_profile,
    jxl_header,
    what_it_is,
    with_known_brand,
)
from sd_recipes.data.wide_values import load_lower_bytes, load_wide, to_eight_bits
from sd_recipes.errors import one_line

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}

# Milliseconds on one core, and PSNR against decoding in full and plain Lanczos (JPEG of quality 92 with grain):
#                                  4096×3072 to 512 high   to 768 high      1155×866 to 256 high
#   plain Lanczos                        56+98                56+126             5+9
#   reducing_gap 3                       56+59, 53.2 dB       56+128, equal      5+9, equal
#   reducing_gap 2                       56+33, 51.6 dB       56+43, 50.0 dB     5+9, equal
#   reducing_gap 1.5                     56+21, 48.0 dB       56+43, 50.0 dB     5+4, 45.2 dB
#   Image.reduce to just above           56+9,  36.4 dB       56+7,  42.5 dB     5+2, 33.8 dB
#   draft to just above, gap 2           42+9,  46.4 dB       42+0,  41.0 dB     4+3, 32.0 dB
#   draft to 1.25 times, gap 2           42+10, 46.4 dB       45+33, 46.3 dB     4+3, 32.0 dB
# The margin keeps a JPEG from being scaled by the decoder alone, which is as coarse as a box filter. The 32 dB are
# half a pixel: at half the size, 1155 columns become 578, the last of which is half outside the picture.
REDUCING_GAP = 2.0
DRAFT_MARGIN = 1.25

TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAP_SIDES = {TRANSPOSITIONS[orientation] for orientation in (5, 6, 7, 8)}

# Warnings of broken metadata are silenced: nobody can do anything about it. Too many pixels always raise an exception.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class ImageError(BadRow):
    """An image that cannot be used; the message names it."""


def read_size(encoded: dict[str, Any] | None, *, max_megapixels: float = 100.0) -> tuple[int, int]:
    """Upright (width, height) of the picture in {"bytes", "path"}, from its header alone. Raises ImageError."""
    with _opened(encoded, max_megapixels) as image:
        width, height = image.size
        return (height, width) if _transposition(image) in SWAP_SIDES else (width, height)


def open_image(
    encoded: dict[str, Any] | None, *, at_least: tuple[int, int] | None = None, max_megapixels: float = 100.0
) -> Image.Image:
    """Like `open_with_size`, without the size."""
    return open_with_size(encoded, at_least=at_least, max_megapixels=max_megapixels)[0]


def open_with_size(
    encoded: dict[str, Any] | None, *, at_least: tuple[int, int] | None = None, max_megapixels: float = 100.0
) -> tuple[Image.Image, tuple[int, int]]:
    """The picture in {"bytes", "path"} as upright sRGB, and its upright (height, width) in the file.

    Transparency is laid over white; of an animation, the first frame is taken.

    With `at_least`, the upright (width, height) that it will be made to cover, a JPEG may be decoded at a reduced
    size that still covers it, which for a 12-megapixel picture is several times faster. A colour profile is
    applied (relative colorimetric with black point compensation), unless it is broken. 16-bit values are scaled
    from 0 … 65535, floating point from 0 … 1 (or both from 0 … 255, see wide_values.py). Raises ImageError, also for a
    picture over `max_megapixels`.
    """
    with _opened(encoded, max_megapixels) as image:
        transposition = _transposition(image)
        across, down = image.size
        original_size = (across, down) if transposition in SWAP_SIDES else (down, across)
        if at_least is not None:
            width, height = (int(side * DRAFT_MARGIN) for side in at_least)
            image.draft(None, (height, width) if transposition in SWAP_SIDES else (width, height))
        if not load_wide(image):
            return _to_rgb(image, transposition), original_size
    with _opened(encoded, max_megapixels) as again:
        return _to_rgb(load_lower_bytes(again, image), transposition), original_size


def open_mask(encoded: dict[str, Any], *, max_megapixels: float = 100.0) -> Image.Image:
    """The mask in {"bytes", "path"} as upright gray levels, black where it is transparent. Raises ImageError."""
    with _opened(encoded, max_megapixels) as image:
        transposition = _transposition(image)
        gray: Image.Image = image
        if image.mode == "F" or image.mode.startswith("I"):
            gray = to_eight_bits(image)
        if gray.has_transparency_data:
            gray = Image.alpha_composite(Image.new("RGBA", gray.size, "black"), gray.convert("RGBA"))
        gray = gray.convert("L")
        return gray if transposition is None else gray.transpose(transposition)


def open_alpha(encoded: dict[str, Any] | None, *, max_megapixels: float = 100.0) -> Image.Image | None:
    """A picture's opacity as upright gray levels; None if all of it is opaque. Raises ImageError."""
    with _opened(encoded, max_megapixels) as image:
        if not image.has_transparency_data:
            return None
        transposition = _transposition(image)
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] == 255:
            return None
        return alpha if transposition is None else alpha.transpose(transposition)


def place_crop(
    original_size: tuple[int, int], size: tuple[int, int], crop_u: tuple[float, float] | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The (height, width) to which a picture is scaled to cover `size`, and the crop's corner (top, left) in it.

    `crop_u`, each in [0, 1), places the crop horizontally and vertically; 0.5 crops the middle. None crops nothing
    and changes the picture's shape instead.
    """
    if crop_u is None:
        return size, (0, 0)
    scale = max(wanted / side for wanted, side in zip(size, original_size, strict=True))
    height, width = (max(wanted, round(side * scale)) for wanted, side in zip(size, original_size, strict=True))
    across, down = crop_u
    return (height, width), (int(down * (height - size[0] + 1)), int(across * (width - size[1] + 1)))


def fit_image(
    image: Image.Image,
    size: tuple[int, int],
    *,
    interpolation: str,
    crop_u: tuple[float, float] | None,
    flip: bool,
) -> np.ndarray:
    """Scale to cover `size` (height, width), crop as `place_crop`, mirror: uint8 (3, height, width)."""
    height, width = size
    covered, (top, left) = place_crop((image.height, image.width), size, crop_u)
    covering = covered[::-1]
    # Only what the crop shows is scaled: a picture of 1 × 100000 must not become one of 512 × 51200000.
    across, down = image.width / covering[0], image.height / covering[1]
    right, bottom = min((left + width) * across, image.width), min((top + height) * down, image.height)
    box = left * across, top * down, right, bottom
    if covering == image.size:
        pixels = np.asarray(image.crop((left, top, left + width, top + height))).transpose(2, 0, 1)
    elif min(across, down) >= 1 and interpolation in torch_filters():
        pixels = scale_by_torch(image, box, size, interpolation)
    else:
        scaled = image.resize((width, height), RESAMPLING[interpolation], box=box, reducing_gap=REDUCING_GAP)
        pixels = np.asarray(scaled).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels[:, :, ::-1] if flip else pixels)


@functools.cache
def torch_filters() -> set[str]:
    """The filters that torch applies to uint8 pixels as Pillow does; Lanczos in recent versions only: 2.13 has it.

    They are several times as fast (12 megapixels to 512 high after a draft: 2 ms against 7, both 50 dB).
    """
    # Imported here, since it costs a process a second and 80 MB, which inspection's workers can do without.
    import torch
    import torch.nn.functional as F

    def scales_by(name: str) -> bool:
        try:
            F.interpolate(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), size=2, mode=name, antialias=True)
        except (ValueError, RuntimeError):  # NotImplementedError is a RuntimeError
            return False
        return True

    return {name for name in ("bilinear", "bicubic", "lanczos") if scales_by(name)}


def scale_by_torch(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int], interpolation: str
) -> np.ndarray:
    """The part of an RGB picture in `box`, rounded to whole pixels, scaled to `size`: uint8 (3, height, width).

    Uses torch's vectorised filters.
    """
    import pyarrow as pa
    import torch
    import torch.nn.functional as F

    left, top, right, bottom = map(round, box)
    try:  # Pillow's own memory, four bytes a pixel, not copied
        pixels = torch.from_dlpack(pa.array(image).flatten()).view(image.height, image.width, 4)
    except ValueError:  # a picture of more than 16 MB, which Pillow keeps in pieces
        pixels = torch.from_numpy(np.array(image))
    part = pixels[top:bottom, left:right].permute(2, 0, 1)[None]  # channels last, as the fast kernel needs
    return F.interpolate(part, size=size, mode=interpolation, antialias=True)[0, :3].numpy()


@contextmanager
def _opened(encoded: dict[str, Any] | None, max_megapixels: float) -> Iterator[ImageFile.ImageFile]:
    """The picture before its pixels are decoded; what goes wrong with it in the `with` block becomes an ImageError."""
    if encoded is None:
        raise ImageError("an image without a name: the row has no image")
    content, path = encoded.get("bytes"), encoded.get("path")
    name = path or "an image without a name"
    if content is None and not path:
        raise ImageError(f"{name}: the row has neither its bytes nor its path")
    # Pillow's own guard, set to this limit: it stops some formats that allocate memory before their size can be read.
    Image.MAX_IMAGE_PIXELS = int(max_megapixels * 1e6)
    try:
        with (
            io.BytesIO(content) if content is not None else open(str(path), "rb") as stream,
            _identified(stream, name, max_megapixels) as image,
        ):
            _check_size(image.size, max_megapixels)
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: {_too_large(str(error).split(' exceeds')[0].lower(), max_megapixels)}") from error
    # Bad data makes Pillow's decoders raise nearly anything: SyntaxError, struct.error, AssertionError, KeyError.
    except Exception as error:
        raise ImageError(f"{name}: {one_line(error)}") from error


def _identified(stream: IO[bytes], name: str, max_megapixels: float) -> ImageFile.ImageFile:
    """The picture, not decoded yet unless it is a JPEG XL. Raises ImageError for a file of another kind."""
    start = stream.read(START)
    header = jxl_header(stream)
    if header is not None:
        _check_size(header[:2], max_megapixels)
    try:
        image = Image.open(with_known_brand(stream, start), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise
    except Exception as error:  # bad headers make Pillow raise nearly anything
        is_told = isinstance(error, UnidentifiedImageError) or header is not None
        raise ImageError(what_it_is(start, name) + ("" if is_told else f" ({one_line(error)})")) from None
    if is_camera_raw(image, start, name):
        raise ImageError(RAW)
    if image.format == "JPEG2000" and (profile := jp2_profile(stream)):
        image.info["icc_profile"] = profile
    if header is not None and header[2] != 1 and not getattr(image, "jpeg", False):
        image.info.pop("exif", None)  # its reader has turned the pixels
    return image


def _check_size(size: tuple[int, int], max_megapixels: float) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageError(f"its size is {width} × {height}")
    if width * height > max_megapixels * 1e6:
        raise ImageError(_too_large(f"image size ({width * height} pixels)", max_megapixels))


def _too_large(size: str, max_megapixels: float) -> str:
    return f"{size} is over --max_image_megapixels {max_megapixels:g}; raise it if the picture is meant to be so large"


def _transposition(image: Image.Image) -> Image.Transpose | None:
    """What turns the picture upright, by its EXIF orientation, found without decoding pixels."""
    if image.format == "TIFF":  # Pillow reports its upright size and turns it as it decodes
        return None
    if image.format == "PNG" and "exif" not in image.info:
        image.info |= _exif_after_pixels(image)
    try:
        # Not the PNG reader's own method, which decodes the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # broken EXIF raises as many kinds as broken pixels
        return None
    return TRANSPOSITIONS.get(orientation) if isinstance(orientation, int) else None


def _exif_after_pixels(image: Any) -> dict[str | tuple[int, int], bytes]:
    """EXIF of a PNG whose eXIf chunk comes after the pixels, as the format allows (PNG 3rd edition, 11.3.3.3)."""
    stream = image.fp
    position = stream.tell()
    stream.seek(8)
    found: dict[str | tuple[int, int], bytes] = {}
    while len(header := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind == b"eXIf":
            found["exif"] = b"Exif\0\0" + stream.read(length)
            break
        stream.seek(length + 4, io.SEEK_CUR)
    stream.seek(position)
    return found


def _to_rgb(image: Image.Image, transposition: Image.Transpose | None) -> Image.Image:
    """The picture turned, and as RGB."""
    profile = image.info.get("icc_profile")
    if transposition is not None:
        image = image.transpose(transposition)
    if image.mode == "F" or image.mode.startswith("I"):
        image = to_eight_bits(image)
    if image.has_transparency_data:
        # A transparent pixel's colour is arbitrary and must not show through.
        base = "L" if image.mode in ("1", "L", "LA") else "RGB"
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(base)
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    to_srgb = _srgb_transform(profile, image.mode) if profile else None
    if to_srgb is not None:
        return ImageCms.applyTransform(image, to_srgb) or image
    image.load()  # before its file is closed
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.lru_cache(maxsize=32)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From `profile` to sRGB for pictures of `mode`; None if it changes nothing, or if it is broken."""
    try:
        transform = ImageCms.buildTransform(
            io.BytesIO(profile),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode != "RGB":
        return transform
    # Most profiles are sRGB under one of its many names: recognised by what they do to a lattice of colours.
    levels = np.linspace(0, 255, 16).astype(np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    changed = np.asarray(ImageCms.applyTransform(Image.fromarray(lattice), transform))
    return transform if np.abs(changed.astype(int) - lattice).max() > 2 else None
