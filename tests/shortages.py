"""Runs in which memory ends; as a script, of several processes, of which one is short of it.

torchrun … tests/shortages.py '[{"settings": {…}, "short": {"place": "forward", "fits": 2, "rank": 1}}, …]'
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from training_runs import build, fit_from

from sd_recipes.runtime.console import mistakes_in_one_line, set_up_console
from sd_recipes.training.run import Run

BY_NUMBER = ("text", "encoding", "forward", "backward", "last backward")  # there, fewer images at once fit
ONCE = ("clipping", "optimizer", "average")  # these take the same memory for any number of images


def shorten(run: Run, place: str, fits: int = 0, step: int = 1) -> None:
    """From a step on there is memory only for so many images at once in a place; or, in some, none the first time."""
    model, unet = run.model, run.model.components.unet

    def check(number: int) -> None:
        if run.state.progress.global_step + 1 >= step and number > fits:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {number} GiB.")

    def check_backward(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad and (place == "backward" or model.exchange.is_last):
            number = len(output)
            output.register_hook(lambda gradient: check(number))

    def once(work: Callable[..., Any]) -> Callable[..., Any]:
        left = [1]

        def short(*arguments: Any) -> Any:
            if run.state.progress.global_step + 1 >= step and left:
                left.pop()
                check(1)
            return work(*arguments)

        return short

    if place == "text":
        encode_text = model.encode_text
        model.encode_text = lambda ids: (check(len(ids)), encode_text(ids))[1]
    elif place == "encoding":
        encode = model.encoder.encode
        model.encoder.encode = lambda pixels: (check(len(pixels)), encode(pixels))[1]
    elif place == "forward":
        unet.mid_block.register_forward_pre_hook(
            lambda module, inputs: check(len(inputs[0])) if unet.training else None
        )
    elif place in ("backward", "last backward"):  # most gradients are there by then
        unet.conv_in.register_forward_hook(check_backward)
    elif place == "clipping":
        run.accelerator.clip_grad_norm_ = once(run.accelerator.clip_grad_norm_)
    elif place == "optimizer":
        run.state.optimizer.optimizer.register_step_pre_hook(once(lambda *arguments: None))
    else:
        assert place == "average"
        average = run.state.parts["unet"].average
        average._step = once(average._step)


if __name__ == "__main__":
    set_up_console()
    for each in json.loads(sys.argv[-1]):
        with mistakes_in_one_line():
            run = build(each["settings"])
            short = each.get("short")
            if short and short.pop("rank") == int(os.environ["RANK"]):
                shorten(run, **short)
            fit_from(run)
