"""Turn flags and recipe files into a Recipe, and a Recipe back into a file.

Precedence: defaults < the `--config` file < the `--dataset_config` file < flags. Imports no torch, so that a mistake is
reported at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml
from pydantic import ValidationError

from sd_recipes.errors import RecipeError, nearest, one_line
from sd_recipes.kohya import read_dataset_config
from sd_recipes.other_trainers import answers, keys_of
from sd_recipes.reading import StrangeFile, open_regular, read_text
from sd_recipes.recipe import OF_ONE_SOURCE, ONLY_IN_FILES, SECTIONS, Recipe, Section, heading
from sd_recipes.redaction import LEFT_OUT, in_texts, redacted, without_folders

logger = logging.getLogger(__name__)

SHIPPED_RECIPES = Path(__file__).parent / "recipes"
MAX_RECIPE_BYTES = 2**20


class RecipeLoader(yaml.SafeLoader):
    """YAML that refuses duplicate keys; PyYAML silently keeps the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value} is on line {lines[key.value]} and again on line {line}: drop one"
                )
            lines[key.value] = line
        return node


@dataclass(frozen=True)
class Command:
    """The head of a command's `--help`: how it is called, what it does, and examples."""

    prog: str
    description: str
    examples: str


SCRIPT = Command(
    "train_text_to_image.py",
    "Fine-tune, or train from scratch, a Stable Diffusion text-to-image model.",
    """
    accelerate launch --quiet train_text_to_image.py --config quickstart
    accelerate launch --quiet train_text_to_image.py --train_data_dir my_pictures \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5
""",
)


def load_recipe(argv: list[str] | None = None, command: Command = SCRIPT) -> Recipe:
    """Recipe from defaults, then the `--config` file and the `--dataset_config` file, then the flags in `argv`.

    `argv` is sys.argv[1:] if not given. Raises RecipeError for an unknown flag or key (with the nearest name), a value
    of the wrong type or out of range, and settings that contradict each other.
    """
    flags = parse_flags(sys.argv[1:] if argv is None else argv, build_parser(command=command))
    settings, places = read_files(flags)
    return build_recipe({**settings, **flags}, places)


