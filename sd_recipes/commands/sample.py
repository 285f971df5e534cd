"""`sd-recipes sample`: pictures of prompts, drawn with what a run or another program has made.

    sd-recipes sample --pretrained_model_name_or_path runs/boats --prompts "a red boat"

The noise of a picture follows from the seed and the picture's number, whatever it is drawn with, where, or how many at
a time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sd_recipes.commands.of_run import EXPORTED, LoadedModel, find_target, load_model, merge_loras, settings_of
from sd_recipes.commands.sample_settings import SIZE, Sampling, read_prompts
from sd_recipes.data.held_out import choose
from sd_recipes.data.training_data import load_training_data
from sd_recipes.errors import RecipeError, one_line
from sd_recipes.evaluation.pictures import (
    Ask,
    comparison_grid,
    decoded_one_by_one,
    drawing_pipeline,
    generator_of,
    picture_grid,
    save_whole,
)
from sd_recipes.evaluation.sample_errors import HELD_OUT
from sd_recipes.evaluation.watched_rows import WatchedRows
from sd_recipes.export.parameters import KEYWORD, SAMPLERS, parameters_text
from sd_recipes.export.safetensors_file import DTYPES, hash_of_tensors
from sd_recipes.flags import build_recipe
from sd_recipes.model.families import family_of
from sd_recipes.model.lora_files import LORA_FILE, Lora, diffusers_tensors, with_alpha_of_ranks
from sd_recipes.model.samplers import check_it_draws
from sd_recipes.model.sources import MODEL
from sd_recipes.redaction import in_texts, redacted, shown
from sd_recipes.runtime.console import hide_library_bars, say
from sd_recipes.runtime.out_of_memory import is_out_of_memory
from sd_recipes.runtime.output_dir import check_is_folder

FLAGS = ("--sampler", "--steps")
PICTURE = re.compile(r"\d{5,}-\d+\.png|grid\.png")  # names of what is written
HASH_DIGITS, LORA_HASH_DIGITS = 10, 12  # of a SHA-256, as A1111 shows them


def sample(config: Sampling) -> None:
    """Draw what `config` says; write the pictures and a grid of them. Raises RecipeError."""
    output_dir = Path(config.output_dir).expanduser()
    check_has_no_pictures(output_dir, config)
    device = device_of(config)
    for name in config.models:  # before the first one is drawn with
        find_target(name, config.weights or "evaluated", EXPORTED)
    hide_library_bars()
    prompts = [prompt for prompt in prompts_of(config) for _ in range(config.num_images)]
    columns: list[list[Image.Image]] = []
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        size: tuple[int, int] | None = None
        for number, name in enumerate(config.models, 1):
            folder = output_dir / f"model-{number}" if config.compare else output_dir
            flags = config.model if config.clip_skip is None else {**config.model, "clip_skip": config.clip_skip}
            model = load_model(name, config.weights, flags, "--compare" if config.compare else MODEL)
            if size is None:
                size = size_of(model, config)
                for picture in pictures_in(output_dir):  # of an earlier call: not before something takes their place
                    picture.unlink()
                if config.compare and not (config.resolution or (config.width and config.height)):
                    say(f"size            {size[1]}x{size[0]}, the first model's, for all: the noise is the same then")
            columns.append(draw_with(name, model, config, prompts, device, folder, size))
            del model  # before the next one is loaded
        captions = in_texts(redacted, prompts)
        if config.compare:
            grid = comparison_grid(columns, in_texts(redacted, config.models), captions)
        else:
            grid = picture_grid(columns[0], captions)
        save_whole(grid, output_dir / "grid.png")
    except OSError as error:
        raise RecipeError(
            f"--output_dir {output_dir} cannot be written ({one_line(error)}): make room, or choose another"
        ) from error
    say(f"pictures        {output_dir}\ngrid            {output_dir / 'grid.png'}")


def check_has_no_pictures(output_dir: Path, config: Sampling) -> None:
    """Raises RecipeError for a file in the folder's place, and for pictures that would be written over."""
    check_is_folder(output_dir)
    if not config.overwrite and next(pictures_in(output_dir), None):
        raise RecipeError(f"--output_dir {output_dir} has pictures already: choose another, or add --overwrite")


