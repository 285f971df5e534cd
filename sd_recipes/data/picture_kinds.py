"""Kinds of files: which ones are decoded as pictures, and what the others are, by their first bytes."""

from __future__ import annotations

import io
from pathlib import PurePath
from typing import IO

import pillow_heif
from PIL import ExifTags, Image, TiffImagePlugin, features

try:
    import pillow_jxl  # noqa: F401  registers itself
except ImportError:
    HAS_JXL = False
else:
    HAS_JXL = True

# A thumbnail in the file is another picture than a reduced one.
pillow_heif.register_heif_opener(thumbnails=False)

# No format whose reader starts another program (EPS, WMF), or that hardly any photograph is stored in.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "HEIF"]
FORMATS += ["AVIF"] if features.check("avif") else []
FORMATS += ["JPEG2000"] if features.check("jpg_2000") else []
FORMATS += ["JXL"] if HAS_JXL else []

START = 4096  # bytes of a file that tell its kind

AVIF_BRANDS = {b"avif", b"avis"}
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
# Of files that hold pictures in any coding: a list of compatible brands follows, and the coding of the pictures.
CONTAINER_BRANDS = {b"mif1", b"mif2", b"miaf", b"msf1", b"1pic"}
AUDIO_BRANDS = {b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"F4B "}
JXL_CODESTREAM = b"\xff\x0a"
JXL_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"

CR2 = b"CR\x02\x00"  # in a TIFF

DELETE = "delete it, or take it out of the data"
DEVELOP = "develop it first (darktable, RawTherapee, Lightroom), and export JPEG, PNG or TIFF"
TAKE_FRAMES = "take pictures out of it, such as with `ffmpeg -i FILE -vf fps=1 %05d.png`"
TO_PNG = "convert it to PNG"
UNPACK = "unpack it first"
RAW = f"a raw file of a camera, which is not read: {DEVELOP}"
APPLE_DOUBLE = "not a picture, but what macOS puts next to a file on foreign disks (AppleDouble); delete it"
THUMBNAILS = "not a picture, but Windows' cache of thumbnails (Thumbs.db) or the like; delete it"

RAW_SUFFIXES = {
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos", ".mrw",
    ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
}  # fmt: skip

