"""Masks of pictures: read, checked, brought to the latent's size, and turned into weights of its errors."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow.compute as pc
from PIL import Image
from tqdm.auto import tqdm

from sd_recipes.data.bad_rows import BadRow
from sd_recipes.data.columns import LATENT_MASK, MASK
from sd_recipes.data.encoded import Encoded, is_empty
from sd_recipes.data.images import ImageError, open_alpha, open_mask, place_crop
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import DataSettings, MaskConfig

if TYPE_CHECKING:
    import torch

COUNTED = 1000  # first rows in which masks are counted
SHAPE_TOLERANCE = 0.02  # of a mask's aspect ratio over its picture's
# Of a latent's area: where less of it shows what is learned, errors weigh as if it were so much. Otherwise a picture's
# whole loss could hang on a single value, at which a crop touches the white.
LEAST_SHOWN = 0.01


def own_mask(row: dict[str, Any]) -> Encoded | None:
    """The mask that a row has beside its picture; None if there is none."""
    mask: Encoded | None = row.get(MASK)
    return None if is_empty(mask) else mask


def mask_of(row: dict[str, Any], original_size: tuple[int, int], config: DataSettings) -> Image.Image | None:
    """The mask of a row whose picture is of an upright (height, width), as gray levels; None if it has none.

    Raises BadRow for one that cannot be read, that has another shape than the picture, or that leaves nothing to learn.
    """
    limit = config.max_image_megapixels
    if encoded := own_mask(row):
        name = f"its mask {encoded.get('path') or ''}".rstrip()
        try:
            mask = open_mask(encoded, max_megapixels=limit)
        except ImageError as error:
            raise BadRow(f"its mask cannot be read: {error}") from None
        height, width = original_size
        # A scaled one may be rounded by half a pixel on each side.
        tolerance = min(max(original_size), SHAPE_TOLERANCE * mask.width * height)
        if abs(mask.width * height - mask.height * width) > tolerance:
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
    if mask.getextrema()[1] == 0 and not config.unmasked_weight:
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


def check_shows_white(mask: np.ndarray, config: MaskConfig) -> None:
    """Raises BadRow for the mask of a fixed crop, (h, w), if nothing in it is to be learned."""
    if hides_all(mask, config):
        raise BadRow("its crop shows nothing of what is white in its mask: choose another --crop, or crop the picture")


def hides_all(mask: np.ndarray | None, config: MaskConfig) -> bool:
    """Whether a mask leaves nothing to learn."""
    return mask is not None and not config.unmasked_weight and not mask.any()


def mirrored(mask: np.ndarray | None) -> np.ndarray | None:
    return None if mask is None else mask[:, ::-1]


def weights_of_masks(
    masks: Sequence[np.ndarray | None], latent_shape: tuple[int, int, int], config: MaskConfig
) -> torch.Tensor:
    """Masks (h, w) uint8 to weights of the errors in each latent, (B, 1, h, w) float32.

    w + (1 - w) m, of m from 0 for black to 1 for white and w of --unmasked_weight, over its own mean: a small subject
    counts as much as a picture without a mask, all of whose weights are 1. The mean counts as `LEAST_SHOWN` at least.
    """
    import torch  # here, since inspection's workers can do without

    weights = np.ones((len(masks), 1, *latent_shape[1:]), dtype=np.float32)
    for own, mask in zip(weights, masks, strict=True):
        if mask is not None:
            share = config.unmasked_weight + (1 - config.unmasked_weight) * (mask / 255)
            own[0] = share / max(share.mean(), LEAST_SHOWN)
    return torch.from_numpy(weights)


def has_mask(row: dict[str, Any], config: DataSettings) -> bool:
    """Whether a row has a mask, of its own or as its picture's transparency."""
    return own_mask(row) is not None or row.get(LATENT_MASK) is not None or _is_transparent(row, config)


def masks_in_words(rows: datasets.Dataset, config: DataSettings) -> str:
    """How many of the first rows have a mask. Raises RecipeError if none of all rows has, as far as that is seen."""
    first = rows.select(range(min(len(rows), COUNTED)))
    own = _have_own(first)
    left = np.flatnonzero(~own).tolist() if config.mask_from_alpha else []
    with ThreadPoolExecutor() as readers:
        found = readers.map(lambda number: _is_transparent(first[number], config), left)
        number = int(own.sum()) + sum(tqdm(found, total=len(left), desc="Masks", unit="row", leave=False))
    has_all = len(first) == len(rows)
    if not number and (has_all or not (config.mask_from_alpha or _have_own(rows).any())):
        ways = "put it beside its picture, as a-mask.png beside a.png, name its column by --mask_column"
        alpha = "" if config.mask_from_alpha else ", or take the pictures' transparency, by --mask_from_alpha"
        raise RecipeError(f"--masked_loss, and none of the {len(rows):,} rows has a mask: {ways}{alpha}")
    others = "" if number == len(first) else "; the others count as a whole"
    of = f"{len(rows):,} rows" if has_all else f"the first {len(first):,} rows"
    return f"masks: {number:,} of {of} have one{others}"


def _have_own(rows: datasets.Dataset) -> np.ndarray:
    """(N,) bool: whether each row has a mask that is not its picture's transparency; no mask is read for it."""
    have = np.zeros(len(rows), dtype=bool)
    for name in {MASK, LATENT_MASK} & {*rows.column_names}:
        column = rows.select_columns([name]).with_format("arrow")[:][name]
        parts = [column] if name == LATENT_MASK else [pc.struct_field(column, part) for part in ("bytes", "path")]
        for part in parts:
            have |= pc.fill_null(pc.binary_length(part), 0).to_numpy() > 0
    return have


def _is_transparent(row: dict[str, Any], config: DataSettings) -> bool:
    """Whether a row's picture is its mask by its opacity."""
    if not config.mask_from_alpha or config.image_column not in row:
        return False
    try:
        return open_alpha(row[config.image_column], max_megapixels=config.max_image_megapixels) is not None
    except ImageError:  # told when the picture is read
        return False
