import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_recipes.data.images import ImageError, fit_image, open_image


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": f"picture.{kind.lower()}"}


def test_transparent_pixels_are_white_whatever_colour_they_hide() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 2), (10, 20, 30, 255))
    opened = open_image(encode(image))
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((1, 2)) == (10, 20, 30)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert open_image(encode(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_orientation_is_applied() -> None:
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert open_image(encode(image, "JPEG", exif=exif)).size == (4, 6)


def test_sixteen_bit_gray_is_scaled() -> None:
    image = Image.fromarray(np.full((2, 2), 32768, dtype=np.uint16))
    assert open_image(encode(image)).getpixel((0, 0)) == (128, 128, 128)


def test_a_large_jpeg_is_decoded_small_but_never_too_small() -> None:
    encoded = encode(Image.new("RGB", (1600, 1200)), "JPEG")
    assert open_image(encoded, at_least=256).size == (400, 300)
    assert open_image(encoded).size == (1600, 1200)


def test_an_image_is_read_from_its_path(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    assert open_image({"bytes": None, "path": str(tmp_path / "a.png")}).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_an_unusable_image_is_named(content: bytes) -> None:
    with pytest.raises(ImageError, match=r"bad\.png"):
        open_image({"bytes": content, "path": "bad.png"})


def test_a_truncated_image_is_named() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    encoded = encode(Image.fromarray(noise))
    with pytest.raises(ImageError, match=r"picture\.png"):
        open_image({**encoded, "bytes": encoded["bytes"][:2000]})


def test_fit_resizes_the_shorter_side_and_crops_where_it_is_told() -> None:
    gradient = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (32, 64, 3))
    image = Image.fromarray(gradient.copy())

    def left_edge(u: float) -> int:
        pixels = fit_image(image, 32, interpolation="lanczos", crop_u=(u, 0.5), flip=False)
        assert pixels.shape == (3, 32, 32)
        return int(pixels[0, 0, 0])

    assert (left_edge(0.0), left_edge(0.5), left_edge(0.999)) == (0, 16, 32)
    flipped = fit_image(image, 32, interpolation="lanczos", crop_u=(0, 0.5), flip=True)
    assert flipped[0, 0, 0] == 31
    assert fit_image(image.resize((7, 5)), 32, interpolation="nearest", crop_u=(0.5, 0.5), flip=False).shape == (
        3,
        32,
        32,
    )