# (position, first bytes there, what it is), of files that are not decoded. The first that fits counts.
OTHER_KINDS: list[tuple[int, bytes, str]] = [
    (0, b"\x00\x05\x16\x07", APPLE_DOUBLE),
    (0, b"\xd0\xcf\x11\xe0", THUMBNAILS),
    (0, b"version https://git-lfs", "a pointer of Git LFS instead of the picture; run `git lfs pull`"),
    (0, b"%PDF", f"a PDF, which is not read for safety; {TO_PNG}"),
    (0, b"%!PS", f"PostScript, which is not read for safety; {TO_PNG}"),
    (0, b"\xc5\xd0\xd3\xc6", f"PostScript (EPS), which is not read for safety; {TO_PNG}"),
    (0, b"8BPS", f"a Photoshop document, which is not read; {TO_PNG}"),
    (0, b"gimp xcf", f"a GIMP document, which is not read; {TO_PNG}"),
    (0, b"v/1\x01", "OpenEXR with a high dynamic range, which is not read; map its tones, and save it as PNG"),
    (0, b"#?RADIANCE", "Radiance HDR with a high dynamic range, which is not read; map its tones, and save it as PNG"),
    (0, b"DDS ", f"a texture (DDS), which is not read; {TO_PNG}"),
    (0, b"qoif", f"QOI, which is not read; {TO_PNG}"),
    (0, b"\x00\x00\x01\x00", f"an icon (ICO), which is not read; {TO_PNG}"),
    (0, b"icns", f"an icon (ICNS), which is not read; {TO_PNG}"),
    (0, b"PK\x03\x04", f"an archive (ZIP, or a document that is one), not a picture; {UNPACK}"),
    (0, b"PK\x05\x06", f"an empty archive (ZIP), not a picture; {DELETE}"),
    (0, b"Rar!\x1a\x07", f"an archive (RAR), not a picture; {UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"an archive (7z), not a picture; {UNPACK}"),
    (0, b"\x1f\x8b", f"a compressed file (gzip), not a picture; {UNPACK}"),
    (0, b"BZh", f"a compressed file (bzip2), not a picture; {UNPACK}"),
    (0, b"\xfd7zXZ\x00", f"a compressed file (xz), not a picture; {UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", f"a compressed file (Zstandard), not a picture; {UNPACK}"),
    (257, b"ustar", f"an archive (tar), not a picture; {UNPACK}, or read it as a source of its own (--dataset_name)"),
    (0, b"PAR1", "a parquet file, not a picture; read it as a source of its own (--dataset_name)"),
    (0, b"\x93NUMPY", f"an array of numpy, not a picture; {TO_PNG}"),
    (0, b"\x89HDF", f"an HDF5 file, not a picture; {TO_PNG}"),
    (0, b"\x1aE\xdf\xa3", f"a video (Matroska or WebM), not a picture; {TAKE_FRAMES}"),
    (8, b"AVI ", f"a video (AVI), not a picture; {TAKE_FRAMES}"),
    (8, b"WAVE", f"a sound (WAV), not a picture; {DELETE}"),
    (0, b"FLV\x01", f"a video (Flash), not a picture; {TAKE_FRAMES}"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", f"a video (Windows Media), not a picture; {TAKE_FRAMES}"),
    (0, b"\x00\x00\x01\xba", f"a video (MPEG), not a picture; {TAKE_FRAMES}"),
    (0, b"\x00\x00\x01\xb3", f"a video (MPEG), not a picture; {TAKE_FRAMES}"),
    (0, b"OggS", f"a sound or a video (Ogg), not a picture; {DELETE}"),
    (0, b"fLaC", f"a sound (FLAC), not a picture; {DELETE}"),
    (0, b"ID3", f"a sound (MP3), not a picture; {DELETE}"),
    # QuickTime of before there were brands.
    *((4, atom, f"a video (QuickTime), not a picture; {TAKE_FRAMES}") for atom in (b"moov", b"mdat", b"wide", b"pnot")),
    (8, CR2, RAW),
    (0, b"FUJIFILMCCD-RAW", RAW),
    (0, b"IIRO", RAW),
    (0, b"IIRS", RAW),
    (0, b"MMOR", RAW),
    (0, b"IIU\x00", RAW),
    (6, b"HEAPCCDR", RAW),
    (0, b"FOVb", RAW),
    (0, b"\x00MRM", RAW),
]  # fmt: skip

# First bytes of the kinds that are decoded: what has them and cannot be opened is damaged, or an uncommon variant.
DECODED_KINDS: list[tuple[int, bytes, str]] = [
    (0, b"\xff\xd8", "JPEG"),
    (0, b"\x89PNG", "PNG"),
    (8, b"WEBP", "WebP"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    *((0, prefix, "TIFF") for prefix in TiffImagePlugin.PREFIXES),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, JXL_CODESTREAM, "JPEG XL"),
    (0, JXL_CONTAINER, "JPEG XL"),
]
NEEDED = {"JPEG 2000": "JPEG2000", "JPEG XL": "JXL", "AVIF": "AVIF"}  # formats that not every installation has


def what_it_is(start: bytes, name: str) -> str:
    """What a file is that Pillow does not open as one of FORMATS, and what to do about it.

    `start` are its first START bytes, `name` its name.
    """
    file = PurePath(name)
    if not start:
        return "an empty file"
    if file.name.startswith("._"):
        return APPLE_DOUBLE
    if file.name.lower() == "thumbs.db":
        return THUMBNAILS
    if start[4:8] == b"ftyp":
        return _what_of_iso_media(start)
    if start[: 3 * 188 : 188] == b"\x47" * 3:  # the mark of every packet
        return f"a video (MPEG transport stream), not a picture; {TAKE_FRAMES}"
    for position, prefix, words in OTHER_KINDS:
        if start.startswith(prefix, position):
            return words
    if text := _what_text_it_is(start):  # before kinds that begin with letters, as "BM" or "GIF8"
        return text
    if file.suffix.lower() in RAW_SUFFIXES:
        return RAW
    for position, prefix, kind in DECODED_KINDS:
        if start.startswith(prefix, position):
            return _not_opened(kind)
    return f"not a picture, or none of {', '.join(FORMATS)}"


def is_camera_raw(image: Image.Image, start: bytes, name: str) -> bool:
    """Whether an opened TIFF is a raw file of a camera, of which Pillow would show a preview as small as a stamp."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    tags = image.tag_v2
    is_preview = tags.get(ExifTags.Base.NewSubfileType) == 1 and ExifTags.Base.SubIFDs in tags
    is_canon = start.startswith(CR2, 8)
    return is_preview or is_canon or ExifTags.Base.DNGVersion in tags or PurePath(name).suffix.lower() in RAW_SUFFIXES


def with_known_brand(stream: IO[bytes], start: bytes) -> IO[bytes]:
    """The stream, or a copy that names its pictures' coding first, which is all that Pillow's readers go by.

    A HEIF file may name a container first (mif1, miaf), and the coding behind it, or only in its list of pictures.
    """
    if start[4:8] != b"ftyp" or start[8:12] in AVIF_BRANDS | HEIC_BRANDS:
        return stream
    brands = _brands(start)
    named = [brand for brand in brands if brand in AVIF_BRANDS | HEIC_BRANDS]
    if not named and CONTAINER_BRANDS.intersection(brands):
        named = [brand for item, brand in ((b"av01", b"avif"), (b"hvc1", b"heic")) if item in start]
    if not named:
        return stream
    stream.seek(0)
    content = stream.read()
    return io.BytesIO(content[:8] + named[0] + content[12:])


def _brands(start: bytes) -> list[bytes]:
    """The brands of a file of the family of MP4, HEIF and AVIF: its own, and those that it is compatible with."""
    end = min(int.from_bytes(start[:4]), len(start))
    return [start[position : position + 4] for position in (8, *range(16, end, 4))]


def jxl_header(stream: IO[bytes]) -> tuple[int, int, int] | None:
    """Width and height of the stored picture, and its orientation as EXIF numbers them, in a JPEG XL's header.

    Its reader has no other way than to decode at once. None for a file without such a header.
    """
    stream.seek(0)
    if stream.read(len(JXL_CONTAINER)) != JXL_CONTAINER:
        stream.seek(0)
    elif _seek_box(stream, b"jxlc", b"jxlp") is None:
        return None
    if stream.read(len(JXL_CODESTREAM)) != JXL_CODESTREAM:
        return None
    bits = int.from_bytes(stream.read(16), "little")

    def take(number: int) -> int:
        """The next number of that many bits, the lowest first."""
        nonlocal bits
        value, bits = bits & ((1 << number) - 1), bits >> number
        return value

    is_small = take(1)

    def side() -> int:
        return 8 * (1 + take(5)) if is_small else 1 + take((9, 13, 18, 30)[take(2)])

    height = side()
    ratio = take(3)
    across, down = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    width = height * across // down if ratio else side()
    is_default = take(1)
    has_orientation = not is_default and take(1)
    return width, height, 1 + take(3) if has_orientation else 1


def jp2_profile(stream: IO[bytes]) -> bytes | None:
    """The colour profile in a JPEG 2000's header, which Pillow does not read."""
    stream.seek(0)
    if _seek_box(stream, b"jp2h") is None or (length := _seek_box(stream, b"colr")) is None:
        return None
    content = stream.read(length)
    return content[3:] if content[:1] in (b"\2", b"\3") else None  # 1 is a number of a colour space


def _seek_box(stream: IO[bytes], *kinds: bytes) -> int | None:
    """Go to the content of the next box of one of these kinds; its length, -1 for the rest of the file, None if none.

    JPEG 2000 and JPEG XL files consist of boxes: length, kind, content.
    """
    while len(header := stream.read(8)) == 8:
        length, kind = int.from_bytes(header[:4]), header[4:]
        rest = int.from_bytes(stream.read(8)) - 16 if length == 1 else length - 8
        if kind in kinds:
            stream.seek(4 if kind == b"jxlp" else 0, io.SEEK_CUR)  # its number comes first
            return max(rest, -1)
        if rest < 0:
            return None
        stream.seek(rest, io.SEEK_CUR)
    return None


def _not_opened(kind: str) -> str:
    """Words for a file of a kind that is decoded."""
    if NEEDED.get(kind, "PNG") not in FORMATS:
        if kind == "JPEG XL":
            return f"JPEG XL, which needs a plugin: pip install 'sd-recipes[pictures]', or {TO_PNG}"
        return f"{kind}, which this build of Pillow does not read; {TO_PNG}"
    way = "with 8 or 16 bits per channel" if kind == "TIFF" else "as PNG"
    return f"{kind} that is damaged, or of a variant that is not read; save it again {way}"


def _what_of_iso_media(start: bytes) -> str:
    """What a file of the family of MP4, HEIF and AVIF is."""
    brand = start[8:12]
    if brand == b"crx ":
        return RAW
    if brand in AVIF_BRANDS:
        return _not_opened("AVIF")
    if brand in HEIC_BRANDS:
        return _not_opened("HEIC")
    if CONTAINER_BRANDS.intersection(_brands(start)):
        return f"a HEIF picture in a coding that is not read, or a damaged one; {TO_PNG}"
    if brand in AUDIO_BRANDS:
        return f"a sound (MP4), not a picture; {DELETE}"
    return f"a video ({'QuickTime' if brand == b'qt  ' else 'MP4'}), not a picture; {TAKE_FRAMES}"


def _what_text_it_is(start: bytes) -> str | None:
    """What a file of text is; None if it is none."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return f"not a picture, but a text file; {DELETE}"
    try:
        # Of UTF-8, START may cut the last character.
        text = start.decode("utf-8-sig") if len(start) < START else start[:-3].decode("utf-8-sig", "ignore")
    except UnicodeDecodeError:
        return None
    if not all(character.isprintable() or character.isspace() for character in text):
        return None
    text = text.lstrip().lower()
    if "<svg" in text:
        return f"a drawing (SVG), which is not read; {TO_PNG}"
    if text.startswith("<") and ("<html" in text or "<!doctype html" in text):
        return "a web page (HTML) instead of the picture, as a failed download leaves it; download the picture again"
    if text.startswith("<"):
        return f"not a picture, but a file in XML; {DELETE}"
    if text.startswith(("{", "[")):
        return f"not a picture, but a file in JSON; {DELETE}"
    return f"not a picture, but a text file; {DELETE}"
