"""Files of a folder, and the picture that a name in a table means."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".avif", ".avifs", ".heic", ".heif", ".hif", ".heics", ".heifs", ".jxl", ".jp2", ".j2k",
    ".j2c", ".jpx", ".jpf",
}  # fmt: skip
SYSTEM_FILES = {".ds_store", "thumbs.db", "desktop.ini"}
ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
LONGEST_PATH = 4096  # of Linux
WINDOWS_DRIVE = re.compile(r"[a-zA-Z]:[\\/]")


def suffix_of(name: str) -> str:
    """A file's suffix in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


@dataclass
class Listing:
    """The files under a folder, each once."""

    pictures: list[str] = field(default_factory=list)
    others: dict[str, list[str]] = field(default_factory=dict)  # by suffix
    passed_over: Counter[str] = field(default_factory=Counter)  # numbers of what, in words
    links_outside: list[str] = field(default_factory=list)  # that are not followed

    def with_suffix(self, *suffixes: str) -> list[str]:
        """The files with one of these suffixes, none of which is a picture's, in order of their paths."""
        return sorted(path for suffix in suffixes for path in self.others.get(suffix, []))


def list_files(folder: Path, *, follow_links: bool = False) -> Listing:
    """All files under a folder but what is hidden or an operating system's; nothing is entered or listed twice.

    Links are followed where they stay in the folder and, with `follow_links`, out of it.
    """
    return _Walk(folder, follow_links).listing


class _Walk:
    def __init__(self, folder: Path, follow_links: bool) -> None:
        self.root, self.follows_out = os.path.realpath(folder), follow_links
        self.listing = Listing()
        self._met: set[str] = set()  # real paths of folders and files
        self._links: list[str] = []
        self._enter(str(folder), self.root)
        while self._links:  # after the rest, so that a file is known by its own name where it has one here
            links, self._links = sorted(self._links), []
            for link in links:
                self._follow(link)
        self.listing.pictures.sort()

    def _enter(self, folder: str, real: str) -> None:
        waiting = [(folder, real)]
        while waiting:
            place, real_place = waiting.pop()
            if real_place in self._met:
                continue
            self._met.add(real_place)
            with os.scandir(place) as entries:
                for entry in entries:
                    name, real = entry.name, os.path.join(real_place, entry.name)
                    if entry.is_symlink():
                        self._links.append(entry.path)
                    elif name.startswith("._") or name.lower() in SYSTEM_FILES:
                        self.listing.passed_over["files of macOS or Windows"] += 1
                    elif entry.is_file():
                        self._list(entry.path, real)
                    elif not entry.is_dir():
                        self.listing.passed_over["pipes, sockets and devices"] += 1
                    elif name.startswith(".") or name in ("__MACOSX", "@eaDir"):
                        self.listing.passed_over["hidden folders"] += 1
                    else:
                        waiting.append((entry.path, real))

    def _list(self, path: str, real: str) -> None:
        self._met.add(real)
        suffix = suffix_of(path)
        if suffix in IMAGE_SUFFIXES:
            self.listing.pictures.append(path)
        else:
            self.listing.others.setdefault(suffix, []).append(path)

    def _follow(self, link: str) -> None:
        real = os.path.realpath(link)
        if not self.follows_out and not _is_in(real, self.root):
            self.listing.links_outside.append(link)
        elif real in self._met or _is_in(self.root, real):
            self.listing.passed_over["links to what is there already"] += 1
        elif os.path.isdir(real):
            self._enter(link, real)
        else:  # a broken one too: it is named when its picture is read
            self._list(link, real)


class NotFound(ValueError):
    """A name in a table that stands for no picture; the message says why."""


class Missing(NotFound):
    """No file of that name, nor of one like it, is there."""


class Outside(NotFound):
    """A name that leads out of the folder in which pictures must lie."""


