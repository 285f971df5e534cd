"""The embedded default: a data set and models that come with the package, as `sd-recipes/NAME`,
and what models in one file lack."""

from pathlib import Path

FOLDER = Path(__file__).parent
ASSETS = {
    "sd-recipes/emoji": FOLDER / "emoji",
    "sd-recipes/tiny-emoji": FOLDER / "tiny-emoji",
    "sd-recipes/tiny-clip": FOLDER / "tiny-clip",
}
# What models in one file do not hold: CLIP's tokenizer, and the configurations of Stable Diffusion 1 and 2.
CLIP_TOKENIZER = FOLDER / "clip-tokenizer"
CONFIGURATIONS = {1: FOLDER / "stable-diffusion-1", 2: FOLDER / "stable-diffusion-2"}


def resolve(name: str) -> str:
    """Folder of an embedded asset; any other name, a path or a Hub id, as it is."""
    return str(ASSETS.get(name, name))
