"""Whether what a run needs from the Hub can be had, asked once and before anything is loaded.

The libraries ask an unreachable Hub again and again, for half a minute to several, and end with messages about files
that a repository lacks. Imports no torch.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_recipes import assets
from sd_recipes.errors import RecipeError, one_line
from sd_recipes.runtime.launcher import hf_home

SECONDS = 10.0  # to connect, and for the answer
# What huggingface_hub reads, besides its own name for it.
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
DEFAULT = "the default"
PROXY_VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy")


@dataclass(frozen=True)
class Wanted:
    """A repository on the Hub that a recipe names."""

    flag: str
    name: str
    kind: str  # model or dataset

    @property
    def words(self) -> str:
        return f"{self.flag} {self.name} is no {'folder' if self.kind == 'model' else 'file or folder'} here"


def check_hub_access(recipe: Any) -> None:
    """Of a recipe, or an inspection's settings.

    Raises RecipeError if a repository is in no cache and the Hub is not reached, or a cache cannot be made.
    """
    missing = [wanted for wanted in wanted_of(recipe) if not is_cached(wanted, recipe.cache_dir)]
    if missing:
        check_reached(missing[0], recipe.cache_dir)
    if any(wanted.kind == "model" for wanted in missing):
        check_cache(*hub_cache(recipe.cache_dir))
    if any(source.dataset_name for source in recipe.sources) and not recipe.streaming:
        check_cache(*datasets_cache(recipe.cache_dir))


def wanted_of(recipe: Any) -> Iterator[Wanted]:
    """The repositories that a recipe names: what is neither here nor part of the package, and may be one's name."""
    named = [
        ("--pretrained_model_name_or_path", recipe.pretrained_model_name_or_path, "model"),
        ("--vae", recipe.vae, "model"),
        ("--base", recipe.base, "model"),
        ("--validation_clip_model", getattr(recipe, "validation_clip_model", None), "model"),
        *(("--dataset_name", source.dataset_name, "dataset") for source in recipe.sources),
    ]
    for flag, name, kind in named:
        # A data set's name without an owner may be one of a format, such as imagefolder.
        pattern = r"\w[\w.-]*(/[\w.-]+)?" if kind == "model" else r"\w[\w.-]*/[\w.-]+"
        if name is not None and name not in assets.ASSETS and re.fullmatch(pattern, name) and not Path(name).exists():
            yield Wanted(flag, name, kind)


def is_cached(wanted: Wanted, cache_dir: str | None) -> bool:
    """Whether something of the repository is in the cache, so that it may do without the Hub."""
    from huggingface_hub.file_download import repo_folder_name

    folders = [hub_cache(cache_dir)[0] / repo_folder_name(repo_id=wanted.name, repo_type=wanted.kind) / "snapshots"]
    if wanted.kind == "dataset":  # prepared by `datasets`
        folders.append(datasets_cache(cache_dir)[0] / wanted.name.replace("/", "___").lower())
        folders.append(datasets_cache(cache_dir)[0] / wanted.name.replace("/", "___"))
    return any(folder.is_dir() and any(folder.iterdir()) for folder in folders)


def check_reached(wanted: Wanted, cache_dir: str | None) -> None:
    """Raises RecipeError if the run is offline, or the Hub gives no answer, or is out of order."""
    from huggingface_hub import constants, get_session

    cache = hub_cache(cache_dir)[0] if wanted.kind == "model" else datasets_cache(cache_dir)[0]
    words = f"{wanted.words} and not in the cache {cache}"
    if constants.HF_HUB_OFFLINE:
        variable = next((name for name in OFFLINE_VARIABLES if os.environ.get(name)), OFFLINE_VARIABLES[0])
        kind = "" if wanted.kind == "model" else " --repo-type dataset"
        raise RecipeError(
            f"{words}, and {variable} keeps this run offline: unset it, or first fetch it where there is a network, by "
            f"`hf download {wanted.name}{kind}`"
        )
    hub = f"the Hub at {constants.ENDPOINT}"
    ways = ["check the network"]
    if os.environ.get("HF_ENDPOINT"):
        hub += ", which HF_ENDPOINT names,"
        ways = ["check HF_ENDPOINT and the network"]
    if proxy := next((name for name in PROXY_VARIABLES if os.environ.get(name)), None):
        ways.append(f"and the proxy in {proxy}")
    way_out = f"{' '.join(ways)}, or give a folder of this machine"
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=SECONDS, follow_redirects=False)
    # Of whatever library the Hub's client uses, which has changed: all are about the address, the network or its proxy.
    except Exception as error:
        raise RecipeError(f"{hub} cannot be reached ({one_line(error, 150)}), and {words}: {way_out}") from error
    if answer.status_code >= 500:
        raise RecipeError(f"{hub} is out of order (it answers {answer.status_code}), and {words}: try again later")


def hub_cache(cache_dir: str | None) -> tuple[Path, str]:
    """Where downloads are kept, and who says so."""
    from huggingface_hub import constants

    if cache_dir:
        return Path(cache_dir).expanduser(), "--cache_dir"
    return Path(constants.HF_HUB_CACHE), _variable("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME")


def datasets_cache(cache_dir: str | None) -> tuple[Path, str]:
    """Where `datasets` keeps the rows that it has prepared, and who says so."""
    if cache_dir:
        return Path(cache_dir).expanduser(), "--cache_dir"
    folder = os.environ.get("HF_DATASETS_CACHE") or hf_home() / "datasets"
    return Path(folder).expanduser(), _variable("HF_DATASETS_CACHE", "HF_HOME")


def check_cache(folder: Path, named_by: str) -> None:
    """Raises RecipeError if a cache cannot be made or written; one that has something and is read-only may do."""
    try:
        if folder.is_dir() and any(folder.iterdir()) and not os.access(folder, os.W_OK):
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecipeError(
            f"the cache {folder} ({named_by}) cannot be written ({error.strerror}): choose another folder with "
            f"{'--cache_dir' if named_by in ('--cache_dir', DEFAULT) else f'{named_by} or --cache_dir'}"
        ) from None


def _variable(*names: str) -> str:
    return next((name for name in names if os.environ.get(name)), DEFAULT)
