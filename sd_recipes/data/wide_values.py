"""Pictures with more than 8 bits per channel brought to 8: which value is white.

White is what the file says: 65535 for 16 bits, 4095 for 12, 1.0 for floating point. But programs also write 8-bit
values into wide files as they are, which would be black. So where no value is over 255, and not all are the same, 255
is white.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

BITS, PHOTOMETRIC, PLANES, SAMPLE_FORMAT = 258, 262, 284, 339  # tags of TIFF
OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
SAVE_NARROW = "save it with 8 or 16 bits per channel"


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 12 or 16 bits, whole numbers or floating point, as 8-bit gray; Pillow's own conversion clips at 255.

    Raises ValueError for values of which it is not known which one is white.
    """
    values = np.asarray(image)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode == "I" and tags.get(BITS) == (32,) and tags.get(SAMPLE_FORMAT, (1,)) == (1,):
        values = values.view(np.uint32)  # which Pillow reads as if they had a sign
    white = _white(values, 4095.0 if tags.get(BITS) == (12,) else 65535.0)
    scaled = np.rint(values * (255.0 / white)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds for 8 bits only
        scaled = 255 - scaled
    if (transparent := image.info.get("transparency")) is not None:
        scaled[values == transparent] = 255
    return Image.fromarray(scaled)


def _white(values: np.ndarray, declared: float) -> float:
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return 1.0
    is_whole = values.dtype.kind != "f" or bool((values == np.rint(values)).all())
    if is_whole and 0 <= low < high <= 255:
        return 255.0
    if not (is_whole and low >= 0 and high <= declared):  # NaN is neither
        limit = "1" if values.dtype.kind == "f" else f"{declared:g}"
        raise ValueError(
            f"its values range from {low:g} to {high:g}, and which one is white is known only for 0 … {limit}: "
            f"{SAVE_NARROW}"
        )
    return declared


def load_wide(image: ImageFile.ImageFile) -> bool:
    """Decode the pixels; whether they are 8-bit values in channels of 16 bits, and still have to be read.

    Of several channels of 16 bits Pillow keeps the higher bytes, which are then all zero.
    """
    is_wide = _prepare(image, lower=False)
    image.load()
    return is_wide and not any(high for _, high in _extrema_of_colours(image))


def load_lower_bytes(image: ImageFile.ImageFile, higher: Image.Image) -> Image.Image:
    """Decode the lower bytes of 16-bit channels instead of the `higher`; those, if the lower ones are all the same.

    Raises ValueError where Pillow reads the higher bytes only: gray with transparency, compressed planes of a TIFF.
    """
    is_planar = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(PLANES) == 2
    tile = image.tile[0]
    if tile.args == "LA;16B" or (is_planar and tile.codec_name == "libtiff"):
        raise ValueError(f"none of its values is over 255 of 65535: {SAVE_NARROW}")
    _prepare(image, lower=True)
    image.load()
    if all(low == high for low, high in _extrema_of_colours(image)):
        return higher
    if image.mode == "RGBA" and (alpha := higher.getchannel("A")).getextrema() != (0, 0):
        image.putalpha(alpha)  # only the colours are 8-bit values
    return image


def _prepare(image: ImageFile.ImageFile, *, lower: bool) -> bool:
    """Set which bytes of several 16-bit channels will be decoded; whether the picture has such channels.

    Where each channel is stored by itself (a planar TIFF), Pillow would read 8 bits of every 16, and it scales the
    values of a PPM.
    """
    if len(image.getbands()) == 1:
        return False
    order = ""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and set(image.tag_v2.get(BITS, (1,))) == {16}:
        order = ";16L" if image.tag_v2.prefix == b"II" else ";16B"
    tiles, is_wide = [], False
    for tile in image.tile:
        codec, args = tile.codec_name, tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if codec == "ppm" and args == ("RGB", 65535):  # whose decoder scales to 8 bits
            codec, args = "raw", ("RGB;16B", 0, 1)
        mode = args[0] + order if isinstance(args[0], str) and len(args[0]) == 1 else args[0]
        if isinstance(mode, str) and ";16" in mode:
            is_wide = True
            mode = mode[:-1] + OTHER_ORDER[mode[-1]] if lower else mode
        tiles.append(type(tile)(codec, tile.extents, tile.offset, (mode, *args[1:])))
    if is_wide:
        image.tile = tiles
    return is_wide


def _extrema_of_colours(image: Image.Image) -> list[tuple[int, int]]:
    """The lowest and the highest value of each channel but transparency."""
    extrema: Any = image.getextrema()
    return list(extrema[:-1] if image.mode in ("RGBA", "LA") else extrema)
