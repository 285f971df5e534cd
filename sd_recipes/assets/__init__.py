"""The embedded default: a data set and models that come with the package, as `sd-recipes/NAME`,
and what models in one file lack."""

from pathlib import Path
from typing import Literal

FOLDER = Path(__file__).parent
ASSETS = {
    "sd-recipes/emoji": FOLDER / "emoji",
    "sd-recipes/tiny-emoji": FOLDER / "tiny-emoji",
    "sd-recipes/tiny-clip": FOLDER / "tiny-clip",
}
Generation = Literal[1, 2, "XL"]  # of Stable Diffusion
# What models in one file do not hold: CLIP's tokenizer, and the configurations of Stable Diffusion 1, 2 and XL.
CLIP_TOKENIZER = FOLDER / "clip-tokenizer"
CONFIGURATIONS: dict[Generation, Path] = {
    1: FOLDER / "stable-diffusion-1",
    2: FOLDER / "stable-diffusion-2",
    "XL": FOLDER / "stable-diffusion-xl",
}


def resolve(name: str) -> str:
    """Folder of an embedded asset; any other name, a path or a Hub id, as it is."""
    return str(ASSETS.get(name, name))
