"""The embedded default: a data set and models that come with the package, as `sd-recipes/NAME`."""

from pathlib import Path

FOLDER = Path(__file__).parent
ASSETS = {
    "sd-recipes/emoji": FOLDER / "emoji",
    "sd-recipes/tiny-emoji": FOLDER / "tiny-emoji",
    "sd-recipes/tiny-clip": FOLDER / "tiny-clip",
}


def resolve(name: str) -> str:
    """Folder of an embedded asset; any other name, a path or a Hub id, as it is."""
    return str(ASSETS.get(name, name))
