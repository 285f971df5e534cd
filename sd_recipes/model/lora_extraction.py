"""The LoRA that comes closest to what fine-tuning has changed: a truncated SVD of each layer's change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm

from sd_recipes.errors import RecipeError
from sd_recipes.model.lora_files import Lora, LoraLayer

OVERSAMPLING, ITERATIONS = 16, 4  # of the randomised SVD (Halko et al. 2011), with which it is exact to rounding
CHANGED = (torch.nn.Linear, torch.nn.Conv2d)  # layers that a LoRA's file can change
# A layer that diffusers (0.42) reads by its own keys only: with it, it refuses a file in kohya's.
NOT_IN_KOHYA = ("text_projection.weight",)


@dataclass(frozen=True)
class Extracted:
    """A LoRA, and the share of the squared change of all weights that it makes."""

    lora: Lora
    explained: float


@torch.no_grad()
def extract_lora(
    tuned: Mapping[str, torch.nn.Module], original: Mapping[str, torch.nn.Module], rank: int, *, kohya: bool
) -> Extracted:
    """The LoRA of that rank between two models, by part. A layer that is smaller than the rank is changed exactly.

    For a file in kohya's keys it leaves out what diffusers would not read there.

    Raises RecipeError if the models differ in shape or in nothing, or if no layer is as large as the rank.
    """
    changes = {part: _changes(part, tuned[part], original[part]) for part in tuned}
    layers = {
        (part, name.removesuffix(".weight")): change
        for part, of_part in changes.items()
        for name, change in of_part.items()
        if isinstance(tuned[part].get_submodule(name.rpartition(".")[0]), CHANGED)
        and name.endswith(".weight")
        and not (kohya and name in NOT_IN_KOHYA)
    }
    if not layers:
        raise RecipeError("no layer differs between the two models: there is nothing to extract")
    largest = max(min(change.flatten(1).shape) for change in layers.values())
    if rank > largest:
        raise RecipeError(f"--rank {rank} is over the size of every layer that differs: give at most {largest}")
    lora: dict[str, dict[str, LoraLayer]] = {}
    kept = 0.0
    for (part, module), change in tqdm(layers.items(), desc="Extracting", unit="layer", leave=False):
        layer, size = _truncated(change, rank)
        lora.setdefault(part, {})[module] = layer
        kept += size
    total = sum(float(change.double().square().sum()) for of_part in changes.values() for change in of_part.values())
    return Extracted(lora, kept / total)


def _changes(part: str, tuned: torch.nn.Module, original: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What differs, by name. Raises RecipeError."""
    before, after = original.state_dict(), tuned.state_dict()
    unlike = [name for name in before.keys() | after.keys() if _shape(before, name) != _shape(after, name)]
    if unlike:
        raise RecipeError(
            f"the two models' {part} are of different shapes ({len(unlike)} tensors differ, such as {min(unlike)}): "
            "name the model that the first one was made from with --tuned_from"
        )
    changes = {name: after[name].float() - before[name].float() for name in after if after[name].is_floating_point()}
    return {name: change for name, change in changes.items() if change.any()}


def _shape(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def _truncated(change: torch.Tensor, rank: int) -> tuple[LoraLayer, float]:
    """The layer whose change is nearest, and the squared size of that change."""
    matrix = change.flatten(1)
    if min(matrix.shape) <= rank + OVERSAMPLING:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same file each time
            u, s, v = torch.svd_lowrank(matrix, q=rank + OVERSAMPLING, niter=ITERATIONS)
        vh = v.T
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    up, down = u * s.sqrt(), s.sqrt()[:, None] * vh
    layer = LoraLayer(
        down=down.reshape(-1, *change.shape[1:]),
        up=up.reshape(*up.shape, *[1] * (change.ndim - 2)),
        alpha=float(len(down)),
    )
    return layer.with_alpha(float(rank)), float(s.double().square().sum())
