"""Pictures of fixed prompts, drawn with the same noise at every step; and grids of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from sd_recipes.model.components import Components
from sd_recipes.model.family import Family
from sd_recipes.model.samplers import VALIDATION_FLAGS, drawing_sampler
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.signals import stop_request
from sd_recipes.writing import replacing

BROKEN_OFF = "in the middle of a validation, which is abandoned"

Ask = Callable[[list[str]], Mapping[str, Any]]  # a pipeline's arguments by which it draws prompts


def drawing_pipeline(
    family: Family, components: Components, sampler: str | None = None, flags: tuple[str, str] = VALIDATION_FLAGS
) -> DiffusionPipeline:
    """A pipeline that draws, whatever the UNet predicts, with its own sampler or the one of that name.

    Raises RecipeError as `drawing_sampler`. What is exported is `Family.build_pipeline`'s, whose scheduler says what
    was trained.
    """
    pipeline = family.build_pipeline(components)
    pipeline.scheduler = drawing_sampler(components.sampler, sampler, flags)
    return pipeline


def draw_pictures(
    pipeline: Any,
    ask: Ask,
    prompts: Sequence[str],
    recipe: Recipe,
    size: tuple[int, int],
    numbers: Sequence[int],
    at_once: int,
    *,
    bar: str = "Validation pictures",
    stopped: str = BROKEN_OFF,
) -> list[Image.Image]:
    """Pictures of `size` (height, width) for those of the prompts with these numbers, `at_once` of them at a time.

    The same noise for the same seed and number, whatever else is drawn, also where a sampler adds some at every step.
    Raises Stopped.
    """
    height, width = size
    assert recipe.seed is not None
    pipeline.set_progress_bar_config(desc=bar, leave=False)
    pictures: list[Image.Image] = []
    with decoded_one_by_one(pipeline.vae):
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            pictures += pipeline(
                **ask([prompts[number] for number in some]),
                height=height,
                width=width,
                num_inference_steps=recipe.validation_inference_steps,
                guidance_scale=recipe.validation_guidance_scale,
                generator=[generator_of(recipe.seed, number) for number in some],
                callback_on_step_end=partial(check_for_stop, stopped),
            ).images
    return pictures


def generator_of(seed: int, number: int) -> torch.Generator:
    """What the noise of a picture is drawn by, wherever and with whatever else it is drawn."""
    return torch.Generator("cpu").manual_seed((seed + number) % 2**63)


@contextmanager
def decoded_one_by_one(vae: AutoencoderKL) -> Iterator[None]:
    """Within this context the VAE decodes pictures one by one: together they can take more memory than a training step.

    It encodes them one by one too, and afterwards as before: training batches stay the same to the bit.
    """
    before = vae.use_slicing
    vae.enable_slicing()
    try:
        yield
    finally:
        vae.use_slicing = before


def save_whole(picture: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Save a picture, with texts under their keywords, so that a kill or a full disk leaves all of it or nothing."""
    chunks = PngImagePlugin.PngInfo()
    for keyword, text in (texts or {}).items():
        chunks.add_text(keyword, text)  # international text, where Latin-1 lacks a character
    with replacing(path) as beside:
        picture.save(beside, "PNG", pnginfo=chunks)


def check_for_stop(
    stopped: str, pipeline: DiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]
) -> dict[str, Any]:
    """What diffusers calls after every denoising step. Raises Stopped, with the words `stopped`."""
    stop_request.check(stopped)
    return tensors


def picture_grid(
    pictures: list[Image.Image], captions: list[str], columns: int | None = None, cell: int | None = None
) -> Image.Image:
    """Pictures in rows, each over its caption; small pictures are enlarged to `cell` pixels (default: at least 128)."""
    columns = columns or min(len(pictures), max(4, math.ceil(math.sqrt(len(pictures)))))
    width = cell or max(128, pictures[0].width)
    font_size = max(11, width // 12)
    font = _font(font_size)
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


def comparison_grid(columns: list[list[Image.Image]], names: list[str], captions: list[str]) -> Image.Image:
    """Pictures of the same captions in rows, each column under its name."""
    pictures = [picture for row in zip(*columns, strict=True) for picture in row]
    below = picture_grid(pictures, [caption for caption in captions for _ in columns], columns=len(columns))
    width = below.width // len(columns)
    size = max(12, width // 12)
    font, line = _font(size), size + 3
    grid = Image.new("RGB", (below.width, below.height + 3 * line), "white")
    grid.paste(below, (0, 3 * line))
    pen = ImageDraw.Draw(grid)
    for number, name in enumerate(names):
        # A path's end says most.
        for row, text in enumerate(_wrap(name.replace("/", "/ "), font, width)[-2:]):
            pen.text((number * width + 3, 3 + row * line), text.replace("/ ", "/"), fill="black", font=font)
    return grid


def _font(size: float) -> ImageFont.FreeTypeFont:
    """matplotlib's own, which has characters that Pillow's lacks."""
    import matplotlib  # takes long to import, and a run begins without it

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
