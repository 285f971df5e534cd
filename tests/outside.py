"""What a run left, judged by stock diffusers alone: the loss of its pictures, and what it draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tiny_models import training_scheduler
from training_runs import Run

from sd_recipes.export.pipeline import export_trained


def exported(run: Run, base: Path) -> StableDiffusionPipeline:
    """The run's result as a user loads it: a pipeline, or its LoRA in the base model."""
    with run.state.evaluated(run.model.components):
        export_trained(run.model.family, run.model.components, run.recipe, run.output_dir)
    if not run.recipe.trains_lora:
        return StableDiffusionPipeline.from_pretrained(run.output_dir)
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(run.output_dir)
    return pipeline


@torch.no_grad()
def loss_of_pictures(pipeline: StableDiffusionPipeline, folder: Path, base: Path) -> float:
    """Mean error of ε on the folder's pictures, at 16 timesteps each."""
    scheduler, generator, losses = training_scheduler(base), torch.Generator().manual_seed(0), []
    for line in (folder / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        with Image.open(folder / row["file_name"]) as file:
            pixels = torch.tensor(np.array(file.convert("RGB").resize((32, 32)))).permute(2, 0, 1)[None]
        latents = pipeline.vae.encode(pixels / 127.5 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
        latents, timesteps = latents.repeat(16, 1, 1, 1), torch.linspace(30, 970, 16).long()
        noise = torch.randn(latents.shape, generator=generator)
        tokens = pipeline.tokenizer([row["text"]], padding="max_length", truncation=True, return_tensors="pt")
        states = pipeline.text_encoder(tokens.input_ids)[0].repeat(16, 1, 1)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        losses.append((pipeline.unet(noisy, timesteps, states).sample - noise).square().mean())
    return float(torch.stack(losses).mean())


def draw(pipeline: StableDiffusionPipeline) -> np.ndarray:
    """(1, 32, 32, 3) in 0 … 1, always with the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(
        "disc number 1", num_inference_steps=3, height=32, width=32, output_type="np", generator=generator
    )
    return pictures.images


def draw_as_validation(run: Run) -> np.ndarray:
    """What the run's own evaluated weights draw."""
    with torch.no_grad(), run.state.evaluated(run.model.components), run.validator.evaluating():
        return draw(run.model.family.build_pipeline(run.model.components))
