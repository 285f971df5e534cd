"""Bits in words: digits that mean something, and differences that count."""

from __future__ import annotations

from typing import Any

import pytest

from sd_recipes.export.bit_pages import sentences, with_error


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (1.41335, 0.03847, "1.413 ± 0.038"),
        (-1539.1, 79.02, "-1539 ± 79"),
        (0.0031, 0.000072, "0.003100 ± 0.000072"),
        (1.41335, None, "1.413"),
        (0.0, 0.0, "0"),
    ],
)
def test_a_value_has_the_digits_that_its_error_leaves(value: float, error: float | None, words: str) -> None:
    assert with_error({"value": value, "error": error}) == words


@pytest.mark.parametrize(
    ("told", "begins"),
    [(0.3, "The caption of a held-out row tells 0.30"), (0.1, "What its caption tells"), (-0.1, "What its caption"),
     (-0.3, "With its caption a held-out row takes 0.30"), (0.0, "What its caption tells")],
)  # fmt: skip
def test_a_difference_counts_from_two_standard_errors_on(told: float, begins: str) -> None:
    figure: dict[str, Any] = {"value": told, "error": 0.1 if told else 0.0}
    figures = {"held_out": {"told_by_captions": figure, "told_by_captions_per_picture": figure}}
    assert sentences(figures)[0].startswith(begins)
    gap = {-0.3: "bits a dimension less", 0.3: "bits a dimension more"}.get(told, "as many bits")
    assert gap in sentences({**figures, "gap": figure})[1]
    change = {-0.3: "0.30 ± 0.10 less", 0.3: "0.30 ± 0.10 bits a dimension more"}.get(told, "as many bits")
    assert change in sentences({**figures, "change": figure})[1]
