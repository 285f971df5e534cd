"""A folder of pictures and captions that break naive code, each with what must become of it."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

SIDE = 16  # pixels, of most of them
CYAN_INK = (60.0, -50.0, 30.0)  # Lab of the full first ink in cmyk_profile(): green, which naive code shows as cyan
P3_COLOUR = (200, 120, 90)  # in Display P3
DISPLAY_P3 = {  # columns of the primaries in XYZ under D50, as in Apple's profile
    b"rXYZ": (0.51512, 0.24120, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.15710, 0.06657, 0.78407),
}


class Expected(NamedTuple):
    """What becomes of a file: "good" or "bad", why it is hostile, and whether metadata.jsonl has a row for it."""

    kind: str
    reason: str
    has_row: bool = True


def build_hostile_folder(folder: Path) -> dict[str, Expected]:
    """Writes the files and a metadata.jsonl (file_name, text) into `folder`; file name to what is expected of it."""
    folder.mkdir(parents=True, exist_ok=True)
    red = Image.new("RGB", (SIDE, SIDE), "red")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    gray = np.full((SIDE, SIDE), 32768, dtype=np.uint16)
    turned = Image.new("RGB", (SIDE, 2 * SIDE), "white")  # upright: left half blue
    turned.paste("blue", (0, SIDE, SIDE, 2 * SIDE))
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = Image.new("P", (SIDE, SIDE), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    ink = Image.new("CMYK", (SIDE, SIDE), (255, 0, 0, 0))
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("green", "blue")]
    animation = {"save_all": True, "append_images": frames[1:]}
    good = {
        "rgba.png": (encoded(Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 0))), "transparent"),
        "la.png": (encoded(Image.new("LA", (SIDE, SIDE), (0, 0))), "transparent"),
        "palette.png": (encoded(palette, transparency=0), "transparent"),
        "half_palette.png": (encoded(palette, transparency=b"\x80\xff"), "transparent"),
        "gray16.png": (encoded(Image.fromarray(gray)), "16 bits"),
        "gray16.tif": (encoded(Image.fromarray(gray), "TIFF"), "16 bits"),
        "gray16.pgm": (encoded(Image.fromarray(gray), "PPM"), "16 bits"),  # opened as mode I
        "float.tif": (encoded(Image.fromarray(np.full((SIDE, SIDE), 0.25, np.float32)), "TIFF"), "float"),
        "cmyk_profile.jpg": (encoded(ink, "JPEG", quality=95, icc_profile=cmyk_profile()), "profile"),
        "cmyk.jpg": (encoded(ink, "JPEG", quality=95), "CMYK"),
        "cmyk_broken_profile.jpg": (encoded(ink, "JPEG", quality=95, icc_profile=cmyk_profile()[:150]), "profile"),
        "display_p3.png": (encoded(Image.new("RGB", (SIDE, SIDE), P3_COLOUR), icc_profile=p3_profile()), "profile"),
        "broken_profile.png": (encoded(red, icc_profile=b"no profile"), "profile"),
        "turned.jpg": (encoded(turned, "JPEG", quality=95, exif=exif), "orientation"),
        "turned.png": (encoded(turned, exif=exif), "orientation"),
        "turned.tif": (encoded(turned, "TIFF", exif=exif), "orientation"),
        "turned.webp": (encoded(turned, "WEBP", lossless=True, exif=exif), "orientation"),
        "turned_late.png": (_exif_last(encoded(turned, exif=exif)), "orientation"),
        "broken_exif.png": (encoded(red, exif=b"Exif\0\0garbage"), "orientation"),
        "animated.gif": (encoded(frames[0], "GIF", **animation), "animation"),
        "animated.webp": (encoded(frames[0], "WEBP", lossless=True, **animation), "animation"),
        "thin.png": (encoded(Image.new("RGB", (1, 5000), "red")), "aspect ratio"),
    }
    bad = {
        "high_dynamic_range.tif": (encoded(Image.fromarray(np.full((4, 4), 3.5, np.float32)), "TIFF"), "float"),
        "not_a_number.tif": (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "float"),
        "truncated.jpg": (encoded(noise, "JPEG")[:2000], "truncated"),
        "truncated.png": (encoded(noise)[:2000], "truncated"),
        "empty.jpg": (b"", "empty"),
        "garbage.png": (b"garbage", "garbage"),
        "page.jpg": (b"<!DOCTYPE html><html>404</html>", "garbage"),
        "postscript.jpg": (encoded(red, "EPS"), "format"),
        "bomb.png": (bomb(14000, 13000), "bomb"),
        "no_pixels.png": (_chunks(_header(0, 5), b""), "no pixels"),
    }
    blank = {"blank_null.png": None, "blank_empty.png": "", "blank_space.png": " \n"}
    unlisted = {
        "._cat.jpg": (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ", "AppleDouble"),
        "Thumbs.db": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(56), "thumbnails"),
        "without_row.png": (encoded(red), "no row"),
    }
    for name, (content, _) in {**good, **bad, **unlisted}.items():
        (folder / name).write_bytes(content)
    for name in blank:
        (folder / name).write_bytes(encoded(red))
    captions: dict[str, str | None] = {name: f"a picture, {reason}" for name, (_, reason) in {**good, **bad}.items()}
    rows = [{"file_name": name, "text": text} for name, text in {**captions, **blank}.items()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **{name: Expected("good", reason) for name, (_, reason) in good.items()},
        **{name: Expected("bad", reason) for name, (_, reason) in bad.items()},
        **{name: Expected("bad", "blank caption") for name in blank},
        **{name: Expected("bad", reason, has_row=False) for name, (_, reason) in unlisted.items()},
    }


def mixed_captions(folder: Path) -> None:
    """A folder whose captions are of two types, which datasets cannot put into one column."""
    _plain_folder(folder, [{"file_name": "a.png", "text": "a cat"}, {"file_name": "b.png", "text": 3}])


def outside_path(folder: Path) -> None:
    """A folder whose metadata reaches for a file outside of it."""
    _plain_folder(folder, [{"file_name": "a.png", "text": "a cat"}, {"file_name": "../../b.png", "text": "a cat"}])


def _plain_folder(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(encoded(Image.new("RGB", (SIDE, SIDE), "red")))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of black pixels, 1 bit each, of a few kilobytes."""
    lines = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join(lines.compress(row * 100) for _ in range(height // 100)) + lines.compress(row * (height % 100))
    return _chunks(_header(width, height, bits=1, colour=0), pixels + lines.flush())


def cmyk_profile() -> bytes:
    """An ICC profile (version 2, lut8 to Lab) of four inks that are not what naive code takes them for."""
    inks = np.array([CYAN_INK, (50, 70, -20), (85, 0, 90), (10, 0, 0)])
    corners = []
    for number in range(16):
        on = [ink for bit, ink in enumerate(inks) if number >> (3 - bit) & 1]
        lightness, a, b = np.min(on, axis=0)[0] if on else 100, *(np.mean(on, axis=0)[1:] if on else (0, 0))
        corners += [round(lightness * 2.55), round(a) + 128, round(b) + 128]
    identity = bytes(range(256))
    unit = struct.pack(">9i", *(np.eye(3, dtype=int) * 65536).ravel())
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + identity * 4 + bytes(corners) + identity * 3
    tags = {b"A2B0": table, b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)}
    directory, data = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        directory += name + struct.pack(">2I", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(data), b"", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + directory + data


def p3_profile() -> bytes:
    """Display P3: Pillow's sRGB profile with the other primaries, for the two share their curve."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for number in range(struct.unpack_from(">I", profile, 128)[0]):
        name, offset, _ = struct.unpack_from(">4s2I", profile, 132 + 12 * number)
        if name in DISPLAY_P3:
            struct.pack_into(">3i", profile, offset + 8, *(round(value * 65536) for value in DISPLAY_P3[name]))
    return bytes(profile)


TIFF_TYPES = {1: "B", 3: "H", 4: "I"}


def tiff(
    pixels: np.ndarray,
    *,
    order: str = "<",
    planar: bool = False,
    deflated: bool = False,
    bits: int | None = None,
    tags: dict[int, tuple[int, list[int]]] | None = None,
) -> bytes:
    """A TIFF of (height, width[, channels]), with channels wider than those that Pillow writes.

    `tags` are added to, or taken instead of, the usual ones: number to (type, values). `bits` per channel are those of
    the array if not given; the data are then the array's bytes all the same.
    """
    pixels = np.atleast_3d(pixels)
    height, width, channels = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder(order))
    planes = [data[..., channel].tobytes() for channel in range(channels)] if planar else [data.tobytes()]
    planes = [zlib.compress(plane) for plane in planes] if deflated else planes
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    entries = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits or 8 * pixels.itemsize] * channels),
        259: (3, [8 if deflated else 1]),
        262: (3, [2 if channels > 2 else 1]),
        273: (4, [0] * len(planes)),
        277: (3, [channels]),
        278: (4, [height]),
        279: (4, [len(plane) for plane in planes]),
        284: (3, [2 if planar else 1]),
        339: (3, [kind] * channels),
        **({338: (3, [2])} if channels == 4 else {}),
        **(tags or {}),
    }
    for _ in range(2):  # the second time, it is known where the pixels are
        directory, elsewhere = b"", b""
        start = 8 + 2 + 12 * len(entries) + 4
        for tag, (type_, values) in sorted(entries.items()):
            content = struct.pack(f"{order}{len(values)}{TIFF_TYPES[type_]}", *values)
            if len(content) > 4:
                place = struct.pack(f"{order}I", start + len(elsewhere))
                elsewhere += content
            else:
                place = content.ljust(4, b"\0")
            directory += struct.pack(f"{order}HHI", tag, type_, len(values)) + place
        lengths = [len(plane) for plane in planes]
        entries[273] = (4, [start + len(elsewhere) + sum(lengths[:number]) for number in range(len(planes))])
    head = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries))
    return head + directory + bytes(4) + elsewhere + b"".join(planes)


def wide_png(pixels: np.ndarray) -> bytes:
    """A PNG of uint16 (height, width, channels): gray, gray with transparency, RGB or RGBA."""
    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return _chunks(_header(width, height, bits=16, colour=colour), zlib.compress(lines))


def with_brands(picture: bytes, major: bytes, *compatible: bytes) -> bytes:
    """A HEIC or AVIF file under other brands; the rest of the old list is filled up with mif1."""
    length = int.from_bytes(picture[:4])
    brands = major + bytes(4) + b"".join(compatible)
    assert 8 + len(brands) <= length, "the pictures' places in the file must not change"
    return picture[:8] + brands + b"mif1" * ((length - 8 - len(brands)) // 4) + picture[length:]


def with_profile(jp2: bytes, profile: bytes) -> bytes:
    """A JPEG 2000 file of Pillow's with a colour profile instead of the number of its colour space."""
    start = jp2.index(b"jp2h") - 4
    end = start + int.from_bytes(jp2[start : start + 4])
    colour = jp2.index(b"colr", start) - 4
    box = struct.pack(">I4s3B", 8 + 3 + len(profile), b"colr", 2, 0, 0) + profile
    content = jp2[start + 8 : colour] + box + jp2[colour + int.from_bytes(jp2[colour : colour + 4]) : end]
    return jp2[:start] + struct.pack(">I4s", 8 + len(content), b"jp2h") + content + jp2[end:]


def _header(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    return struct.pack(">2I5B", width, height, bits, colour, 0, 0, 0)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _chunks(header: bytes, pixels: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _exif_last(png: bytes) -> bytes:
    """The same PNG with its eXIf chunk behind the pixels."""
    start = png.index(b"eXIf") - 4
    end = start + 12 + struct.unpack_from(">I", png, start)[0]
    return png[:start] + png[end:-12] + png[start:end] + png[-12:]
