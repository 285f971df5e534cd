"""Read files in folders that others may have written to: only regular files, only up to the expected size."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path


class StrangeFile(ValueError):
    """Not a file that should be read from such a folder; the message continues after the file's name."""


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading. Raises StrangeFile for anything else, such as a link, a FIFO or a device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise StrangeFile("is not a regular file") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StrangeFile("is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_text(path: Path, limit: int) -> str:
    """The text of a regular file of at most `limit` bytes. Raises StrangeFile, OSError, UnicodeDecodeError."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise StrangeFile(f"is larger than {limit >> 20} MiB")
    return data.decode()
