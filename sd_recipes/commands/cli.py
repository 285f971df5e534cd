"""The command line: `sd-recipes` and its commands. `train` is train_text_to_image.py without a checkout."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sd_recipes import __version__
from sd_recipes.flags import SCRIPT, Command, load_recipe
from sd_recipes.recipe import Recipe
from sd_recipes.redaction import redacted
from sd_recipes.runtime.allocator import set_up_allocator
from sd_recipes.runtime.console import has_utf8, mistakes_in_one_line, print_anything, set_up_console, speak_utf8
from sd_recipes.runtime.hub_access import check_hub_access
from sd_recipes.runtime.imports import heavy_imports, import_diffusers
from sd_recipes.runtime.signals import stop_request

logger = logging.getLogger(__name__)

TRAIN = Command(
    "sd-recipes train",
    SCRIPT.description,
    """
    sd-recipes train --config quickstart
    sd-recipes train --train_data_dir my_pictures \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5
""",
)
CACHE = Command(
    "sd-recipes cache",
    "Fill the latent cache before training, with the flags of the run that will read it.",
    """
    sd-recipes cache --config quickstart --cache_latents disk --center_crop
    sd-recipes cache --train_data_dir my_pictures --cache_latents disk --center_crop \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5
""",
)


def main() -> None:
    speak_utf8()
    print_anything()
    parser = argparse.ArgumentParser(
        prog="sd-recipes", description="Train Stable-Diffusion-class text-to-image models."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "train", add_help=False, help="train with flags or a recipe; `sd-recipes train --help` lists them"
    )
    commands.add_parser(
        "inspect", add_help=False, help="look at a data set before training on it; `sd-recipes inspect --help`"
    )
    commands.add_parser(
        "cache", add_help=False, help="fill the latent cache before training, with the flags of `train`"
    )
    commands.add_parser(
        "plan",
        add_help=False,
        help="tell what a run will need of memory, and what fits; `sd-recipes plan --help`",
    )
    commands.add_parser(
        "average", add_help=False, help="make averages of a run's weights after training; `sd-recipes average --help`"
    )
    commands.add_parser(
        "evaluate", add_help=False, help="measure what runs and pipelines have learned; `sd-recipes evaluate --help`"
    )
    commands.add_parser(
        "export", add_help=False, help="write a run or a model as other programs read it; `sd-recipes export --help`"
    )
    commands.add_parser(
        "sample", add_help=False, help="draw pictures with runs, models and LoRAs; `sd-recipes sample --help`"
    )
    commands.add_parser(
        "convert",
        add_help=False,
        help="turn .ckpt and .bin files into safetensors; `sd-recipes convert --help`",
    )
    commands.add_parser(
        "env", add_help=False, help="show versions, hardware and settings, to be pasted into a question"
    )
    commands.add_parser("schema", help="print the JSON schema of a recipe file, for editors")
    arguments, rest = parser.parse_known_args()
    if arguments.command == "schema":
        from sd_recipes.flags import recipe_schema

        sys.stdout.write(recipe_schema())
        return
    COMMANDS[arguments.command](rest)


@contextmanager
def started(argv: list[str] | None, command: Command) -> Iterator[Recipe]:
    """The recipe that `argv` gives to `command`. Within this context signals are noted, and mistakes end in one line.

    What takes seconds to import is imported within it, so that a mistake on the command line is reported at once.
    """
    if argv is None:
        speak_utf8()
    print_anything()
    set_up_allocator()
    with mistakes_in_one_line():
        set_up_console()  # first, since loading a recipe may warn
        recipe = load_recipe(argv, command)
        sys.argv[1:] = map(redacted, sys.argv[1:])  # trackers publish the command line
        if not has_utf8():
            logger.warning(
                "File names are read as %s here, and others may not be found: start Python with PYTHONUTF8=1.",
                sys.getfilesystemencoding(),
            )
        with stop_request.listening():
            check_hub_access(recipe)
            yield recipe


def train(argv: list[str] | None = None, command: Command = SCRIPT) -> None:
    """Train with the flags in `argv` (default: sys.argv[1:]). A mistake ends in one line on stderr and status 2."""
    with started(argv, command) as recipe:
        with heavy_imports():
            import_diffusers()
            from sd_recipes.commands.train import run

        run(recipe)


def cache(argv: list[str]) -> None:
    """Fill the latent cache with the flags in `argv`, which are those of `train`."""
    with started(argv, CACHE) as recipe:
        with heavy_imports():
            import_diffusers()
            from sd_recipes.commands.cache import fill_cache

        fill_cache(recipe)


def inspect(argv: list[str]) -> None:
    """Look at a data set with the flags in `argv`."""
    from sd_recipes.commands.inspect import main

    main(argv)


def plan(argv: list[str]) -> None:
    """Tell what a run will need of memory, with the flags in `argv`, which are those of `train` and a few more."""
    with mistakes_in_one_line():
        set_up_console()  # first, since reading the settings may warn
        from sd_recipes.commands.plan_settings import read_settings

        settings = read_settings(argv)
        check_hub_access(settings.recipe)
        with heavy_imports():
            from sd_recipes.commands.plan import plan

        plan(settings)


def average(argv: list[str]) -> None:
    """Make averages of a run's weights after training, with the folder and flags in `argv`."""
    set_up_allocator()
    with mistakes_in_one_line():
        from sd_recipes.commands.average_settings import read_settings

        config = read_settings(argv)
        set_up_console()
        with stop_request.listening():
            with heavy_imports():
                from sd_recipes.commands.average import average

            average(config)


def evaluate(argv: list[str]) -> None:
    """Measure what runs, checkpoints and pipelines have learned, with the names and flags in `argv`."""
    set_up_allocator()
    with mistakes_in_one_line():
        set_up_console()  # first, since reading the settings may warn
        from sd_recipes.commands.evaluate_settings import read_settings

        config = read_settings(argv)
        with stop_request.listening():
            with heavy_imports():
                from sd_recipes.commands.evaluate import evaluate

            evaluate(config)


def export(argv: list[str]) -> None:
    """Write a run or a model in the form that another program reads, with the name and flags in `argv`."""
    with mistakes_in_one_line():
        set_up_console()
        from sd_recipes.commands.export_settings import read_settings

        config = read_settings(argv)
        with heavy_imports():
            from sd_recipes.commands.export import export

        export(config)


def sample(argv: list[str]) -> None:
    """Draw pictures, with the flags in `argv`."""
    with mistakes_in_one_line():
        set_up_console()
        from sd_recipes.commands.sample_settings import read_settings

        config = read_settings(argv)
        with heavy_imports():
            from sd_recipes.commands.sample import sample

        sample(config)


def convert(argv: list[str]) -> None:
    """Turn pickled weights into safetensors."""
    with mistakes_in_one_line():
        set_up_console()
        from sd_recipes.commands.convert import main

        main(argv)


def env(argv: list[str]) -> None:
    """Show what a run would meet on this machine."""
    from sd_recipes.commands.env import main

    main(argv)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": lambda argv: train(argv, TRAIN),
    "cache": cache,
    "inspect": inspect,
    "plan": plan,
    "average": average,
    "evaluate": evaluate,
    "export": export,
    "sample": sample,
    "convert": convert,
    "env": env,
}


if __name__ == "__main__":
    main()
