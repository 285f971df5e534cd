"""An optimizer's state by the names of its parameters, so that it goes on in another order or in other groups."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.distributed.tensor import DTensor

from sd_recipes.runtime.fsdp import shard_like

# Of the state of each parameter: what its group counts and estimates. All parameters of a group have the same.
OF_GROUP = "param_groups"
# Of any group: what the run gives it, and torch's schedules.
GIVEN = {"params", "param_names", "lr", "initial_lr"}

State = dict[str, dict[str, Any]]  # by parameter, then by key


def bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, without accelerate's wrapper."""
    found: torch.optim.Optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return found


def constructors(kind: type) -> Iterator[list[inspect.Parameter]]:
    """What the constructor of an optimizer's class takes, and then those of its bases."""
    for base in kind.__mro__:
        if base not in (torch.optim.Optimizer, object) and "__init__" in vars(base):
            _, *taken = inspect.signature(vars(base)["__init__"]).parameters.values()
            yield taken


def running_values(optimizer: Any) -> list[dict[str, Any]]:
    """What each group holds besides its settings: what the optimizer counts and estimates, such as Prodigy's d."""
    optimizer = bare(optimizer)
    settings = {each.name for taken in constructors(type(optimizer)) for each in taken} | GIVEN
    return [{key: value for key, value in group.items() if key not in settings} for group in optimizer.param_groups]


def effective_rate(optimizer: Any) -> float | None:
    """The learning rate that an optimizer has found, times its own, of the first group; None if it finds none."""
    estimate = running_values(optimizer)[0].get("d")
    return None if estimate is None else float(estimate) * float(optimizer.param_groups[0]["lr"])


def state_by_name(optimizer: Any, names: Sequence[str]) -> State:
    """The state of each parameter; `names` are in the order of its groups, as torch counts them."""
    by_number = optimizer.state_dict()["state"]
    state: State = {name: dict(by_number[number]) for number, name in enumerate(names) if number in by_number}
    rest = iter(names)
    for group, values in zip(optimizer.param_groups, running_values(optimizer), strict=True):
        for _, name in zip(group["params"], rest, strict=False):
            if values:
                state.setdefault(name, {})[OF_GROUP] = values
    return state


def load_by_name(optimizer: Any, parameters: Mapping[str, torch.Tensor], saved: State) -> None:
    """Restore what `state_by_name` returned, with whole tensors, for the parameters that are there.

    They are in the order of the optimizer's groups. A group counts on from where that of its first parameter stood.
    Learning rate, decay and the like stay those of this run, whose settings may have changed.
    """
    own = {
        name: {key: value for key, value in saved[name].items() if key != OF_GROUP} if name in saved else {}
        for name in parameters
    }
    groups = optimizer.state_dict()["param_groups"]
    names = list(parameters)
    for group in groups:
        of_group = [names[number] for number in group["params"]]
        group |= next((saved[name][OF_GROUP] for name in of_group if OF_GROUP in saved.get(name, {})), {})
    state = {
        number: _laid_out_as(parameter, own[name])
        for number, (name, parameter) in enumerate(parameters.items())
        if own[name]
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _laid_out_as(parameter: torch.Tensor, value: Any) -> Any:
    """Shard tensors of the parameter's shape like it, or give them its memory format; in mappings too."""
    if isinstance(value, Mapping):
        return {key: _laid_out_as(parameter, each) for key, each in value.items()}
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    if isinstance(parameter, DTensor):
        return shard_like(parameter, value)
    # Fused optimizers walk the raw memory.
    return torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)


# Flattened to one level: PART/PARAMETER/KEY, where a key's value may itself be a mapping.


def flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def unflat(flattened: Mapping[str, Any]) -> State:
    state: State = {}
    for name, value in flattened.items():
        part, parameter, *parents, key = name.split("/")
        place = state.setdefault(f"{part}/{parameter}", {})
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    return state
