"""Flags and recipe files to a Recipe, and back to a file.

Defaults < the file of `--config` < flags. Imports no torch: a mistake is answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml
from pydantic import ValidationError

from sd_recipes.recipe import ONLY_IN_FILES, SECTIONS, Recipe, RecipeError, Section
from sd_recipes.redaction import LEFT_OUT, in_texts, redacted, without_folders

SHIPPED_RECIPES = Path(__file__).parent / "recipes"


def load_recipe(argv: list[str] | None = None) -> Recipe:
    """Recipe from defaults, then the `--config` file, then the flags in `argv` (default: sys.argv[1:]).

    Raises RecipeError for an unknown flag or key (with the nearest name), a value of the wrong type
    or out of range, and settings that contradict each other.
    """
    flags = parse_flags(sys.argv[1:] if argv is None else argv)
    settings = read_recipe_file(flags["config"]) if flags.get("config") else {}
    return build_recipe({**settings, **flags}, settings)


def build_recipe(settings: dict[str, Any], from_file: dict[str, Any] | None = None) -> Recipe:
    """Recipe from a mapping of settings, of which those in `from_file` are blamed on the file."""
    try:
        return Recipe(**settings)
    except ValidationError as error:
        raise RecipeError("; ".join(_explain(problem, from_file or {}) for problem in error.errors())) from None


def _explain(problem: Any, from_file: dict[str, Any]) -> str:
    if not problem["loc"]:
        return problem["msg"].removeprefix("Value error, ")
    name = str(problem["loc"][0])
    place = f"key {name} of the recipe file" if name in from_file else f"--{name}"
    words = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {words[0].lower()}{words[1:]} (it is {problem['input']!r})"


def read_recipe_file(name: str) -> dict[str, Any]:
    """Settings in a YAML recipe: a path, or the name of a shipped recipe. Raises RecipeError."""
    path = Path(name)
    if not path.is_file():
        path = SHIPPED_RECIPES / f"{name}.yaml"
    if not path.is_file():
        shipped = sorted(recipe.stem for recipe in SHIPPED_RECIPES.glob("*.yaml"))
        raise RecipeError(f"--config {name}: no such file, nor a shipped recipe{_nearest(name, shipped)}: {shipped}")
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise RecipeError(f"--config {path}: a recipe is a list of `key: value` lines, not a {type(settings).__name__}")
    for key in settings:
        if key not in Recipe.model_fields:
            raise RecipeError(f"--config {path}: unknown key {key!r}{_nearest(str(key), Recipe.model_fields)}")
    settings.pop("config", None)
    return settings


# What a file of the resolved recipe leaves out: how this call was made, and what a repetition must not do again.
NOT_OF_THE_RUN = {
    "config", "dry_run", "hub_token", "local_rank", "use_8bit_adam", "resume_from_checkpoint", "overwrite",
    "push_to_hub",
}  # fmt: skip


RESOLVED = "# Resolved recipe. Run it again with --config and this file.\n"  # the first line of such a file


def is_resolved_recipe(path: Path) -> bool:
    """Whether a run wrote that file."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline() == RESOLVED
    except OSError:
        return False


def written_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of the run as they may be written down: without secrets."""
    settings: dict[str, Any] = in_texts(redacted, recipe.model_dump(mode="json", exclude=NOT_OF_THE_RUN))
    return settings


def recipe_text(recipe: Recipe, *, shared: bool = False) -> str:
    """The resolved recipe as YAML; `--config` with a file of it gives the same run again.

    Secrets are left out and, of a file that is `shared`, the folders of paths. The file says so.
    """
    settings = written_settings(recipe)
    if not recipe.data_sources:
        settings.pop("data_sources")
    lines = [RESOLVED]
    if secret := [name for name, value in settings.items() if LEFT_OUT in str(value)]:
        ways = [f"--{name}" if name not in ONLY_IN_FILES else f"{name} in a copy of this file" for name in secret]
        lines.append(f"# {LEFT_OUT} stands for what looks like a secret. Give anew: {', '.join(ways)}.\n")
    if shared:
        settings = in_texts(without_folders, settings)
        lines.append("# Of paths the last part is left: give those that are yours.\n")
    for section in SECTIONS:
        names = [name for name in section.model_fields if name in settings]
        lines.append(f"\n# {section.__doc__}\n")
        lines.append(yaml.safe_dump({name: settings[name] for name in names}, sort_keys=False, allow_unicode=True))
    return "".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(message)


def build_parser(
    sections: Sequence[type[Section]] = SECTIONS,
    prog: str = "train_text_to_image.py",
    description: str = "Fine-tune, or train from scratch, a Stable Diffusion text-to-image model.",
) -> argparse.ArgumentParser:
    """One flag a field, grouped by section, with the field's help and default."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for section in sections:
        group = parser.add_argument_group((section.__doc__ or "").rstrip("."))
        for name, field in section.model_fields.items():
            if name in ONLY_IN_FILES:
                continue
            default = "" if field.default is None else f" [{field.default}]"
            options: dict[str, Any] = {"help": f"{field.description}{default}".replace("%", "%%")}
            kind, choices, is_list = _flag_kind(field.annotation)
            if kind is bool:
                options |= {"action": argparse.BooleanOptionalAction}
            else:
                options |= {
                    "type": kind,
                    "choices": choices,
                    "metavar": None if choices else name.split("_")[-1].upper(),
                }
                if is_list:
                    options["nargs"] = "+"
            group.add_argument(f"--{name}", **options)
    return parser


def _flag_kind(annotation: Any) -> tuple[type, list[str] | None, bool]:
    """Python type, choices and whether several values are taken, of a field's annotation."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is Literal:
        return str, list(typing.get_args(annotation)), False
    if typing.get_origin(annotation) is list:
        return str, None, True
    return annotation, None, False


def parse_flags(argv: list[str], parser: argparse.ArgumentParser | None = None) -> dict[str, Any]:
    """The flags that were given, by name. Raises RecipeError, with the nearest name of an unknown flag."""
    parser = parser or build_parser()
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        names = [option for action in parser._actions for option in action.option_strings]
        raise RecipeError(f"unknown flag {name}{_nearest(name, names)}; --help lists all")
    return vars(flags)


def _nearest(name: str, names: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""


def recipe_schema() -> str:
    """JSON schema of a recipe file, with which editors complete and check it."""
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"
