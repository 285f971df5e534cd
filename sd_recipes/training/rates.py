"""Learning rates of parameters by their names, and frozen ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from sd_recipes.errors import RecipeError, nearest
from sd_recipes.recipe import ParamGroup
from sd_recipes.training.state import TrainedPart

LONGEST = 4  # components of a name that a pattern is compared with, to name the nearest


def set_rates(parts: Sequence[TrainedPart], groups: Sequence[ParamGroup], factor: float) -> None:
    """Give parameters the rate, times `factor`, of the first group whose pattern matches PART.NAME; 0 freezes them.

    Raises RecipeError for a pattern that is the first to match no name, and if nothing of a part is left to train.
    """
    left = {f"{part.name}.{name}": (part, name) for part in parts for name in part.parameters}
    names = list(left)
    for group in groups:
        flag = f"--param_groups {group.pattern}"
        found = _matching(left, group)
        if not found and _matching(names, group):
            raise RecipeError(f"{flag} matches only what patterns before it do: put it before them, or drop it")
        if not found:
            raise RecipeError(
                f"{flag} matches no parameter{nearest(group.pattern.strip('*.'), _parts(names))}: names are like "
                f"{names[0]} and {names[len(names) // 2]}"
            )
        for each in found:
            part, name = left.pop(each)
            if group.learning_rate == 0:
                part.freeze([name])
            else:
                part.own_rates[name] = group.learning_rate * factor
    for part in parts:
        if not part.parameters:
            raise RecipeError(f"--param_groups freezes all of {part.name}: leave something of it to train")


def matches_in_words(parts: Iterable[TrainedPart], groups: Sequence[ParamGroup]) -> list[str]:
    """What `set_rates` has found of each group, in a line."""
    left = {f"{part.name}.{name}": (part, name) for part in parts for name in part.frozen | part.own_rates.keys()}
    lines = []
    for group in groups:
        found = [left.pop(name) for name in _matching(left, group)]
        number = sum(part.module.get_parameter(name).numel() for part, name in found)
        lines.append(f"{group.pattern}={group.learning_rate:g} has {number:,} in {len(found)} tensors")
    return lines


def _matching(names: Iterable[str], group: ParamGroup) -> list[str]:
    return [name for name in names if fnmatchcase(name, group.pattern)]


def _parts(names: Iterable[str]) -> set[str]:
    """What of the names a pattern may mean: up to LONGEST neighbouring components."""
    found = set()
    for name in names:
        components = name.split(".")
        for first in range(len(components)):
            found |= {".".join(components[first : first + length]) for length in range(1, LONGEST + 1)}
    return {each for each in found if not each.isdecimal()}
