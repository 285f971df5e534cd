import io
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
from hostile_images import (
    CYAN_INK,
    DISPLAY_P3,
    P3_COLOUR,
    build_hostile_folder,
    encoded,
    mixed_captions,
    outside_path,
    p3_profile,
)
from PIL import Image, ImageCms

from sd_recipes.data.images import FORMATS, ImageError, fit_image, open_image, read_size


def row(image: Image.Image, kind: str = "PNG", **options: object) -> dict:
    return {"bytes": encoded(image, kind, **options), "path": f"picture.{kind.lower()}"}


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2)))


def linear(colour: np.ndarray) -> np.ndarray:
    colour = colour / 255
    return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


# IEC 61966-2-1, with its white adapted to D50 as in every ICC profile.
XYZ_OF_SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)  # columns: red, green, blue


def srgb(xyz: np.ndarray) -> tuple[int, ...]:
    """8-bit sRGB of a colour in XYZ under D50."""
    rgb = np.linalg.solve(XYZ_OF_SRGB, xyz).clip(0, 1)
    rgb = np.where(rgb <= 0.0031308, rgb * 12.92, 1.055 * rgb ** (1 / 2.4) - 0.055)
    return tuple(int(value) for value in np.rint(rgb * 255))


def srgb_of_lab(lightness: float, a: float, b: float) -> tuple[int, ...]:
    y = (lightness + 16) / 116
    f = np.array([y + a / 500, y, y - b / 200])
    return srgb(np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1.0, 0.8249])


def srgb_of_p3(colour: tuple[int, int, int]) -> tuple[int, ...]:
    return srgb(np.array(list(DISPLAY_P3.values())).T @ linear(np.array(colour)))


