"""Files in folders that others may have written: only regular ones, and no more of them than is expected."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path


class StrangeFile(ValueError):
    """What stands there is not what is read from such a folder; the message goes on from the file's name."""


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """A regular file, to be read. No link is followed, no FIFO waited for, no device read: raises StrangeFile."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise StrangeFile("is no regular file") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StrangeFile("is no regular file")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_text(path: Path, limit: int) -> str:
    """The text of a regular file of `limit` bytes at most. Raises StrangeFile, OSError, UnicodeDecodeError."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise StrangeFile(f"is larger than {limit >> 20} MiB")
    return data.decode()
