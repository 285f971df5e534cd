"""Sizes of memory, from words and in words."""

from __future__ import annotations

import pytest

from sd_recipes.sizes import bytes_of, size_in_words


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("12GB", 12 * 10**9), ("12 gb", 12 * 10**9), ("12G", 12 * 10**9), ("11.5GiB", int(11.5 * 2**30)),
        ("12000MB", 12 * 10**9), ("0.5TiB", 2**39), (".5g", 5 * 10**8), ("1024B", 1024),
    ],
)  # fmt: skip
def test_a_size_is_read(text: str, nbytes: int) -> None:
    assert bytes_of(text) == nbytes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("12", "write 12GB"), ("12XB", "xb is not a unit"), ("12 gigs", "gigs is not a unit"), ("-3GB", "such as 12GB"),
        ("0GB", "above 0"), ("lots", "such as 12GB"), ("8,5GB", "such as 12GB"), ("", "such as 12GB"),
    ],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_the_way_out(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bytes_of(text)


def test_sizes_are_told_in_gigabytes() -> None:
    assert size_in_words(11.94e9) == "11.9 GB"
    assert size_in_words(11.91e9, up=True) == "12.0 GB"
