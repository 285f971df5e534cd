"""The console script: `sd-recipes train` is train_text_to_image.py without a checkout."""

from __future__ import annotations

import argparse
import sys

from sd_recipes import __version__
from sd_recipes.flags import SCRIPT, Command, load_recipe

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
    parser = argparse.ArgumentParser(
        prog="sd-recipes", description="Train Stable-Diffusion-class text-to-image models."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "train", add_help=False, help="train by flags or a recipe; `sd-recipes train --help` lists them"
    )
    commands.add_parser(
        "inspect", add_help=False, help="look at a data set before training on it; `sd-recipes inspect --help`"
    )
    commands.add_parser(
        "cache", add_help=False, help="fill the latent cache before training, with the flags of `train`"
    )
    commands.add_parser("schema", help="print the JSON schema of a recipe file, for editors")
    arguments, rest = parser.parse_known_args()
    if arguments.command == "schema":
        from sd_recipes.flags import recipe_schema

        sys.stdout.write(recipe_schema())
        return
    if arguments.command == "inspect":
        from sd_recipes.commands.inspect import main as inspect

        inspect(rest)
        return
    if arguments.command == "cache":
        from sd_recipes.runtime.console import mistakes_in_one_line, set_up_console
        from sd_recipes.runtime.signals import stop_request

        with mistakes_in_one_line():
            recipe = load_recipe(rest, CACHE)
            stop_request.listen()
            set_up_console()
            from sd_recipes.commands.cache import fill_cache

            fill_cache(recipe)
        return
    from train_text_to_image import main as train

    train(rest, TRAIN)


if __name__ == "__main__":
    main()
