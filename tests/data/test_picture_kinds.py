"""HEIC, AVIF, JPEG XL and JPEG 2000, and what files are that are no pictures."""

import io
import json
import struct
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pillow_jxl.JpegXLImagePlugin
import pytest
from conftest import ROOT
from hostile_images import P3_COLOUR, encoded, p3_profile, tiff, wide_png, with_brands, with_profile
from PIL import Image
from test_images import srgb_of_p3
from training_runs import train

from sd_recipes.data import images, picture_kinds
from sd_recipes.data.images import ImageError, open_image, read_size
from sd_recipes.inspection.image_checks import ImageSettings, inspect_images

UPRIGHT = Image.new("RGB", (64, 32), "white")
UPRIGHT.paste("blue", (0, 0, 32, 16))
LOSSLESS = {"HEIF": {"quality": 95}, "AVIF": {"quality": 95}, "JXL": {"lossless": True}, "JPEG2000": {}}
NEW_KINDS = list(LOSSLESS)
STORED_AS = {  # what EXIF says must be done, undone
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def source(content: bytes, name: str = "picture") -> dict:
    return {"bytes": content, "path": name}


def distance(content: bytes, expected: Image.Image) -> float:
    """How far the opened picture is from the expected one; the header must give the same size."""
    opened = open_image(source(content), at_least=(16, 8))
    assert read_size(source(content)) == opened.size == expected.size
    return float(np.abs(np.asarray(opened).astype(int) - np.asarray(expected)).mean())


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_a_file_is_read_from_disk_and_from_memory(kind: str, tmp_path: Path) -> None:
    content = encoded(UPRIGHT, kind, **LOSSLESS[kind])
    path = tmp_path / "picture"
    path.write_bytes(content)
    assert distance(content, UPRIGHT) < 3
    assert np.array_equal(open_image(source(content)), open_image({"bytes": None, "path": str(path)}))


HEIC = encoded(UPRIGHT, "HEIF", quality=95)
AVIF = encoded(UPRIGHT, "AVIF", quality=95)


@pytest.mark.parametrize(
    ("picture", "major", "compatible"),
    [
        *((HEIC, brand, [b"heic"]) for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc")),
        *((HEIC, brand, [b"heic"]) for brand in (b"mif1", b"msf1", b"miaf")),
        (HEIC, b"mif1", []),
        *((AVIF, brand, [b"avif"]) for brand in (b"avif", b"mif1", b"msf1", b"miaf", b"MA1A")),
        (AVIF, b"mif1", []),
        (AVIF, b"miaf", []),
    ],
)
def test_all_brands_of_heic_and_avif(picture: bytes, major: bytes, compatible: list[bytes]) -> None:
    assert distance(with_brands(picture, major, *compatible), UPRIGHT) < 3


@pytest.mark.parametrize("orientation", STORED_AS)
def test_heic_is_turned_as_its_properties_say(orientation: int) -> None:
    content = encoded(UPRIGHT.transpose(STORED_AS[orientation]), "HEIF", exif=oriented(orientation), quality=95)
    assert b"irot" in content or b"imir" in content
    assert distance(content, UPRIGHT) < 3


@pytest.mark.parametrize("orientation", STORED_AS)
def test_avif_is_turned_as_its_properties_say(orientation: int) -> None:
    content = encoded(UPRIGHT.transpose(STORED_AS[orientation]), "AVIF", exif=oriented(orientation), quality=95)
    assert b"irot" in content or b"imir" in content
    assert distance(content, UPRIGHT) < 3


@pytest.mark.parametrize("orientation", STORED_AS)
def test_jpeg_xl_is_turned_once(orientation: int, tmp_path: Path) -> None:
    stored = UPRIGHT.transpose(STORED_AS[orientation])
    plain = {"lossless": True, "use_container": True, "exif": oriented(orientation)}
    assert distance(encoded(stored, "JXL", **plain), UPRIGHT) == 0
    # A JPEG in a smaller dress: its header has the orientation as well.
    jpeg = tmp_path / "picture.jpg"
    stored.save(jpeg, quality=95, exif=oriented(orientation))
    with Image.open(jpeg) as image:
        content = encoded(image, "JXL", lossless_jpeg=True)
    header = picture_kinds.jxl_header(io.BytesIO(content))
    assert header == (*stored.size, orientation)
    assert distance(content, UPRIGHT) < 3
    # Without what would make it a JPEG again, its reader turns the pixels, and leaves the EXIF as it is.
    start = content.index(b"jbrd") - 4
    end = start + int.from_bytes(content[start : start + 4])
    exif = oriented(orientation).removeprefix(b"Exif\0\0")
    without = content[:start] + content[end:] + struct.pack(">I4s4x", 12 + len(exif), b"Exif") + exif
    with Image.open(io.BytesIO(without)) as image:
        assert image.size == UPRIGHT.size
        assert image.getexif()[0x0112] == orientation
    assert distance(without, UPRIGHT) < 3


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (300, 200), (1600, 900), (1, 3000), (3000, 2), (520, 512)])
def test_the_header_of_jpeg_xl_has_its_size(size: tuple[int, int]) -> None:
    for options in ({}, {"use_container": True, "exif": oriented(1) + bytes(8000)}):
        content = encoded(Image.new("RGB", size), "JXL", effort=1, **options)
        assert picture_kinds.jxl_header(io.BytesIO(content)) == (*size, 1)


