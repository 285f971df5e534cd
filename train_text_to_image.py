#!/usr/bin/env python
"""Fine-tune, or train from scratch, a Stable Diffusion text-to-image model.

On the emoji that come with the package, on a CPU, in minutes:

    accelerate launch --quiet train_text_to_image.py --config quickstart

On your own pictures, on a GPU:

    accelerate launch --quiet train_text_to_image.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir my_pictures --mixed_precision bf16 --use_ema --output_dir my_model

`--help` lists every setting, `--dry_run` shows what a run would do.
"""

import os
import sys

from sd_recipes.recipe import RecipeError, load_recipe


def main(argv: list[str] | None = None) -> None:
    recipe = load_recipe(argv)

    # Imported here, because it takes seconds: a mistake on the command line is answered before.
    from sd_recipes import run

    run.run(recipe)


if __name__ == "__main__":
    try:
        main()
    except (RecipeError, KeyboardInterrupt) as error:
        if int(os.environ.get("LOCAL_RANK", 0)) <= 0:
            print(f"error: {error}" if str(error) else "stopped", file=sys.stderr)
        sys.exit(2 if isinstance(error, RecipeError) else 130)
