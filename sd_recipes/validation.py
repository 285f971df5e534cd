"""What a run has learnt: loss on held-out rows under fixed noise, and pictures of fixed prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from sd_recipes.data.batches import BatchBuilder
from sd_recipes.data.order import MicroBatch
from sd_recipes.metrics import ImageTextScore
from sd_recipes.model.conditioning import encode_text
from sd_recipes.model.latents import batch_moments, sample_latents
from sd_recipes.pipeline import build_pipeline
from sd_recipes.redaction import in_texts, redacted
from sd_recipes.signals import stop_request

if TYPE_CHECKING:
    from sd_recipes.build import Training

# The same noise for every run and every step, whatever the run's seed, so that losses can be compared.
HELD_OUT_SEED = 0
# Below this many (row, timestep, noise) samples the loss of a small split says more about its noise.
MIN_HELD_OUT_SAMPLES = 256
BROKEN_OFF = "in the middle of a validation, which is broken off"


@dataclass
class Validator:
    """Validates a training run: its held-out loss, its pictures and their image-text score."""

    held_out: BatchBuilder | None
    score: ImageTextScore | None

    @torch.no_grad()
    def held_out_loss(self, training: Training) -> float:
        """Mean loss over the held-out rows, timesteps stratified over all samples; the UNet as it is."""
        assert self.held_out is not None
        assert self.held_out.rows is not None
        num_rows, size = len(self.held_out.rows), training.recipe.train_batch_size
        num_samples = num_rows * math.ceil(MIN_HELD_OUT_SAMPLES / num_rows)
        # Strided, so that every row meets early and late timesteps.
        strata = np.arange(num_samples).reshape(num_rows, -1).T.reshape(-1)
        total = torch.zeros(2, device=training.accelerator.device)
        for start in tqdm(range(0, num_samples, size), desc="Held-out loss", leave=False):
            stop_request.check(BROKEN_OFF)
            chosen = np.arange(start, min(start + size, num_samples))
            plan = MicroBatch(
                rows=chosen % num_rows,
                positions=chosen,
                strata=strata[chosen],
                global_batch_size=num_samples,
                weight=1.0,
                is_last=True,
                samples_seen=0,
                ends_epoch=False,
                epoch=0,
                size=(training.recipe.resolution, training.recipe.resolution),
            )
            batch = self.held_out[plan].to(training.accelerator.device)
            components = training.components
            moments = batch_moments(components.vae, batch, training.weight_dtype)
            latents = sample_latents(components.vae, moments, batch.posterior_noise)
            states = encode_text(components.text_encoder, batch.input_ids)
            with training.accelerator.autocast():
                losses = training.held_out_objective(components.unet, latents, states, batch.timesteps, batch.noise)
            total += torch.stack([(batch.weights * losses).sum(), batch.weights.sum()])
        loss, weight = total.tolist()
        return loss / weight

    def pictures(self, training: Training) -> list[Image.Image]:
        """A picture of each prompt: the same noise for the same seed and prompt, at every step."""
        recipe = training.recipe
        prompts = recipe.validation_prompts or []
        pipeline = build_pipeline(training.components)
        pipeline.set_progress_bar_config(desc="Validation pictures", leave=False)
        pictures: list[Image.Image] = []
        with training.accelerator.autocast():
            # As many at once as are trained at once: drawing takes less memory than a training step.
            for start in range(0, len(prompts), recipe.train_batch_size):
                some = prompts[start : start + recipe.train_batch_size]
                generators = [
                    torch.Generator("cpu").manual_seed((training.seed + start + number) % 2**63)
                    for number in range(len(some))
                ]
                pictures += pipeline(
                    some,
                    height=recipe.resolution,
                    width=recipe.resolution,
                    num_inference_steps=recipe.validation_inference_steps,
                    guidance_scale=recipe.validation_guidance_scale,
                    generator=generators,
                    callback_on_step_end=check_for_stop,
                ).images
        return pictures

    def __call__(self, training: Training, step: int) -> None:
        """Validate the UNet as it is, within `training.evaluated_weights()`; log, and write the grid of pictures.

        Raises Stopped, with the UNet as it was, as soon as the process is asked to end.
        """
        unet, recipe = training.components.unet, training.recipe
        figures: dict[str, float] = {}
        unet.eval()
        try:
            if self.held_out is not None:
                figures["validation_loss"] = self.held_out_loss(training)
            if recipe.validation_prompts:
                pictures = self.pictures(training)
                path = Path(recipe.output_dir) / "samples" / f"step-{step:06d}.png"
                path.parent.mkdir(exist_ok=True)
                picture_grid(pictures, in_texts(redacted, recipe.validation_prompts)).save(path)
                training.tracker.log_pictures(pictures, step)
                if self.score:
                    figures["image_text_score"] = self.score(pictures, recipe.validation_prompts)
        finally:
            unet.train()
        if figures:
            training.tracker.log(figures, step)


def check_for_stop(
    pipeline: DiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]
) -> dict[str, Any]:
    """What diffusers calls after every denoising step. Raises Stopped."""
    stop_request.check(BROKEN_OFF)
    return tensors


def picture_grid(
    pictures: list[Image.Image], captions: list[str], columns: int | None = None, cell: int | None = None
) -> Image.Image:
    """Pictures in rows, each over its caption; small pictures are enlarged to `cell` pixels (default: 128 at least)."""
    columns = columns or min(len(pictures), max(4, math.ceil(math.sqrt(len(pictures)))))
    width = cell or max(128, pictures[0].width)
    font_size = max(11, width // 12)
    # matplotlib's own font has letters that Pillow's lacks.
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", font_size)
    line = font_size + 3
    height = width * pictures[0].height // pictures[0].width + 2 * line + 6
    rows = math.ceil(len(pictures) / columns)
    grid = Image.new("RGB", (columns * (width + 6), rows * height), "white")
    pen = ImageDraw.Draw(grid)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = number % columns * (width + 6) + 3, number // columns * height
        scaled = picture.resize((width, width * picture.height // picture.width), Image.Resampling.LANCZOS)
        grid.paste(scaled, (left, top))
        for row, text in enumerate(_wrap(caption, font, width)[:2]):
            pen.text((left, top + scaled.height + row * line), text, fill="black", font=font)
    return grid


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
