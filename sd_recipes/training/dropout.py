"""Dropout, drawn anew at every step from the seed, so that a resumed run needs no generator state."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sd_recipes.data.draws import DROPOUT, generator


def has_dropout(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether a training step of these models draws: in layers of dropout, or in CLIP's attention."""
    return any(_share_dropped(layer) > 0 for module in modules for layer in module.modules())


def _share_dropped(layer: torch.nn.Module) -> float:
    share = layer.p if isinstance(layer, torch.nn.Dropout) else vars(layer).get("dropout")
    return share if isinstance(share, float) else 0.0


def seed_dropout(seed: int, position: int, process: int) -> None:
    """Let torch draw what belongs to a process's share of the step that begins at this number of samples seen."""
    torch.manual_seed(int(generator(seed, position, DROPOUT, part=process).integers(2**63)))
