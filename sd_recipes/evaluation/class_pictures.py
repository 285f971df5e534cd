"""Class pictures that the model draws itself, before it is trained (Ruiz et al. 2022, section 3.2)."""

from __future__ import annotations

import itertools
import logging
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from sd_recipes.data.picture_files import list_files
from sd_recipes.data.sizes import square_side
from sd_recipes.errors import RecipeError
from sd_recipes.evaluation.pictures import draw_pictures, drawing_pipeline, save_whole
from sd_recipes.model.components import load_scheduler
from sd_recipes.model.families import family_of
from sd_recipes.model.latents import bearable_dtype, decode_without_autocast
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import DTYPES
from sd_recipes.runtime.agreement import broadcast
from sd_recipes.runtime.out_of_memory import AtOnce

logger = logging.getLogger(__name__)

STOPPED = "while class pictures were drawn: those that are there are kept"


def draw_class_pictures(recipe: Recipe, accelerator: Accelerator) -> None:
    """Let the first process draw the class pictures that --class_data_dir lacks; the others wait for it.

    Every process has to call it. Raises RecipeError, on all of them, and Stopped.
    """
    if recipe.num_class_images is None:
        return
    problem = None
    try:
        if accelerator.is_main_process:
            _draw_missing(recipe, accelerator)
    except RecipeError as error:
        problem = str(error)
    finally:  # also where it was stopped: the others then stop too
        problem = broadcast(problem)
    if problem:
        raise RecipeError(problem)


def without_class_pictures_to_draw(recipe: Recipe) -> Recipe:
    """The recipe for a dry run, which draws nothing: without a folder of class pictures that is still empty."""
    missing = num_missing(recipe)
    if not missing:
        return recipe
    logger.info("%d class pictures are missing in %s: a run draws them first.", missing, recipe.class_data_dir)
    if missing < (recipe.num_class_images or 0):
        return recipe
    nothing = {"class_data_dir": None, "class_prompt": None, "num_class_images": None, "prior_preservation": "pictures"}
    return recipe.model_copy(update=nothing)


def num_missing(recipe: Recipe) -> int:
    """How many pictures --class_data_dir lacks of --num_class_images."""
    if recipe.num_class_images is None:
        return 0
    assert recipe.class_data_dir is not None
    folder = Path(recipe.class_data_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--class_data_dir {recipe.class_data_dir} is no folder: choose another")
    there = len(list_files(folder, follow_links=recipe.follow_links).pictures) if folder.is_dir() else 0
    return max(0, recipe.num_class_images - there)


def _draw_missing(recipe: Recipe, accelerator: Accelerator) -> None:
    """Draw what is missing, with the model as it was loaded; each picture by its number and the seed.

    Raises RecipeError and Stopped.
    """
    missing = num_missing(recipe)
    if not missing:
        return
    assert recipe.class_data_dir is not None
    assert recipe.class_prompt is not None
    folder = Path(recipe.class_data_dir).expanduser()
    free = (number for number in itertools.count() if not _path(folder, number).exists())
    numbers = list(itertools.islice(free, missing))
    family = family_of(recipe)
    components = family.load(recipe, load_scheduler(recipe), family.load_tokenizers(recipe))
    dtype = DTYPES[accelerator.mixed_precision]
    for name in ("unet", *family.text_models):
        getattr(components, name).to(accelerator.device, dtype)
    vae_dtype = bearable_dtype(components.vae, dtype, accelerator.device)
    components.vae.to(accelerator.device, vae_dtype)
    if vae_dtype != dtype:
        decode_without_autocast(components.vae)  # which takes the UNet's latents in its own type
    ask = partial(family.prompt_arguments, components)
    pipeline = drawing_pipeline(family, components, recipe.validation_sampler)
    side = square_side(recipe) - square_side(recipe) % 8  # which the pipeline takes
    prompts = [recipe.class_prompt] * (numbers[-1] + 1)
    at_once = AtOnce(recipe.train_batch_size, "Class pictures")

    def draw(number: int) -> list[Image.Image]:
        some = numbers[:number]
        return draw_pictures(
            pipeline, ask, prompts, recipe, (side, side), some, number, bar="Denoising steps", stopped=STOPPED
        )

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tqdm(total=missing, desc="Class pictures", unit="picture") as bar:
            while numbers:
                pictures = at_once.attempt(draw)
                if pictures is None:
                    raise RecipeError(
                        f"--num_class_images {recipe.num_class_images}: there is no memory to draw a picture of {side} "
                        f"x {side} pixels: lower --resolution, or put class pictures into {folder} yourself"
                    )
                for picture in pictures:
                    save_whole(picture, _path(folder, numbers.pop(0)))
                    bar.update()
    except OSError as error:
        raise RecipeError(
            f"--class_data_dir {recipe.class_data_dir} cannot be written ({error}): make room, or choose another"
        ) from error


def _path(folder: Path, number: int) -> Path:
    return folder / f"class-{number:05d}.png"
