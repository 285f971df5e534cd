"""Pictures of more than 8 bits per channel: which value becomes white."""

import numpy as np
import pytest
from hostile_images import encoded, tiff, wide_png
from PIL import Image

from sd_recipes.data.images import ImageError, open_image, read_size

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)
OPAQUE = np.full((16, 16, 1), 255, np.uint16)
GRAYS = np.stack([RAMP] * 3, axis=-1)
INVERTED = {262: (3, [0])}  # white is zero


def pixels(content: bytes) -> np.ndarray:
    source = {"bytes": content, "path": "wide"}
    opened = open_image(source)
    assert read_size(source) == opened.size
    return np.asarray(opened)


def twelve_bits() -> bytes:
    """The ramp in packed 12 bits."""
    values = (RAMP.ravel().astype(int) * 4095 + 127) // 255
    packed = b"".join(
        bytes([one >> 4, (one & 15) << 4 | other >> 8, other & 255])
        for one, other in zip(values[::2], values[1::2], strict=True)
    )
    return tiff(RAMP, bits=12)[: -RAMP.nbytes] + packed


def ppm(values: np.ndarray) -> bytes:
    height, width, _ = values.shape
    return f"P6 {width} {height} 65535\n".encode() + values.astype(">u2").tobytes()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # Over the whole range of the file.
        (tiff(RAMP * 257), GRAYS),
        (tiff(RAMP * 257, order=">"), GRAYS),
        (tiff(RAMP * 257, tags=INVERTED), 255 - GRAYS),
        (tiff((RAMP / 255).astype(np.float32), tags=INVERTED), 255 - GRAYS),
        (tiff(RAMP.astype(np.uint32) * 257), GRAYS),
        (tiff(RAMP.astype(np.float32) * 257), GRAYS),
        (tiff(COLOURS * 257), COLOURS),
        (tiff(COLOURS * 257, order=">"), COLOURS),
        (tiff(COLOURS * 257, planar=True), COLOURS),
        (tiff(COLOURS * 257, planar=True, order=">"), COLOURS),
        (tiff(COLOURS * 257, deflated=True), COLOURS),
        (tiff(COLOURS * 257, planar=True, deflated=True), COLOURS),
        (ppm(COLOURS * 257), COLOURS),
        (wide_png(COLOURS * 257), COLOURS),
        (wide_png(np.dstack([RAMP * 257, OPAQUE * 257])), GRAYS),
        (twelve_bits(), GRAYS),
        # 8-bit values in a wide file.
        (tiff(RAMP), GRAYS),
        (tiff(RAMP, order=">"), GRAYS),
        (tiff(RAMP, tags=INVERTED), 255 - GRAYS),
        (tiff(RAMP.astype(np.int16)), GRAYS),
        (tiff(RAMP.astype(np.uint32)), GRAYS),
        (tiff(RAMP.astype(np.int32)), GRAYS),
        (tiff(RAMP.astype(np.float32)), GRAYS),
        (encoded(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"), GRAYS),
        (encoded(Image.fromarray(RAMP)), GRAYS),
        (encoded(Image.fromarray(RAMP), "PPM"), GRAYS),
        (tiff(COLOURS), COLOURS),
        (tiff(COLOURS, order=">"), COLOURS),
        (tiff(COLOURS, planar=True), COLOURS),
        (tiff(COLOURS, deflated=True), COLOURS),
        (tiff(COLOURS, deflated=True, order=">"), COLOURS),
        (tiff(np.dstack([COLOURS, OPAQUE])), COLOURS),
        (tiff(np.dstack([COLOURS, OPAQUE * 257])), COLOURS),  # wide transparency
        (ppm(COLOURS), COLOURS),
        (wide_png(COLOURS), COLOURS),
        (wide_png(np.dstack([COLOURS, OPAQUE])), COLOURS),
        (wide_png(np.dstack([COLOURS, OPAQUE * 257])), COLOURS),
        # Nothing tells a black picture from another, and its own white is that of the file.
        (tiff(RAMP * 0), GRAYS * 0),
        (tiff(RAMP * 0 + 200), GRAYS * 0 + 1),
        (tiff(COLOURS * 0), COLOURS * 0),
    ],
)
def test_white_is_what_the_file_says_and_holds(content: bytes, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(pixels(content), expected)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tiff(RAMP.astype(np.int32) - 5), "from -5 to 250"),
        (tiff(RAMP.astype(np.uint32) * 16843009), r"from 0 to 4\.29497e\+09"),
        (tiff(RAMP.astype(np.float32) * 0.998), "from 0 to 254.49, and which one is white is known only for 0 … 1:"),
        (tiff(RAMP / 255), "TIFF that is damaged, or of a variant that is not read; save it again with 8 or 16 bits"),
        (wide_png(np.dstack([RAMP, OPAQUE])), "none of its values is over 255"),
        (tiff(COLOURS, planar=True, deflated=True), "none of its values is over 255"),
    ],
)
def test_what_is_not_known_to_be_white_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=f"^wide: (its values range )?{words}"):
        pixels(content)