PIXELS = {  # of the good files: the top left pixel, where all are the same, and the tolerance
    "rgba.png": ((255, 255, 255), 0),
    "la.png": ((255, 255, 255), 0),
    "palette.png": ((255, 255, 255), 0),
    "half_palette.png": ((255, 127, 127), 1),
    "gray16.png": ((128, 128, 128), 0),
    "gray16.tif": ((128, 128, 128), 0),
    "gray16.pgm": ((128, 128, 128), 0),
    "float.tif": ((64, 64, 64), 0),
    "cmyk_profile.jpg": (srgb_of_lab(*CYAN_INK), 3),
    "cmyk.jpg": ((0, 255, 255), 1),
    "cmyk_broken_profile.jpg": ((0, 255, 255), 1),
    "display_p3.png": (srgb_of_p3(P3_COLOUR), 1),
    "broken_profile.png": ((255, 0, 0), 0),
    "turned.jpg": ((0, 0, 255), 2),
    "turned.png": ((0, 0, 255), 0),
    "turned.tif": ((0, 0, 255), 0),
    "turned.webp": ((0, 0, 255), 0),
    "turned_late.png": ((0, 0, 255), 0),
    "broken_exif.png": ((255, 0, 0), 0),
    "animated.gif": ((0, 128, 0), 0),
    "animated.webp": ((0, 128, 0), 0),
    "thin.png": ((255, 0, 0), 0),
}
ERRORS = {
    "high_dynamic_range.tif": "from 3.5 to 3.5",
    "not_a_number.tif": "from nan to nan",
    "truncated.jpg": "truncated",
    "truncated.png": "truncated",
    "empty.jpg": "an empty file",
    "garbage.png": "not a picture",
    "page.jpg": "HTML",
    "postscript.jpg": "not read for safety",
    "bomb.png": "--max_image_megapixels 100",
    "no_pixels.png": "PNG that is damaged",
    "._cat.jpg": "macOS",
    "Thumbs.db": r"Thumbs\.db",
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "pictures"
    expected = build_hostile_folder(folder)
    captions_only = {name for name, (_, reason, _) in expected.items() if reason in ("blank caption", "no row")}
    assert {name for name, (kind, _, _) in expected.items() if kind == "good"} == set(PIXELS)
    assert {name for name, (kind, _, _) in expected.items() if kind == "bad"} == set(ERRORS) | captions_only
    assert {path.name for path in folder.iterdir()} == {*expected, "metadata.jsonl"}
    return folder


def both_ways(path: Path) -> list[dict]:
    return [{"bytes": path.read_bytes(), "path": path.name}, {"bytes": None, "path": str(path)}]


@pytest.mark.parametrize("name", PIXELS)
def test_a_hostile_but_good_picture_has_the_right_colours(hostile: Path, name: str) -> None:
    expected, tolerance = PIXELS[name]
    for source in both_ways(hostile / name):
        image = open_image(source)
        assert image.mode == "RGB"
        assert np.abs(np.subtract(image.getpixel((0, 0)), expected)).max() <= tolerance
        assert read_size(source) == image.size
        if name.startswith("turned"):
            assert image.size == (32, 16)
            assert image.getpixel((31, 15)) == (255, 255, 255)


@pytest.mark.parametrize("name", ERRORS)
def test_a_bad_file_is_named_with_what_it_is(hostile: Path, name: str) -> None:
    for source in both_ways(hostile / name):
        with pytest.raises(ImageError, match=ERRORS[name]) as error:
            open_image(source)
        assert str(error.value).startswith(f"{source['path']}: ")
        assert "\n" not in str(error.value)


def test_a_header_is_enough_to_refuse_a_bomb(hostile: Path) -> None:
    for source in both_ways(hostile / "bomb.png"):
        for function in (open_image, read_size):
            with pytest.raises(ImageError, match="182000000 pixels"):
                function(source)
    # Over Pillow's own 89 megapixels, and under the limit that was asked for: without its warning.
    assert read_size(both_ways(hostile / "bomb.png")[0], max_megapixels=200) == (14000, 13000)
    with pytest.raises(ImageError, match=r"picture\.png.* --max_image_megapixels 0\.0001"):
        open_image(row(Image.new("RGB", (11, 10))), max_megapixels=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as an application may: the limit is still kept
        with pytest.raises(ImageError, match="--max_image_megapixels"):
            open_image(row(Image.new("RGB", (11, 10))), max_megapixels=1e-4)


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}])
def test_a_row_without_an_image_says_so(nothing: dict | None) -> None:
    for function in (open_image, read_size):
        with pytest.raises(ImageError, match="an image without a name: "):
            function(nothing)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.png"):
        read_size({"bytes": None, "path": str(tmp_path / "absent.png")})


def test_the_folder_is_read_by_datasets_and_what_it_refuses_stays_refused(hostile: Path, tmp_path: Path) -> None:
    rows = datasets.load_dataset("imagefolder", data_dir=str(hostile), split="train")
    names = {Path(image["path"]).name for image in rows.cast_column("image", datasets.Image(decode=False))["image"]}
    assert {"bomb.png", "blank_null.png"} <= names
    assert not {"without_row.png", "._cat.jpg", "Thumbs.db"} & names  # dropped without a word
    for build, error in ((mixed_captions, "string to number"), (outside_path, "not allowed")):
        build(tmp_path / build.__name__)
        with pytest.raises((ValueError, datasets.exceptions.DatasetGenerationError)) as raised:
            datasets.load_dataset("imagefolder", data_dir=str(tmp_path / build.__name__), split="train")
        assert error in f"{raised.value} {raised.value.__cause__}"


def test_transparency_of_gray_with_16_bits_and_of_rgb_by_one_colour() -> None:
    gray = Image.fromarray(np.array([[1000, 65535, 0]], dtype=np.uint16))
    assert list(np.asarray(open_image(row(gray, transparency=1000)))[0, :, 0]) == [255, 255, 0]
    colour = Image.new("RGB", (2, 1), "red")
    colour.putpixel((1, 0), (0, 0, 255))
    assert np.asarray(open_image(row(colour, transparency=(255, 0, 0)))).tolist() == [[[255] * 3, [0, 0, 255]]]