def read_files(flags: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings in the files that `flags` name, and how messages name the place of each.

    Takes `dataset_config` out of the flags: what the file stands for are settings like any others. Warns of its keys
    that have no counterpart. Raises RecipeError.
    """
    settings = read_recipe_file(flags["config"]) if flags.get("config") else {}
    places = {name: f"key {name} of the recipe file" for name in settings}
    file = flags.pop("dataset_config", settings.pop("dataset_config", None))
    if file is None:
        return settings, places
    if not isinstance(file, str):
        raise RecipeError(f"{places['dataset_config']}: give the path of kohya's file (it is {file!r})")
    for name in ("dataset_name", "train_data_dir"):
        if flags.get(name) is not None:
            raise RecipeError(f"--dataset_config {file} says which data to use, which --{name} contradicts: drop one")
    if settings.get("data_sources"):
        raise RecipeError(f"--dataset_config {file} contradicts data_sources of --config {flags['config']}: drop one")
    mapped, lines = read_dataset_config(file, flags)
    for line in lines:
        logger.warning("--dataset_config %s: %s", file, line)
    settings = {name: value for name, value in settings.items() if name not in OF_ONE_SOURCE}
    return settings | mapped, places | {name: f"--dataset_config {file}: {name}" for name in mapped}


def build_recipe(settings: dict[str, Any], places: dict[str, str] | None = None) -> Recipe:
    """Recipe from a mapping of settings; a mistake is blamed on the setting's flag, or on what `places` names."""
    try:
        return Recipe(**settings)
    except ValidationError as error:
        raise RecipeError("; ".join(explain(problem, places or {}) for problem in error.errors())) from None


def explain(problem: Any, places: dict[str, str]) -> str:
    """One of a ValidationError's errors in words, with the flag's name or that in `places`."""
    words = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return words
    name = str(problem["loc"][0])
    return f"{places.get(name, f'--{name}')}: {words[0].lower()}{words[1:]} (it is {problem['input']!r})"


def read_recipe_file(name: str) -> dict[str, Any]:
    """Settings in a YAML recipe, given by its path or by the name of a shipped one. Raises RecipeError."""
    path = Path(name)
    if not path.is_file():
        path = SHIPPED_RECIPES / f"{name}.yaml"
    if not path.is_file():
        shipped = sorted(recipe.stem for recipe in SHIPPED_RECIPES.glob("*.yaml"))
        raise RecipeError(f"--config {name}: neither a file nor a shipped recipe{nearest(name, shipped)}: {shipped}")
    try:
        # It may be a symbolic link, which read_text does not follow.
        settings = yaml.load(read_text(path.resolve(), MAX_RECIPE_BYTES), RecipeLoader) or {}
    except (OSError, StrangeFile, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(f"--config {path}: {one_line(error)}") from None
    if not isinstance(settings, dict):
        raise RecipeError(f"--config {path}: a recipe is a list of `key: value` lines, not a {type(settings).__name__}")
    unknown = [key for key in keys_of(settings) if key not in Recipe.model_fields]
    if unknown:
        elsewhere = answers(unknown, settings, [f"--{name}" for name in Recipe.model_fields])
        words = elsewhere or f"unknown key {unknown[0]!r}{nearest(unknown[0], Recipe.model_fields)}"
        raise RecipeError(f"--config {path}: {words}")
    settings.pop("config", None)
    return settings


# What a resolved recipe leaves out: how this run was started, and what a repetition must not do again.
NOT_OF_THE_RUN = {
    "config", "dataset_config", "dry_run", "hub_token", "local_rank", "use_8bit_adam", "compile_unet", "rank",
    "pretrained_vae_model_name_or_path", "proportion_empty_prompts",
    "resume_from_checkpoint", "overwrite", "push_to_hub",
}  # fmt: skip


RESOLVED = "# Resolved recipe. Run it again with --config and this file.\n"  # the first line of such a file


def is_resolved_recipe(path: Path) -> bool:
    """Whether a run wrote that file."""
    try:
        with open_regular(path) as file:
            return file.read(len(RESOLVED)) == RESOLVED.encode()
    except (OSError, StrangeFile):
        return False


def written_settings(recipe: Recipe) -> dict[str, Any]:
    """The run's settings as they are written to files: without secrets."""
    settings: dict[str, Any] = in_texts(redacted, recipe.model_dump(mode="json", exclude=NOT_OF_THE_RUN))
    return settings


def recipe_text(recipe: Recipe, *, shared: bool = False) -> str:
    """The resolved recipe as YAML; `--config` with this file repeats the run.

    Secrets are left out and, in a file to be `shared`, the folders of paths. The file says so.
    """
    settings = written_settings(recipe)
    if not recipe.data_sources:
        settings.pop("data_sources")
    lines = [RESOLVED]
    if secret := [name for name, value in settings.items() if LEFT_OUT in str(value)]:
        ways = [f"--{name}" if name not in ONLY_IN_FILES else f"{name} in a copy of this file" for name in secret]
        lines.append(f"# {LEFT_OUT} stands for what looks like a secret. Set again: {', '.join(ways)}.\n")
    if shared:
        settings = in_texts(without_folders, settings)
        lines.append("# Only the last part of each path is kept: fill in your own paths.\n")
    for section in SECTIONS:
        names = [name for name in section.model_fields if name in settings]
        lines.append(f"\n# {section.__doc__}\n")
        lines.append(yaml.safe_dump({name: settings[name] for name in names}, sort_keys=False, allow_unicode=True))
    return "".join(lines)


class Parser(argparse.ArgumentParser):
    """One flag per field, one group per section, with the field's help and default. `--help GROUP` shows one group."""

    def __init__(self, sections: Sequence[type[Section]], **options: Any) -> None:
        super().__init__(
            **options,
            add_help=False,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.sections = {heading(section)[0].lower(): section for section in sections}
        self.flags: list[str] = []
        for section in sections:
            self._add_section(section)

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message)

    def show_help(self, name: str) -> None:
        """Print all groups, or the one of that name. Raises RecipeError."""
        if not name:
            self.print_help()
            return
        section = self.sections.get(name.lower())
        if section is None:
            raise RecipeError(
                f"--help {name}: no such group of flags{nearest(name.lower(), self.sections)}: {list(self.sections)}"
            )
        Parser([section], usage=argparse.SUPPRESS).print_help()

    def _add_section(self, section: type[Section]) -> None:
        group = self.add_argument_group(*heading(section))
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
            self.flags += group.add_argument(f"--{name}", **options).option_strings


class _Help(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.show_help(" ".join(values))
        parser.exit()


def build_parser(sections: Sequence[type[Section]] = SECTIONS, command: Command = SCRIPT) -> Parser:
    """The flags of `sections`, and `--help`."""
    parser = Parser(
        sections,
        prog=command.prog,
        usage=f"{command.prog} [--config RECIPE] [--FLAG VALUE ...]",
        description=f"{command.description}\n{command.examples}\n"
        "`--help GROUP` shows only one group of flags, such as --help images.",
    )
    help_flags = parser.add_argument("-h", "--help", action=_Help, nargs="*", help=argparse.SUPPRESS)
    parser.flags += help_flags.option_strings
    return parser


def _flag_kind(annotation: Any) -> tuple[type, list[str] | None, bool]:
    """Of a field's annotation: Python type, choices, and whether it takes several values."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        annotation = parts[0] if len(parts) == 1 else str  # a number or a word: the section tells which
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is Literal:
        return str, list(typing.get_args(annotation)), False
    if typing.get_origin(annotation) in (list, dict):  # a mapping as NAME=VALUE, which its section reads
        return str, None, True
    return annotation, None, False


def parse_flags(argv: list[str], parser: Parser) -> dict[str, Any]:
    """The flags that were given, by name. Raises RecipeError for an unknown one, with the nearest name.

    Or with what another trainer's flags are here, all of them at once.
    """
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        names = (word.split("=")[0].removeprefix("--") for word in unknown if word.startswith("--"))
        if elsewhere := answers(names, vars(flags), parser.flags, "--"):
            raise RecipeError(elsewhere)
        name = unknown[0].split("=")[0]
        raise RecipeError(f"unknown flag {name}{nearest(name, parser.flags)}; --help lists all")
    return vars(flags)


def recipe_schema() -> str:
    """JSON schema of a recipe file, for completion and checks in editors."""
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"
