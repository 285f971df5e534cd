"""pixel_values to moments to latents."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from sd_recipes.model.latents import to_pixel_values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_defect_15_pixel_values_are_the_nearest_of_all_256_levels(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    values = to_pixel_values(levels, dtype)
    assert values.dtype == dtype
    neighbours = [torch.nextafter(values, torch.tensor(end, dtype=dtype)) for end in (-2.0, 2.0)]
    for level, value, *others in zip(range(256), values.tolist(), *(each.tolist() for each in neighbours), strict=True):
        exact = Fraction(2 * level, 255) - 1
        assert all(abs(Fraction(value) - exact) <= abs(Fraction(other) - exact) for other in others), level


def test_defect_15_pixel_values_in_float32_are_scaled_as_ever() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixel_values(levels, torch.float32), levels.to(torch.float32) / 127.5 - 1)