def pictures_in(output_dir: Path) -> Iterator[Path]:
    """The pictures and the grid of an earlier call, of one model or of several."""
    for path in (path for place in ("*.png", "model-*/*.png") for path in output_dir.glob(place)):
        if PICTURE.fullmatch(path.name):
            yield path


def device_of(config: Sampling) -> torch.device:
    """Raises RecipeError for a device that is not there, or a type that it cannot draw in."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda: torch sees no GPU: drop the flag to draw on the CPU")
    name = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    if config.dtype == "fp16" and name == "cpu":
        raise RecipeError("--dtype fp16 needs a GPU: use bf16 or fp32 on the CPU")
    return torch.device(name)


# -------------------------------------------------------------------------------------------------- prompts


def prompts_of(config: Sampling) -> list[str]:
    """Raises RecipeError if there are none."""
    if config.captions is not None:
        return captions_of(config)
    prompts = (
        config.prompts if config.prompts is not None else read_prompts(config.prompt_file or "", config.text_encoding)
    )
    if not all(prompt.strip() for prompt in prompts):
        raise RecipeError("--prompts holds an empty prompt: drop it, or write what to draw")
    return prompts


def captions_of(config: Sampling) -> list[str]:
    """Captions of the rows that the first run among the models holds out or trains on. Raises RecipeError."""
    run = next((target.run for name in config.models if (target := find_target(name, "evaluated")).run), None)
    if run is None:
        raise RecipeError(f"--captions {config.captions}: {config.models[0]} is no run, which has data: give --prompts")
    recipe = build_recipe(settings_of(run, {}))
    if not recipe.validation_split and config.captions == "held_out":
        raise RecipeError(f"--captions held_out: {run} holds no rows out: use --captions training")
    tokenizer, *_ = family_of(recipe).load_tokenizers(recipe)
    data = load_training_data(recipe, tokenizer, seed=recipe.seed or 0, global_batch_size=1, rank=0)
    rows = data.held_out if config.captions == "held_out" else data.watched
    if config.captions == "training" and data.rows is not None:
        rows = choose(data.rows, config.num_captions)
    if rows is None:
        raise RecipeError(f"--captions training: {run} streams its rows and holds none out: give --prompts")
    captions = WatchedRows({HELD_OUT: rows}, recipe).captions(config.num_captions)
    if not captions:
        raise RecipeError(f"--captions {config.captions}: these rows of {run} have no captions: give --prompts")
    return captions


# -------------------------------------------------------------------------------------------------- drawing


def draw_with(
    name: str,
    model: LoadedModel,
    config: Sampling,
    prompts: list[str],
    device: torch.device,
    folder: Path,
    size: tuple[int, int],
) -> list[Image.Image]:
    """The pictures of `size` (height, width) of all prompts by one model, which are saved as they are drawn.

    Raises RecipeError and OSError.
    """
    last = Path(shown(name))
    about: dict[str, str | None] = {
        "Model hash": model_hash(name, model),
        "Model": last.stem if Path(name).is_file() else last.name,
    }
    merge_loras(model, config.loras)
    words, about["Lora hashes"] = lora_words(name, model, config.loras)
    pipeline = drawing_pipeline(model.family, model.components, config.sampler, FLAGS)
    check_it_draws(pipeline.scheduler, config.steps, config.sampler, FLAGS)
    dtype = config.dtype or ("fp16" if device.type == "cuda" else "fp32")
    if dtype != "fp32":
        model.check_range(dtype)
        pipeline.to(DTYPES[dtype])
    pipeline.to(device)
    pipeline.set_progress_bar_config(desc=f"Drawing with {last.name}", leave=False)
    folder.mkdir(exist_ok=True)
    pictures = []
    ask = partial(model.family.prompt_arguments, model.components)
    clip_skip = model.components.clip_skip
    for number, picture in enumerate(draw(pipeline, ask, prompts, config, size)):
        width, height = picture.size
        values = {
            "Steps": config.steps,
            "Sampler": SAMPLERS.get(type(pipeline.scheduler).__name__, type(pipeline.scheduler).__name__),
            "CFG scale": config.guidance_scale,
            "Seed": config.seed + number,
            "Size": f"{width}x{height}",
            "Clip skip": None if clip_skip is None else model.family.a1111_clip_skip(clip_skip),
            **about,
        }
        text = parameters_text(prompts[number] + words, config.negative_prompt, values)
        save_whole(picture, folder / f"{number:05}-{config.seed + number}.png", {KEYWORD: redacted(text)})
        pictures.append(picture)
    return pictures


def draw(pipeline: Any, ask: Ask, prompts: list[str], config: Sampling, size: tuple[int, int]) -> Iterator[Image.Image]:
    """A picture of `size` (height, width) for each prompt, `--batch_size` of them at a time. Raises RecipeError."""
    height, width = size
    with decoded_one_by_one(pipeline.vae):
        for start in range(0, len(prompts), config.batch_size):
            numbers = range(start, min(start + config.batch_size, len(prompts)))
            try:
                yield from pipeline(
                    **ask([prompts[number] for number in numbers]),
                    negative_prompt=[config.negative_prompt] * len(numbers) if config.negative_prompt else None,
                    height=height,
                    width=width,
                    num_inference_steps=config.steps,
                    guidance_scale=config.guidance_scale,
                    generator=[generator_of(config.seed, number) for number in numbers],
                ).images
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise RecipeError(
                    f"no memory for {len(numbers)} pictures of {width}x{height} at once ({one_line(error, 100)}): "
                    "lower --batch_size, or the size"
                ) from error


def size_of(model: LoadedModel, config: Sampling) -> tuple[int, int]:
    """(height, width) of the pictures. Raises RecipeError for sides that are no multiples of what the model needs."""
    usual = config.resolution or model.resolution
    size = config.height or usual, config.width or usual
    factor = max(8, model.components.vae_scale_factor)
    for side in size:
        if side % factor:
            nearest = side - side % factor
            raise RecipeError(f"--resolution {side}: {SIZE.format(nearest or factor, nearest + factor)}")
    return size


def lora_words(name: str, model: LoadedModel, loras: list[tuple[str, float]]) -> tuple[str, str | None]:
    """What A1111 has for LoRAs in a prompt, a run's own first, and their hashes; None where none is known."""
    found: list[tuple[str, float, str | None]] = []
    if model.lora is not None:
        found.append((name, 1.0, hash_of_lora(model.lora)))
    for given, weight in loras:
        path = Path(given).expanduser()
        file = path / LORA_FILE if path.is_dir() else path
        found.append((given, weight, hash_of_tensors(file) if file.is_file() else None))  # no checkpoint
    words, hashes = "", []
    for given, weight, digest in found:
        word = Path(given).expanduser().resolve().name.removesuffix(".safetensors").removesuffix(".sft")
        words += f" <lora:{word}:{weight:g}>"
        if digest:
            hashes.append(f"{word}: {digest[:LORA_HASH_DIGITS]}")
    return words, ", ".join(hashes) or None


def hash_of_lora(lora: Lora) -> str:
    """SHA-256 of what drew: the tensors that a run has trained."""
    digest = hashlib.sha256()
    for key, value in sorted(diffusers_tensors(with_alpha_of_ranks(lora)).items()):
        digest.update(key.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_hash(name: str, model: LoadedModel) -> str:
    """Of a single file, as A1111 has it; otherwise of the UNet's and the text encoder's tensors in float32."""
    path = Path(name).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:HASH_DIGITS]
    digest = hashlib.sha256()
    for part in model.parts.values():
        for key, value in sorted(part.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:HASH_DIGITS]
