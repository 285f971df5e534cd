"""Sizes of memory: bytes from words, and in words."""

import math
import re

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def bytes_of(text: str) -> int:
    """Bytes of a size such as 12GB (10⁹ bytes), 11.5GiB (2³⁰) or 12000MB. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+) *([a-z]*)", text.strip().lower())
    if found is None:
        raise ValueError("give a size, such as 12GB, 11.5GiB or 12000MB")
    number, unit = found.groups()
    if not unit:
        raise ValueError(f"a size needs a unit: write {number}GB")
    factor = UNITS.get(unit.removesuffix("b")) if unit != "b" else 1
    if factor is None:
        raise ValueError(f"{unit} is not a unit of memory: write GB, GiB, MB or MiB, such as {number}GB")
    if not float(number):
        raise ValueError("give a size above 0, such as 12GB")
    return int(float(number) * factor)


def size_in_words(nbytes: float, *, up: bool = False) -> str:
    """In GB of 10⁹ bytes, as memory is sold and as trackers are told; rounded, or rounded `up`."""
    tenths = nbytes / 1e8
    return f"{(math.ceil(tenths) if up else round(tenths)) / 10:.1f} GB"
