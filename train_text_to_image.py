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

from sd_recipes.commands.cli import train


def main(argv: list[str] | None = None) -> None:
    """Train with the flags in `argv`. A mistake ends in one line on stderr and status 2."""
    train(argv)


if __name__ == "__main__":
    main()
