"""train_text_to_image.py, with infinite gradients on process POISONED_RANK in the steps POISONED_STEPS, such as 3,4."""

from __future__ import annotations

import os
from typing import Any

import torch

from sd_recipes.training import build
from sd_recipes.training.run import Run


def poison(run: Run, steps: set[int]) -> None:
    """Gradients become infinite in these steps of one micro-batch each; the losses stay what they are."""
    done = 0

    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal done
        if output.requires_grad:
            done += 1
            if done in steps:
                output.register_hook(lambda gradient: gradient * torch.inf)

    run.model.components.unet.conv_out.register_forward_hook(hook)


if __name__ == "__main__":
    from sd_recipes.commands import train
    from sd_recipes.commands.cli import train as main

    def build_poisoned(*arguments: Any) -> Run:
        run = build.build_run(*arguments)
        if os.environ["RANK"] == os.environ["POISONED_RANK"]:
            poison(run, {int(step) for step in os.environ["POISONED_STEPS"].split(",")})
        return run

    train.build_run = build_poisoned
    main()