class PictureFinder:
    """The files that the names in a table mean: as they stand, or, where exactly one file fits, nearly.

    A name may have either slash, another case or Unicode form, or no suffix. Relative names begin at `root`. With
    `within`, names may not lead out of that folder, nor, unless `follows_links`, links. `pictures` are those known to
    be there.
    """

    def __init__(
        self,
        root: Path,
        *,
        within: Path | None = None,
        follows_links: bool = True,
        pictures: Sequence[str] = (),
    ) -> None:
        self.root = root
        self.pictures = pictures
        self.within = os.path.abspath(within) if within is not None else None
        self.real_within = os.path.realpath(within) if within is not None and not follows_links else None
        self.nearly = 0  # names that were not exactly the file's
        self._folders: dict[str, dict[str, list[str]]] = {}  # what a folder holds, by what names are compared as

    def find(self, name: object) -> str:
        """The path of the picture. Raises NotFound and, for a name that leads out of `within`, Outside."""
        if not isinstance(name, str) or not name.strip():
            raise NotFound("no name of a picture")
        plain = name.strip().strip('"').removeprefix("file://")
        path = self._path(plain)
        if not os.path.isfile(path):
            path = self._one_like(self._path(plain.replace("\\", "/")), name)
        if self.real_within is not None and not _is_in(os.path.realpath(path), self.real_within):
            raise NotFound(f"{path}: a link out of the folder, which --follow_links would follow")
        return path

    def place_of(self, name: object) -> str | None:
        """The folder of the one known picture that has a bare name, without folders; None if there is none."""
        last = str(name).strip().casefold()
        places = {os.path.dirname(path) for path in self.pictures if os.path.basename(path).casefold() == last}
        return places.pop() if len(places) == 1 else None

    def has(self, name: str) -> bool:
        """Whether there is a file of exactly that name."""
        return len(name) < LONGEST_PATH and os.path.isfile(os.path.join(self.root, name))

    def _path(self, name: str) -> str:
        path = os.path.normpath(os.path.join(self.root, name))
        if self.within is not None and not _is_in(os.path.abspath(path), self.within):
            raise Outside(name)
        return path

    def _one_like(self, path: str, name: str) -> str:
        fitting = [path] if os.path.isfile(path) else [each for each in self._like(path) if os.path.isfile(each)]
        if not fitting:
            folder, stem = os.path.split(path)
            fitting = self._in_one(self._like(folder), as_compared(stem) + ".*")
        if not fitting:
            drive = ", which begins with a drive of Windows" if WINDOWS_DRIVE.match(name) else ""
            raise Missing(f"{path}: no such file{drive}")
        if len(fitting) > 1:
            raise NotFound(f"{name}: several files fit: {', '.join(map(os.path.basename, fitting[:3]))}")
        self.nearly += 1
        return fitting[0]

    def _like(self, path: str) -> list[str]:
        """What is there at `path`, or else at paths that differ from it only in case or Unicode form."""
        if os.path.exists(path):
            return [path]
        folder, name = os.path.split(path)
        return [] if folder == path else self._in_one(self._like(folder), as_compared(name))

    def _in_one(self, folders: list[str], compared: str) -> list[str]:
        """The paths in the one folder whose names compare as that; none where there are several folders."""
        if len(folders) != 1 or not os.path.isdir(folders[0]):
            return []
        folder = folders[0]
        if folder not in self._folders:
            names: dict[str, list[str]] = {}
            for name in sorted(os.listdir(folder)):
                names.setdefault(as_compared(name), []).append(name)
                if suffix_of(name) in IMAGE_SUFFIXES:
                    names.setdefault(as_compared(os.path.splitext(name)[0]) + ".*", []).append(name)
            self._folders[folder] = names
        return [os.path.join(folder, name) for name in self._folders[folder].get(compared, [])]


def _is_in(path: str, folder: str) -> bool:
    return (path + os.sep).startswith(folder.rstrip(os.sep) + os.sep)


def as_compared(name: str) -> str:
    """What names are compared as where case and Unicode form may differ."""
    return unicodedata.normalize("NFC", name).casefold()
