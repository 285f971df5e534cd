"""The pictures of rows as the model sees them."""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import torch

from sd_recipes.data.bad_rows import BadRow
from sd_recipes.data.images import fit_image, open_image
from sd_recipes.recipe import Recipe


def real_pictures(rows: datasets.Dataset, recipe: Recipe, size: tuple[int, int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Number and pixels, uint8 (3, H, W), of the rows' pictures as the model sees them; of those that can be used.

    Of rows that have moments instead of pictures there are none.
    """
    if recipe.image_column not in rows.column_names:
        return
    column = rows.select_columns([recipe.image_column])
    for number in range(len(column)):
        try:
            image = open_image(
                column[number][recipe.image_column],
                at_least=size[::-1],
                max_megapixels=recipe.max_image_megapixels,
            )
        except BadRow:
            continue
        pixels = fit_image(image, size, interpolation=recipe.image_interpolation_mode, crop_u=(0.5, 0.5), flip=False)
        yield number, torch.from_numpy(pixels)
