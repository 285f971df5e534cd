"""What a run left, judged by stock diffusers alone: the loss of its pictures, and what it draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from tiny_models import training_scheduler
from training_runs import Run

from sd_recipes.export.pipeline import export_trained


def exported(run: Run, base: Path) -> Any:
    """The run's result as a user loads it: a pipeline, or its LoRA in the base model."""
    with run.state.evaluated(run.model.components):
        export_trained(run.model.family, run.model.components, run.recipe, run.output_dir)
    if not run.recipe.trains_lora:
        return DiffusionPipeline.from_pretrained(run.output_dir)
    pipeline: Any = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(run.output_dir)
    return pipeline


@torch.no_grad()
def loss_of_pictures(pipeline: Any, folder: Path, base: Path) -> float:
    """Mean error of ε on the folder's pictures, at 16 timesteps each."""
    scheduler, generator, losses = training_scheduler(base), torch.Generator().manual_seed(0), []
    for line in (folder / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        with Image.open(folder / row["file_name"]) as file:
            size = file.size
            pixels = torch.tensor(np.array(file.convert("RGB").resize((32, 32)))).permute(2, 0, 1)[None]
        latents = pipeline.vae.encode(pixels / 127.5 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
        latents, timesteps = latents.repeat(16, 1, 1, 1), torch.linspace(30, 970, 16).long()
        noise = torch.randn(latents.shape, generator=generator)
        conditions = conditions_of(pipeline, row["text"], size)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        losses.append((pipeline.unet(noisy, timesteps, **conditions).sample - noise).square().mean())
    return float(torch.stack(losses).mean())


def conditions_of(pipeline: Any, caption: str, size: tuple[int, int]) -> dict[str, Any]:
    """What the UNet is called with for 16 times a caption, and for SDXL's the middle of a picture (width, height)."""
    states, _, *pooled = pipeline.encode_prompt(
        caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    conditions: dict[str, Any] = {"encoder_hidden_states": states.repeat(16, 1, 1)}
    if isinstance(pipeline, StableDiffusionXLPipeline):
        time_ids = torch.tensor([[size[1], size[0], 0, (size[0] - 32) // 2, 32, 32]]).repeat(16, 1)
        conditions["added_cond_kwargs"] = {"text_embeds": pooled[0].repeat(16, 1), "time_ids": time_ids}
    return conditions


def draw(pipeline: Any) -> np.ndarray:
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