def test_profiles_of_the_new_kinds_are_applied() -> None:
    colour = Image.new("RGB", (16, 16), P3_COLOUR)
    for content in (
        encoded(colour, "HEIF", quality=100, chroma=444, icc_profile=p3_profile()),
        encoded(colour, "AVIF", quality=100, icc_profile=p3_profile()),
        with_profile(encoded(colour, "JPEG2000"), p3_profile()),
    ):
        pixel = open_image(source(content)).getpixel((8, 8))
        assert np.abs(np.subtract(pixel, srgb_of_p3(P3_COLOUR))).max() <= 2


def test_of_a_sequence_the_first_picture_is_taken() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("lime", "blue")]
    for kind in ("HEIF", "AVIF"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], quality=95)
        assert distance(content, frames[0]) < 3


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_transparency_of_the_new_kinds_is_laid_over_white(kind: str) -> None:
    content = encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 0)), kind, **LOSSLESS[kind])
    assert open_image(source(content)).getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_the_header_refuses_a_bomb(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.new("RGB", (400, 300)), kind, **LOSSLESS[kind])
    monkeypatch.setattr(pillow_jxl.JpegXLImagePlugin, "Decoder", None)  # its reader would decode before it is asked
    for function in (open_image, read_size):
        with pytest.raises(ImageError, match=r"^picture: image size \(120000 pixels\) is over --max_image_megapixels"):
            function(source(content), max_megapixels=0.1)


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_a_damaged_picture_of_a_new_kind_is_named(kind: str) -> None:
    content = encoded(UPRIGHT, kind, **LOSSLESS[kind])
    with pytest.raises(ImageError, match=r"^picture: (.* that is damaged|broken data stream)") as error:
        open_image(source(content[: len(content) * 2 // 3]))
    assert "\n" not in str(error.value)


def test_a_kind_that_needs_a_plugin_is_named_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    jxl = [encoded(UPRIGHT, "JXL", **options) for options in ({}, {"use_container": True})]
    jp2 = encoded(UPRIGHT, "JPEG2000")
    few = ["JPEG", "PNG"]
    monkeypatch.setattr(picture_kinds, "FORMATS", few)
    monkeypatch.setattr(images, "FORMATS", few)
    for content in jxl:
        with pytest.raises(ImageError, match=r"JPEG XL, which needs a plugin: pip install 'sd-recipes\[pictures\]'"):
            open_image(source(content))
    for content, words in ((jp2, "JPEG 2000"), (AVIF, "AVIF")):
        with pytest.raises(ImageError, match=f"{words}, which this build of Pillow does not read"):
            open_image(source(content))
    assert "pictures" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def ftyp(brand: bytes, *compatible: bytes) -> bytes:
    return struct.pack(">I4s4s4x", 16 + 4 * len(compatible), b"ftyp", brand) + b"".join(compatible)


PREVIEW = np.zeros((8, 8), np.uint16)


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (ftyp(b"isom", b"isom", b"avc1"), "a.png", r"a video \(MP4\)"),
        (ftyp(b"qt  ", b"qt  "), "a.mov", r"a video \(QuickTime\)"),
        (b"\0\0\0\x08wide\0\0\0\0mdat", "a.mov", r"a video \(QuickTime\)"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81", "a.webm", r"a video \(Matroska or WebM\)"),
        (b"RIFF\0\0\0\0AVI LIST", "a.avi", r"a video \(AVI\)"),
        ((b"\x47" + bytes(187)) * 3, "a.ts", r"a video \(MPEG transport stream\)"),
        (ftyp(b"M4A "), "a.m4a", "a sound"),
        (ftyp(b"avci", b"mif1", b"avci"), "a.heif", "HEIF picture in a coding that is not read"),
        (ftyp(b"mif1", b"mif1", b"vvic"), "a.heif", "HEIF picture in a coding that is not read"),
        (b"PK\x03\x04\x14\0", "a.jpg", r"an archive \(ZIP"),
        (b"Rar!\x1a\x07\0", "a.jpg", r"an archive \(RAR\)"),
        (b"7z\xbc\xaf\x27\x1c", "a.jpg", r"an archive \(7z\)"),
        (bytes(257) + b"ustar", "a.jpg", r"an archive \(tar\)"),
        (b"8BPS\0\1", "a.psd", "a Photoshop document"),
        (b'<?xml version="1.0"?>\n<!-- a cat -->\n<svg width="8">', "a.svg", r"a drawing \(SVG\)"),
        (b"\n<html><body>404", "a.jpg", "a web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied", "a.jpg", "a file in XML"),
        ("1girl, ein Hündchen".encode(), "a.txt", "a text file"),
        (b"BMW, G-Class, GIF89a" * 50, "a.txt", "a text file"),
        (("ü" * 3000).encode(), "a.txt", "a text file"),
        ("a cat".encode("utf-16"), "a.txt", "a text file"),
        (b'{"text": "a cat"}', "a.json", "a file in JSON"),
        (b"version https://git-lfs.github.com/spec/v1", "a.png", "a pointer of Git LFS"),
        (ftyp(b"crx "), "a.cr3", "a raw file of a camera"),
        (b"FUJIFILMCCD-RAW 0201", "a.raf", "a raw file of a camera"),
        (bytes(100), "a.NEF", "a raw file of a camera"),
        # Raw files that Pillow opens, and shows a preview of.
        (tiff(PREVIEW), "a.NEF", "a raw file of a camera"),
        (tiff(PREVIEW, tags={50706: (1, [1, 4, 0, 0])}), "a.tif", "a raw file of a camera"),
        (tiff(PREVIEW, tags={254: (4, [1]), 330: (4, [8])}), "a.tif", "a raw file of a camera"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "a.webp", "WebP that is damaged"),
        (b"\xff\xd8\xff\xe0", "a.jpg", "JPEG that is damaged"),
        (bytes(range(200, 256)), "a.jpg", "not a picture, or none of JPEG, PNG"),
    ],
)
def test_a_file_is_named_as_what_it_is(content: bytes, name: str, words: str) -> None:
    for function in (open_image, read_size):
        with pytest.raises(ImageError, match=rf"^{name}: (not a picture, but )?(a )?{words}"):
            function(source(content, name))


def test_new_kinds_are_trained_on_and_inspected(settings: dict[str, Any], tmp_path: Path) -> None:
    """Pictures of one colour each, which must arrive in the batches."""
    colours = {"HEIF": "red", "AVIF": "lime", "JXL": "blue", "JPEG2000": "yellow", "TIFF": "cyan", "PNG": "magenta"}
    pictures = {kind: Image.new("RGB", (40, 36), colour) for kind, colour in colours.items()}
    for picture in pictures.values():
        picture.putpixel((0, 0), (9, 9, 9))  # pictures of one value have no white of their own
    folder = tmp_path / "kinds"
    folder.mkdir()
    lines = []
    for kind, picture in pictures.items():
        wide = np.asarray(picture).astype(np.uint16)
        content = {"TIFF": tiff, "PNG": wide_png}.get(kind, lambda _, kind=kind: encoded(pictures[kind], kind))(wide)
        (folder / f"{kind}.{kind.lower()}").write_bytes(content)
        lines.append({"file_name": f"{kind}.{kind.lower()}", "text": kind})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = train(settings, train_data_dir=str(folder), train_batch_size=6, max_train_steps=1, dataloader_num_workers=1)
    [[batch]] = run.batches(0, 1)
    assert batch.weights.tolist() == [1] * 6
    for row, pixels in zip(batch.plan.rows, batch.pixels, strict=True):
        found = pixels[:, 16, 16].numpy().astype(int)
        expected = list(pictures.values())[row].getpixel((16, 16))
        assert np.abs(found - expected).max() < 4, list(pictures)[row]
    checks = ImageSettings(
        resolution=32, buckets=None, uses_buckets=False, max_upscale=2.0, max_image_megapixels=1.0, root=str(folder)
    )
    (folder / "a.mp4").write_bytes(ftyp(b"isom"))
    paths = [*sorted(path for path in folder.iterdir() if path.suffix != ".jsonl")]
    inspected = inspect_images(enumerate({"bytes": None, "path": str(path)} for path in paths), checks)
    assert len(inspected.rows) == 6
    assert [(found.kind, found.name) for found in inspected.findings] == [("undecodable", "a.mp4")]


def test_a_picture_as_phones_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A HEIC of tiles that is turned by its properties, in Display P3."""
    monkeypatch.setattr(pillow_heif.options, "GRID_TILE_SIZE", 64)
    across, down = np.mgrid[0:130, 0:200]
    waves = [across % 200, down % 200, (across + down) // 2 % 200]
    upright = Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))
    stored = upright.transpose(STORED_AS[6])
    content = encoded(stored, "HEIF", quality=95, chroma=444, exif=oriented(6), icc_profile=p3_profile())
    assert b"grid" in content
    assert distance(content, open_image(source(encoded(upright, icc_profile=p3_profile())))) < 2
