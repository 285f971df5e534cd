"""A run in words, before it begins."""

from __future__ import annotations

import os

from sd_recipes.model.family import Family
from sd_recipes.runtime.launcher import DYNAMO, configuration
from sd_recipes.training.rates import matches_in_words
from sd_recipes.training.run import Run
from sd_recipes.training.run_length import micro_batches_of_step, num_epochs

COMPILED = {"blocks": "the UNet's blocks", "unet": "the UNet", "graphs": "the UNet, as CUDA graphs"}


def describe(run: Run) -> str:
    """The run in a few lines: data, steps, batch, parameters."""
    accelerator, data = run.accelerator, run.data
    steps = f"{run.num_steps:,}"
    if data.order is not None:
        of_epoch = data.order.num_steps(1)
        steps += f" ({of_epoch:,} per epoch, {num_epochs(run, data.order):.4g} epochs)"
    trained = ", ".join(
        f"{sum(each.numel() for each in part.parameters.values()):,} ({part.name})" for part in run.state.parts.values()
    )
    of_groups = matches_in_words(run.state.parts.values(), run.recipe.param_groups or [])
    backend = os.environ.get(DYNAMO, "no").lower()
    lines = {
        **({"resumes from": f"{run.checkpoint[0]}"} if run.checkpoint else {}),
        "global batch": batch_in_words(run),
        **({"class pictures": f"{data.class_rows.num_rows:,}, one beside each image"} if data.class_rows else {}),
        "optimizer steps": steps,
        "trainable parameters": trained,
        **({"parameters of groups": f"\n{'':<23}".join(of_groups)} if of_groups else {}),
        "predicts": run.model.objective.prediction_type,
        **(
            {"text states": _text_states_in_words(run.model.family, run.recipe.clip_skip)}
            if run.recipe.clip_skip
            else {}
        ),
        "device": f"{accelerator.device}, {accelerator.mixed_precision} mixed precision"
        + (f", compiled by {backend} (torch dynamo) of {configuration()}" if backend != "no" else "")
        + (f", compiled: {COMPILED[run.recipe.compile]}" if run.recipe.compile else "")
        + (f", sharded over {accelerator.num_processes} processes (FSDP2)" if accelerator.is_fsdp2 else ""),
        "seed": run.recipe.seed,
    }
    return "\n".join(f"  {name:<21}{value}" for name, value in lines.items())


def _text_states_in_words(family: Family, clip_skip: int) -> str:
    left_out = family.encoder_layer(clip_skip) - 1
    layers = "the last layer" if left_out == 1 else f"the last {left_out} layers"
    of = "each text encoder" if len(family.text_models) > 1 else "the text encoder"
    return f"without {layers} of {of}: draw with {family.clip_skip_in_words(clip_skip)}"


def batch_in_words(run: Run) -> str:
    """A global batch as what it consists of."""
    recipe, global_batch_size, num_processes = run.recipe, run.data.global_batch_size, run.accelerator.num_processes
    size, accumulated = recipe.train_batch_size, recipe.gradient_accumulation_steps
    at_once = f", {recipe.images_at_once} at once" if recipe.images_at_once < size else ""
    if size * accumulated * num_processes != global_batch_size:  # the run began on another number
        accumulated = micro_batches_of_step(recipe, global_batch_size, num_processes)
        return (
            f"{global_batch_size}, kept, on {num_processes} processes: at most {size} x {accumulated} on each{at_once}"
        )
    return f"{global_batch_size} = {size} per device x {accumulated} accumulated x {num_processes} processes{at_once}"
