"""Which file may import which: the way of the data, without a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "sd_recipes"
# From the ground up; a file imports what stands on its own floor or below. What training is made of stands under
# what judges and saves it, and both stand under the loop that uses all of them.
FLOORS = [
    ["__init__"],
    ["errors", "assets", "redaction", "reading", "sizes", "writing"],
    ["optimizers"],
    ["recipe", "kohya", "other_trainers"],
    ["flags"],
    ["runtime"],
    ["data"],
    ["model"],
    [
        "training.adafactor",
        "training.bf16_weights",
        "training.eight_bit",
        "training.fused_backward",
        "training.host_average",
        "training.objective",
        "training.optim",
        "training.optimizer_check",
        "training.optimizer_classes",
        "training.optimizer_state",
        "training.param_groups",
        "training.prodigy",
        "training.profiles",
        "training.quiet_loss",
        "training.rates",
        "training.row_losses",
        "training.schedule_free",
        "training.ema",
        "training.state",
        "training.timestep_errors",
        "training.uncertainty",
    ],
    ["evaluation"],
    ["checkpoints"],
    ["export"],
    ["training"],
    ["memory"],
    ["inspection"],
    ["commands"],
]


def modules() -> dict[str, Path]:
    """Dotted name without `sd_recipes.` to file; a package's is that of its __init__."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """What a file imports of the project, also within functions and for types: names of modules or of their members."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph() -> dict[str, set[str]]:
    known = modules()
    arrows: dict[str, set[str]] = {}
    for name, path in known.items():
        arrows[name] = set()
        for imported in imports(path):
            if imported == "sd_recipes" or not imported.startswith("sd_recipes."):
                continue
            target = imported.removeprefix("sd_recipes.")
            target = target if target in known else target.rpartition(".")[0] or "__init__"
            assert target in known, f"{name} imports {imported}, which is not there"
            arrows[name].add(target)
    return arrows


def floor(name: str) -> int:
    """The most exact entry that names the file or its room."""
    candidates = [
        (len(entry), number)
        for number, entries in enumerate(FLOORS)
        for entry in entries
        if name == entry or name.startswith(f"{entry}.")
    ]
    assert candidates, f"sd_recipes/{name} is in no room that FLOORS names"
    return max(candidates)[1]


def test_every_floor_names_a_file_or_a_room() -> None:
    known = modules()
    assert [entry for entries in FLOORS for entry in entries if entry not in known] == []


def test_no_file_imports_what_stands_above_it() -> None:
    upward = [
        f"{name} -> {target}" for name, targets in graph().items() for target in targets if floor(target) > floor(name)
    ]
    assert upward == []


def test_there_is_no_circle() -> None:
    TopologicalSorter(graph()).prepare()  # raises CycleError, which names one


def test_the_package_does_not_import_the_script() -> None:
    roots = {path.stem for path in ROOT.glob("*.py")}
    assert roots == {"train_text_to_image"}
    assert [name for name, path in modules().items() for each in imports(path) if each.split(".")[0] in roots] == []


def test_the_recipe_is_answered_without_torch() -> None:
    """Every file up to `flags` imports the standard library, pydantic and yaml at most."""
    heavy = {"torch", "diffusers", "transformers", "datasets", "accelerate", "numpy"}
    for name, path in modules().items():
        if floor(name) <= floor("flags"):
            assert heavy.isdisjoint(each.split(".")[0] for each in imports(path)), name
