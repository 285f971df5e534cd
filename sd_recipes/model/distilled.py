"""Models that were taught by another one to draw in a few steps, which training would undo.

Most have the tensors of any other model, so that only their name tells, or the sampler that came with them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

LCM = "a latent consistency model (LCM)"
KINDS = {
    "turbo": "a Turbo model",
    "lightning": "a Lightning model",
    "lcm": LCM,
    "hyper[-_ ]?sd": "a Hyper-SD model",
    "dmd2?": "a DMD model",
}  # by words in names
SAMPLERS = ("LCMScheduler", "TCDScheduler")
TITLES = ("modelspec.title", "modelspec.architecture")  # metadata that name a model
OF_A_RUN = ("base_model", "recipe")  # metadata of what was exported from a run
IN_HUB_CACHE = re.compile(r"models--(?:.+--)?([^/]+)/snapshots/[^/]+$")


def kind_by_name(name: str) -> str | None:
    """The kind of distilled model that a name speaks of, in words."""
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).lower()
    found = (
        words for word, words in KINDS.items() if re.search(rf"((?<![a-z])(sd)?|(?<=xl)){word}(xl)?(?![a-z])", plain)
    )
    return next(found, None)


def distilled(
    path: Path,
    otherwise: str,
    *,
    sampler: object = None,
    metadata: Mapping[str, str] = MappingProxyType({}),
    of_run: bool = False,
) -> str | None:
    """How a model is known to be distilled, and what to do, `otherwise` if only its name says so; None if it is not.

    `path` is that of its folder or file, or its Hub id. A run of our own is what it was trained to be, whatever its
    name.
    """
    if sampler in SAMPLERS:
        return _refusal(
            f"by its sampler, {sampler}, {LCM}", "if it is none, set another _class_name in its scheduler_config.json"
        )
    if of_run or metadata.keys() >= set(OF_A_RUN):
        return None
    for key in TITLES:
        if words := kind_by_name(metadata.get(key, "")):
            file = path.with_name("another_name.safetensors")
            old, new = shlex.quote(str(path)), shlex.quote(str(file))
            anew = f"write it anew with `sd-recipes export {old} --to single_file --output {new}`"
            return _refusal(f"by its {key} {words}", f"if it is none, {anew}")
    in_cache = IN_HUB_CACHE.search(path.as_posix())
    words = kind_by_name(in_cache[1] if in_cache else path.name)
    return words and _refusal(f"by its name {words}", f"if it is none, {otherwise}")


def _refusal(known: str, otherwise: str) -> str:
    return (
        f"{known}, distilled to draw in a few steps: training would undo that: choose the model that it was made from, "
        f"or, {otherwise}"
    )