def test_sixteen_bit_gray_is_scaled_over_the_whole_range() -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16)[None]
    np.testing.assert_array_equal(np.asarray(open_image(row(Image.fromarray(values))))[0, :, 0], np.arange(256))
    with pytest.raises(ImageError, match="from 0 to 70000"):
        open_image(row(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "TIFF"))


def test_a_profile_with_transparency_and_of_another_colour_space() -> None:
    half = Image.new("RGBA", (4, 4), (*P3_COLOUR, 255))
    half.putpixel((0, 0), (0, 255, 0, 0))
    opened = open_image(row(half, icc_profile=p3_profile()))
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert np.abs(np.subtract(opened.getpixel((1, 1)), srgb_of_p3(P3_COLOUR))).max() <= 1
    # A profile for RGB says nothing about CMYK or gray.
    ink = Image.new("CMYK", (4, 4), (0, 255, 0, 0))
    opened = open_image(row(ink, "JPEG", quality=95, icc_profile=p3_profile()))
    assert opened.getpixel((1, 1)) == (255, 0, 255)
    assert open_image(row(Image.new("L", (4, 4), 90), icc_profile=p3_profile())).getpixel((1, 1)) == (90,) * 3
    # sRGB by whatever name changes no pixel.
    name = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert open_image(row(Image.new("RGB", (4, 4), (1, 2, 3)), icc_profile=name)).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_is_turned_upright(kind: str) -> None:
    if kind not in FORMATS:
        pytest.skip("this Pillow has no AVIF")
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("black", (0, 0, 16, 8))
    stored_as = {  # what EXIF says must be done, undone
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, transposition in stored_as.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright if transposition is None else upright.transpose(transposition)
        source = row(stored, kind, exif=exif)
        assert read_size(source) == (32, 16)
        opened = open_image(source, at_least=(16, 8))
        assert np.abs(np.asarray(opened).astype(int) - np.asarray(upright)).mean() < 3


def scene(width: int, height: int) -> Image.Image:
    """Smooth with edges, so that a shift or a wrong filter is seen in the PSNR."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 41 + y / 29), np.sin(y / 17) * np.cos(x / 57), ((x // 96 + y // 80) % 2) * 1.6 - 0.8]
    return Image.fromarray((np.stack(waves, axis=-1) * 100 + 127).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("turned", [False, True])
def test_a_large_jpeg_is_decoded_small_but_covers(turned: bool) -> None:
    upright = scene(1600, 640)
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    stored = upright.transpose(Image.Transpose.ROTATE_90) if turned else upright
    source = row(stored, "JPEG", quality=95, exif=exif)
    assert open_image(source).size == (1600, 640)
    assert open_image(source, at_least=(128, 128)).size == (400, 160)
    assert open_image(source, at_least=(640, 128)).size == (800, 320)
    assert open_image(source, at_least=(128, 640)).size == (1600, 640)
    # A crop that begins at a whole pixel of both.
    options = {"interpolation": "lanczos", "crop_u": (0.304, 0.5), "flip": False}
    small = fit_image(open_image(source, at_least=(96, 128)), (128, 96), **options)
    assert psnr(small, fit_image(open_image(source), (128, 96), **options)) > 38


def test_fit_scales_to_cover_and_crops_where_it_is_told() -> None:
    gradient = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (32, 64, 3))
    image = Image.fromarray(gradient.copy())

    def left_edge(u: float, flip: bool = False) -> int:
        pixels = fit_image(image, (32, 32), interpolation="lanczos", crop_u=(u, 0.5), flip=flip)
        assert pixels.shape == (3, 32, 32)
        assert pixels.dtype == np.uint8
        return int(pixels[0, 0, 0])

    assert (left_edge(0.0), left_edge(0.5), left_edge(0.999)) == (0, 16, 32)
    assert left_edge(0.0, flip=True) == 31


def test_fit_without_a_crop_shows_the_whole_picture_in_another_shape() -> None:
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    pixels = fit_image(image, (48, 24), interpolation="box", crop_u=None, flip=False)
    assert pixels.shape == (3, 48, 24)
    assert (pixels[0, :, :12] == 255).all()
    assert (pixels[2, :, 12:] == 255).all()


def test_only_the_crop_is_scaled_where_scaling_all_and_cropping_would_have_it() -> None:
    image = scene(900, 500)
    for u, left, right in ((0.0, 0, 333), (0.5, 283, 617), (0.999, 567, 900)):  # pixels of the picture
        pixels = fit_image(image, (240, 160), interpolation="lanczos", crop_u=(u, 0.5), flip=False)
        part = image.crop((left, 0, right, 500)).resize((160, 240), Image.Resampling.LANCZOS)
        assert np.abs(pixels.astype(int) - np.asarray(part).transpose(2, 0, 1)).max() <= 2
    # Enlarged, to parts of a pixel.
    small = image.resize((90, 50))
    scaled = small.resize((432, 240), Image.Resampling.LANCZOS)
    for u, left in ((0.0, 0), (0.5, 136), (0.999, 272)):
        pixels = fit_image(small, (240, 160), interpolation="lanczos", crop_u=(u, 0.5), flip=False)
        expected = np.asarray(scaled.crop((left, 0, left + 160, 240))).transpose(2, 0, 1)
        assert np.abs(pixels.astype(int) - expected).max() <= 2


def test_a_picture_that_pillow_keeps_in_pieces_is_scaled_like_others() -> None:
    image = scene(2600, 2000)  # 20.8 MB
    scaled = np.asarray(image.resize((640, 512), Image.Resampling.LANCZOS, box=(0, 0, 2498, 2000))).transpose(2, 0, 1)
    pixels = fit_image(image, (512, 640), interpolation="lanczos", crop_u=(0.0, 0.0), flip=True)
    assert psnr(pixels[:, :, ::-1], scaled) > 45


def test_the_fast_way_of_shrinking_is_close_to_plain_lanczos() -> None:
    image = scene(2048, 1024)
    plain = np.asarray(image.resize((256, 128), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert psnr(fit_image(image, (128, 256), interpolation="lanczos", crop_u=(0.5, 0.5), flip=False), plain) > 45


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (1, 1), (7, 5), (513, 512)])
@pytest.mark.parametrize("interpolation", ["nearest", "lanczos", "bicubic"])
@pytest.mark.parametrize("crop_u", [None, (0.0, 0.0), (0.999999, 0.999999)])
def test_any_shape_is_fitted(size: tuple[int, int], interpolation: str, crop_u: tuple[float, float] | None) -> None:
    pixels = fit_image(
        Image.new("RGB", size, (10, 20, 30)), (64, 96), interpolation=interpolation, crop_u=crop_u, flip=True
    )
    assert pixels.shape == (3, 64, 96)
    assert (pixels == np.array([10, 20, 30])[:, None, None]).all()


def test_formats_that_start_other_programs_are_left_out() -> None:
    assert not {"EPS", "WMF", "PDF", "GRIB"} & set(FORMATS)
    for kind in FORMATS:
        assert open_image(row(Image.new("RGB", (8, 8), "white"), kind)).getpixel((4, 4)) == (255, 255, 255)
    with pytest.raises(ImageError, match="not a picture"):
        open_image(row(Image.new("RGB", (8, 8)), "PCX"))


def test_bytes_are_read_without_a_name() -> None:
    with pytest.raises(ImageError, match="an image without a name: not a picture"):
        open_image({"bytes": io.BytesIO(b"xyz").getvalue(), "path": None})
