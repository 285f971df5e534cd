"""Masks of pictures: read, checked, brought to the latent's size, and turned into weights of its errors."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from sd_recipes.data.bad_rows import BadRow
from sd_recipes.data.columns import LATENT_MASK, MASK
from sd_recipes.data.images import ImageError, has_alpha, open_alpha, open_mask, place_crop
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import DataSettings, MaskConfig

if TYPE_CHECKING:
    import torch

CHUNK = 256


def mask_of(row: dict[str, Any], original_size: tuple[int, int], config: DataSettings) -> Image.Image | None:
    """The mask of a row whose picture is of an upright (height, width), as gray levels; None if it has none.

    Raises BadRow for one that cannot be read, that has another shape than the picture, or that is all black.
    """
    limit = config.max_image_megapixels
    encoded = row.get(MASK)
    if encoded is not None:
        name = f"its mask {encoded.get('path') or ''}".rstrip()
        try:
            mask = open_mask(encoded, max_megapixels=limit)
        except ImageError as error:
            raise BadRow(f"its mask cannot be read: {error}") from None
        height, width = original_size
        # A scaled one may be rounded by half a pixel on each side.
        if abs(mask.width * height - mask.height * width) > max(original_size):
            raise BadRow(
                f"{name} has {mask.width} x {mask.height} pixels, another shape than the picture's {width} x {height}"
            )
    else:
        if not config.mask_from_alpha:
            return None
        name = "its mask, the picture's opacity,"
        alpha = open_alpha(row[config.image_column], max_megapixels=limit)
        if alpha is None:
            return None
        mask = alpha
    if mask.getextrema()[1] == 0:
        raise BadRow(f"{name} is all black, so that nothing of the picture would be learned")
    return mask


def fit_mask(
    mask: Image.Image,
    original_size: tuple[int, int],
    size: tuple[int, int],
    latent_size: tuple[int, int],
    crop_u: tuple[float, float] | None,
) -> np.ndarray:
    """A mask's crop as that of its picture (`fit_image`), averaged over each latent's area: uint8 (h, w).

    The picture is of `original_size`, scaled to cover `size`, all (height, width); a mask of another size is scaled
    with it.
    """
    (height, width), (top, left) = place_crop(original_size, size, crop_u)
    across, down = mask.width / width, mask.height / height
    right, bottom = min((left + size[1]) * across, mask.width), min((top + size[0]) * down, mask.height)
    averaged = mask.resize(latent_size[::-1], Image.Resampling.BOX, box=(left * across, top * down, right, bottom))
    return np.asarray(averaged)


def check_shows_white(mask: np.ndarray) -> None:
    """Raises BadRow for the mask of a fixed crop, (h, w), if nothing in it is to be learned."""
    if is_black(mask):
        raise BadRow("its crop shows nothing of what is white in its mask: choose another --crop, or crop the picture")


def is_black(mask: np.ndarray | None) -> bool:
    """Whether a mask leaves nothing to learn."""
    return mask is not None and not mask.any()


def mirrored(mask: np.ndarray | None) -> np.ndarray | None:
    return None if mask is None else mask[:, ::-1]


def weights_of_masks(
    masks: Sequence[np.ndarray | None], latent_shape: tuple[int, int, int], config: MaskConfig
) -> torch.Tensor:
    """Masks (h, w) uint8 to weights of the errors in each latent, (B, 1, h, w) float32.

    w + (1 - w) m, of m from 0 for black to 1 for white and w of --unmasked_weight, over its own mean: a small subject
    counts as much as a picture without a mask, all of whose weights are 1.
    """
    import torch  # here, since inspection's workers can do without

    weights = np.ones((len(masks), 1, *latent_shape[1:]), dtype=np.float32)
    for own, mask in zip(weights, masks, strict=True):
        if mask is not None and not is_black(mask):
            share = config.unmasked_weight + (1 - config.unmasked_weight) * (mask / 255)
            own[0] = share / share.mean()
    return torch.from_numpy(weights)


def has_mask(row: dict[str, Any], config: DataSettings) -> bool:
    """Whether a row has a mask, of its own or as its picture's transparency, of which only the header is read."""
    if row.get(MASK) is not None or row.get(LATENT_MASK) is not None:
        return True
    if not config.mask_from_alpha or config.image_column not in row:
        return False
    try:
        return has_alpha(row[config.image_column], max_megapixels=config.max_image_megapixels)
    except ImageError:  # told when the picture is read
        return False


def masks_in_words(rows: datasets.Dataset, config: DataSettings) -> str:
    """How many rows have a mask. Raises RecipeError if none has."""
    wanted = [MASK, LATENT_MASK, *([config.image_column] if config.mask_from_alpha else [])]
    needed = rows.select_columns([name for name in wanted if name in rows.column_names])

    def count(start: int) -> int:
        found = needed[start : start + CHUNK]
        return sum(
            has_mask(dict(zip(found, values, strict=True)), config) for values in zip(*found.values(), strict=True)
        )

    with ThreadPoolExecutor() as readers, tqdm(total=len(rows), desc="Masks", unit="row", leave=False) as bar:
        number = 0
        for of_chunk in readers.map(count, range(0, len(rows), CHUNK)):
            number += of_chunk
            bar.update(CHUNK)
    if not number:
        ways = "put it beside its picture, as a-mask.png beside a.png, name its column by --mask_column"
        alpha = "" if config.mask_from_alpha else ", or take the pictures' transparency, by --mask_from_alpha"
        raise RecipeError(f"--masked_loss, and none of the {len(rows):,} rows has a mask: {ways}{alpha}")
    others = "" if number == len(rows) else "; the others count as a whole"
    return f"masks: {number:,} of {len(rows):,} rows have one{others}"
