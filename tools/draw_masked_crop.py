"""Draw docs/images/masked_crop.png: a picture with its mask, a crop, and the weights of the errors in its latent.

python tools/draw_masked_crop.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from sd_recipes.data.images import fit_image, open_image
from sd_recipes.data.masks import fit_mask, weights_of_masks
from sd_recipes.data.rows import load_rows
from sd_recipes.recipe import DataSettings

TARGET = Path(__file__).parent.parent / "docs" / "images" / "masked_crop.png"
SIDE, LATENT, CROP_U = 64, (4, 16, 16), (0.8, 0.5)
WIDE = (64, 96)  # (height, width) of the picture, of which a square is trained
UNMASKED_WEIGHT = 0.1


def main() -> None:
    config = DataSettings(
        dataset_name="sd-recipes/emoji", resolution=SIDE, masked_loss=True, unmasked_weight=UNMASKED_WEIGHT
    )
    emoji = open_image(load_rows(config)[0]["image"])
    picture = Image.new("RGB", WIDE[::-1], "white")
    picture.paste(emoji, (32, 0))
    # White where there is something.
    mask = Image.fromarray(((np.asarray(picture).min(axis=2) < 250) * 255).astype(np.uint8))
    crop = fit_image(picture, (SIDE, SIDE), interpolation="lanczos", crop_u=CROP_U, flip=False)
    fitted = fit_mask(mask, WIDE, (SIDE, SIDE), LATENT[1:], CROP_U)
    weights = weights_of_masks([fitted], LATENT, config)[0, 0]

    figure, panels = plt.subplots(1, 4, figsize=(10, 2.6), width_ratios=(1.5, 1.5, 1, 1.25), layout="constrained")
    for panel, shown, title in (
        (panels[0], picture, "picture"),
        (panels[1], mask.convert("RGB"), "mask"),
        (panels[2], crop.transpose(1, 2, 0), "crop"),
    ):
        panel.imshow(shown)
        panel.set_title(title)
    drawn = panels[3].imshow(weights, cmap="viridis", vmin=0)
    panels[3].set_title(f"weights, w = {UNMASKED_WEIGHT}")
    figure.colorbar(drawn, ax=panels[3], shrink=0.8)
    for panel in panels:
        panel.set_xticks([])
        panel.set_yticks([])
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()
