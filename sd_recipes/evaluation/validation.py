"""What a run has learnt: loss on held-out rows under fixed noise, and pictures of fixed prompts."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from sd_recipes.data.batches import BatchBuilder
from sd_recipes.data.order import STRATA_PURPOSE, MicroBatch, generator
from sd_recipes.evaluation.metrics import ImageTextScore
from sd_recipes.export.pipeline import build_pipeline
from sd_recipes.model.conditioning import encode_text
from sd_recipes.model.latents import batch_moments, sample_latents
from sd_recipes.redaction import in_texts, redacted
from sd_recipes.runtime.out_of_memory import AtOnce
from sd_recipes.runtime.signals import stop_request

if TYPE_CHECKING:
    from sd_recipes.training.build import Training

logger = logging.getLogger(__name__)

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
    held_out_size: tuple[int, int]  # (height, width)
    picture_size: tuple[int, int]
    held_out_at_once: AtOnce
    pictures_at_once: AtOnce
    bad_rows: dict[str, str] = field(default_factory=dict)  # held-out rows that cannot be used, and why

    @torch.no_grad()
    def held_out_loss(self, training: Training, size: int) -> float | None:
        """Mean loss over the held-out rows that can be used, `size` at once, with the UNet as it is; None if none can.

        Timesteps are stratified over all samples, and over those of each row, which so meets early and late ones.
        """
        assert self.held_out is not None
        assert self.held_out.rows is not None
        num_rows = len(self.held_out.rows)
        num_samples = num_rows * math.ceil(MIN_HELD_OUT_SAMPLES / num_rows)
        strata = held_out_strata(num_rows, num_samples // num_rows).reshape(-1)
        bad: dict[str, str] = {}
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
                size=self.held_out_size,
            )
            batch = self.held_out[plan].to(training.accelerator.device)
            bad |= dict(batch.bad)
            components = training.components
            moments = batch_moments(components.vae, batch, training.weight_dtype)
            latents = sample_latents(components.vae, moments, batch.posterior_noise)
            states = encode_text(components.text_encoder, batch.input_ids)
            with training.accelerator.autocast():
                losses = training.held_out_objective(components.unet, latents, states, batch.timesteps, batch.noise)
            total += torch.stack([(batch.weights * losses).sum(), batch.weights.sum()])
        if new := bad.keys() - self.bad_rows.keys():
            self.bad_rows |= bad
            logger.warning(
                "%d of %d held-out rows cannot be used and are left out of the held-out loss: %s",
                len(self.bad_rows), num_rows, "; ".join(f"{row}: {bad[row]}" for row in bad if row in new),
            )  # fmt: skip
        loss, weight = total.tolist()
        if not weight:
            logger.warning("No row of --validation_split can be used: there is no held-out loss.")
            self.held_out = None
            return None
        return loss / weight

    def pictures(self, training: Training, size: int) -> list[Image.Image]:
        """A picture of each prompt, `size` at once: the same noise for the same seed and prompt, at every step."""
        recipe = training.recipe
        prompts = recipe.validation_prompts or []
        pipeline = build_pipeline(training.components)
        pipeline.set_progress_bar_config(desc="Validation pictures", leave=False)
        pictures: list[Image.Image] = []
        height, width = self.picture_size
        with training.accelerator.autocast(), decoded_one_by_one(training.components.vae):
            for start in range(0, len(prompts), size):
                some = prompts[start : start + size]
                generators = [
                    torch.Generator("cpu").manual_seed((training.seed + start + number) % 2**63)
                    for number in range(len(some))
                ]
                pictures += pipeline(
                    some,
                    height=height,
                    width=width,
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
                loss = self.held_out_at_once.attempt(partial(self.held_out_loss, training))
                if loss is not None:
                    figures["validation_loss"] = loss
            pictures = None
            if recipe.validation_prompts:
                pictures = self.pictures_at_once.attempt(partial(self.pictures, training))
            if pictures and recipe.validation_prompts:
                path = Path(recipe.output_dir) / "samples" / f"step-{step:06d}.png"
                path.parent.mkdir(exist_ok=True)
                save_whole(picture_grid(pictures, in_texts(redacted, recipe.validation_prompts)), path)
                training.tracker.log_pictures(pictures, step)
                if self.score:
                    figures["image_text_score"] = self.score(pictures, recipe.validation_prompts)
        finally:
            unet.train()
        if figures:
            training.tracker.log(figures, step)


def held_out_strata(num_rows: int, num_passes: int) -> np.ndarray:
    """(num_passes, num_rows): which of as many slices of the timesteps each row has in each pass.

    Every slice comes once, and each row has one of every pass's, drawn anew: neither a row nor its loss is bound to a
    part of the timesteps, so that one that cannot be used leaves no part out.
    """
    return np.stack(
        [
            number * num_rows + generator(HELD_OUT_SEED, number, STRATA_PURPOSE).permutation(num_rows)
            for number in range(num_passes)
        ]
    )


@contextmanager
def decoded_one_by_one(vae: AutoencoderKL) -> Iterator[None]:
    """Within it the VAE decodes one picture after the other: together they can take more memory than a training step.

    It encodes so too, and not after it: training's batches stay what they were, to the bit.
    """
    vae.enable_slicing()
    try:
        yield
    finally:
        vae.disable_slicing()


def save_whole(picture: Image.Image, path: Path) -> None:
    """Save a picture so that a kill or a full disk leaves all of it or nothing."""
    beside = path.with_name(f".{path.name}")
    try:
        picture.save(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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
