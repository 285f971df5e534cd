#!/usr/bin/env python
"""Fine-tune, or train from scratch, a Stable Diffusion text-to-image model.

On the emoji that come with the package, on a CPU, in minutes:

    accelerate launch --quiet train_text_to_image.py --config quickstart

On your own pictures, on a GPU:

    accelerate launch --quiet train_text_to_image.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir my_pictures --mixed_precision bf16 --use_ema --output_dir my_model

`--help` lists every setting, `--help optimization` one group of them, `--dry_run` shows what a run would do.
"""

import sys

from sd_recipes.flags import SCRIPT, Command, load_recipe
from sd_recipes.redaction import redacted
from sd_recipes.runtime.console import mistakes_in_one_line, set_up_console
from sd_recipes.runtime.signals import stop_request


def main(argv: list[str] | None = None, command: Command = SCRIPT) -> None:
    """Train by the flags in `argv`, given to `command`. A mistake leaves one line on stderr, and status 2."""
    with mistakes_in_one_line():
        recipe = load_recipe(argv, command)
        sys.argv[1:] = map(redacted, sys.argv[1:])  # trackers publish the command line
        stop_request.listen()
        # Imported here, because it takes seconds: a mistake on the command line is answered before.
        set_up_console()
        from sd_recipes.commands.train import run

        run(recipe)


if __name__ == "__main__":
    main()
