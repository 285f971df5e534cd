"""`sd-recipes evaluate`: what runs, checkpoints and pipelines have learned, measured alike.

    sd-recipes evaluate runs/boats runs/boats/checkpoint-500

Each is put together like a run that is not trained: its data have to be where they were.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from sd_recipes.checkpoints.format import DamagedCheckpoint, verify_checkpoint
from sd_recipes.commands.evaluate_settings import Evaluation
from sd_recipes.commands.of_run import EXPORTED, NOT_TRAINED, Target, find_target, product_of, settings_of
from sd_recipes.data.held_out import choose
from sd_recipes.errors import RecipeError, one_line
from sd_recipes.evaluation.bit_figures import bit_figures, error_table
from sd_recipes.evaluation.features import FeatureModel
from sd_recipes.evaluation.figures import figures_of
from sd_recipes.evaluation.latent_bits import count_bits, process_of
from sd_recipes.evaluation.metrics import ImageTextScore
from sd_recipes.evaluation.picture_scores import (
    as_json,
    nearest_training_pictures,
    score_features,
)
from sd_recipes.evaluation.pictures import draw_pictures, drawing_pipeline, picture_grid, save_whole
from sd_recipes.evaluation.real_pictures import real_pictures
from sd_recipes.evaluation.sample_errors import write_table
from sd_recipes.export.evaluation_page import Evaluated, figure_rows, write_evaluation_page
from sd_recipes.export.run_page import write_run_page
from sd_recipes.flags import build_recipe
from sd_recipes.model.lora_files import LORA_FILE
from sd_recipes.recipe import LoraConfig, ModelConfig, PriorConfig, Recipe, TextEncoderConfig
from sd_recipes.redaction import in_texts, redacted
from sd_recipes.runtime.accelerator import start_accelerator
from sd_recipes.runtime.agreement import all_gather
from sd_recipes.runtime.console import hide_library_bars, say
from sd_recipes.runtime.out_of_memory import AtOnce
from sd_recipes.runtime.output_dir import NO_ROOM, check_is_folder_of
from sd_recipes.runtime.signals import stop_request
from sd_recipes.runtime.trackers import EVALUATION, EVALUATION_RESULTS
from sd_recipes.training.build import build_run
from sd_recipes.training.run import Run
from sd_recipes.training.state import AVERAGE
from sd_recipes.writing import replace_file

logger = logging.getLogger(__name__)

TINY_FEATURES, TINY_SIDE = "sd-recipes/tiny-clip", 64
PICTURE_SEED = 0
STOPPED = "while pictures were drawn; nothing was written"
# Of a run that is put together to be evaluated: a batch that fits any number of rows.
ONE_BY_ONE: dict[str, Any] = {
    "train_batch_size": 1, "gradient_accumulation_steps": 1, "max_train_steps": 1, "scale_lr": False,
    "optimizer": "adamw", "optimizer_kwargs": None, "param_groups": None, "use_8bit_adam": False,
    "learned_uncertainty": False, "timesteps_by_error": False, "lr_scheduler": "constant",
    **{name: field.default for name, field in PriorConfig.model_fields.items()},
}  # fmt: skip
NO_LORA = {name: field.default for name, field in LoraConfig.model_fields.items()}
# Of the model that a run began with, which a pipeline has instead.
OF_THE_BASE = {
    "train_from_scratch": False, "unet_config": None, "prediction_type": None, "rescale_betas_zero_snr": False,
    "non_ema_revision": None, "revision": None, "variant": None, "vae": None, "base": None,
    **NO_LORA, **{name: field.default for name, field in TextEncoderConfig.model_fields.items()},
}  # fmt: skip
# Of a run, what its weights need: the model that they are part of, and what it predicts.
OF_A_MODEL = (
    *ModelConfig.model_fields, *LoraConfig.model_fields, *TextEncoderConfig.model_fields, "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip


def evaluate(config: Evaluation) -> None:
    """Evaluate what `config` names; print a table, and write evaluation.json, tables of errors, pictures and a page.

    Raises RecipeError, and Stopped.
    """
    targets = [find_target(name, config.weights, EXPORTED) for name in config.targets]
    for target in targets:
        check_is_model(target)
    recipes = [recipe_of(target, targets, config) for target in targets]
    output_dir = output_dir_of(config, targets)
    hide_library_bars()
    accelerator = start_accelerator(recipes[0])
    evaluated: list[Evaluated] = []
    built: Run | None = None
    built_by: Recipe | None = None
    scorer: Scorer | None = None
    for target, recipe in zip(targets, recipes, strict=True):
        recipe = recipe.model_copy(update={"mixed_precision": accelerator.mixed_precision})
        if built is None or recipe != built_by:
            built, built_by = build_run(recipe, accelerator, None), recipe
            built.validator.samples_at_once = AtOnce(config.batch_size, "the errors")
        if scorer is None and accelerator.is_main_process and config.num_pictures:
            scorer = Scorer.of(built, config)
        with weights_of(target, built, config.weights):
            found = measure(target, built, config, evaluated[0] if evaluated else None)
        if scorer is not None and found.pictures:
            scorer.add_to(found)
        evaluated.append(found)
    if accelerator.is_main_process:
        say(table(evaluated))
        try:
            write_results(evaluated, scorer, output_dir)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise RecipeError(
                f"--output_dir {output_dir} cannot be written ({error}): make room, or choose another"
            ) from error
    accelerator.end_training()


# ------------------------------------------------------------------------------------------ what is evaluated


def check_is_model(target: Target) -> None:
    """Raises RecipeError for a folder that is no model."""
    path = Path(target.name).expanduser()
    if target.run is None and path.is_dir() and not (path / "model_index.json").is_file():
        raise RecipeError(
            f"{target.name} is neither a run of this program, nor a checkpoint of one, nor a pipeline: give the "
            "--output_dir of a run, a checkpoint-N in it, or a folder with a model_index.json"
        )


def recipe_of(target: Target, targets: list[Target], config: Evaluation) -> Recipe:
    """A recipe that puts a target together, with the data and settings of the first run. Raises RecipeError.

    So all meet the same rows, drawn by that run's seed.
    """
    changes = {**ONE_BY_ONE, **config.given}
    first_run = next((each.run for each in targets if each.run), None)
    lora = product_of(target.run) if target.run and target.weights is None else None
    is_lora = lora is not None and lora.name == LORA_FILE
    if target.weights is None and not is_lora:
        model = str(target.run) if target.run else target.name
        own = {"clip_skip": settings_of(target.run, {}).get("clip_skip")} if target.run else {}
        changes = {**OF_THE_BASE, **own, **changes, "pretrained_model_name_or_path": model}
    elif target.run and (target.run != first_run or is_lora):
        own = settings_of(target.run, {})
        if is_lora:  # which says by itself what it is
            own |= {**NO_LORA, "lora_weights": str(lora), "lora_text_encoder": own["lora_text_encoder"]}
        changes = {**{name: own[name] for name in OF_A_MODEL if name in own}, **changes}
    recipe = settings_of(first_run, changes) if first_run else {"seed": 0, **NOT_TRAINED, **changes}
    recipe |= {name: NOT_TRAINED[name] for name in ("dry_run", "validation_prompts", "validation_pictures")}
    if not recipe.get("validation_split"):
        raise RecipeError(
            f"{target.name}: nothing is held out, of which errors and pictures could tell something: give "
            "--validation_split a split, a folder, or a share of the rows, and the data's flags (or --config RECIPE)"
        )
    return build_recipe(recipe)


def output_dir_of(config: Evaluation, targets: list[Target]) -> Path:
    """Where the results go. Raises RecipeError if that holds anything but earlier results."""
    run = next((target.run for target in targets if target.run), None)
    output_dir = Path(config.output_dir) if config.output_dir else (run or Path()) / EVALUATION
    check_is_folder_of(EVALUATION_RESULTS, output_dir)
    return output_dir


@contextmanager
def weights_of(target: Target, built: Run, which: str) -> Iterator[None]:
    """Within this context the run has the target's weights. Raises RecipeError if they do not fit it."""
    if target.weights is None:
        yield
        return
    weights = {}
    try:
        verify_checkpoint(target.weights)
        for name, part in built.state.parts.items():
            averaged = target.weights / f"{name}{AVERAGE}" / part.weights_file
            plain = target.weights / name / part.weights_file
            weights[name] = load_file(averaged if which == "evaluated" and averaged.is_file() else plain)
    except (DamagedCheckpoint, OSError, SafetensorError) as error:
        raise RecipeError(f"{target.name} cannot be used: {one_line(error)}") from error
    try:
        replaced = built.state.replaced(built.model.components, weights)
        with replaced:
            yield
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise RecipeError(f"{target.name} does not fit its run's model ({one_line(error, 300)})") from error


# ------------------------------------------------------------------------------------------ measuring


def measure(target: Target, built: Run, config: Evaluation, first: Evaluated | None) -> Evaluated:
    """The errors of a target's weights, their bits, and the pictures that they draw. Every process has to call it.

    Compared with the `first` target, if there is one. Raises RecipeError and Stopped.
    """
    validator = built.validator
    if config.bound:
        process_of(validator)  # before anything takes time
    errors = validator.errors()
    num_timesteps = len(validator.objective.schedule.snr)
    figures = {}
    if errors is not None:
        before = first.errors if first and first.num_timesteps == num_timesteps else None
        figures = figures_of(errors, before if before is not None else errors, num_timesteps)
    bits, bits_before = None, first.bits if first else None
    if config.bound:
        bits = count_bits(
            validator,
            rows=config.bound_rows,
            timesteps=config.timesteps_of_bound,
            variance=config.bound_variance,
            before=bits_before,
        )
    prompts = held_out_captions(built, config.num_pictures)
    pictures = draw(built, prompts, config.batch_size)
    found = Evaluated(target.name, errors, figures, prompts, pictures, num_timesteps, target.run, bits=bits)
    if bits is not None:
        found.bit_figures = bit_figures(bits, bits_before)
    return found


def held_out_captions(built: Run, number: int) -> list[str]:
    """So many captions of held-out rows, from the first again where there are fewer."""
    watched = built.validator.watched
    assert watched is not None
    captions = watched.captions(number)
    return [captions[place % len(captions)] for place in range(number)] if captions else []


@torch.no_grad()
def draw(built: Run, prompts: list[str], at_once: int) -> list[Image.Image]:
    """A picture of each prompt, with the same noise for every target; shared out to the processes. Raises Stopped."""
    validator, accelerator = built.validator, built.accelerator
    numbers = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    own: dict[int, Image.Image] = {}
    if numbers:
        with validator.encoder.on_device(), validator.evaluating(), accelerator.autocast():
            pipeline = drawing_pipeline(validator.family, validator.components, built.recipe.validation_sampler)
            # The same noise for all, whatever their runs' seeds.
            recipe = built.recipe.model_copy(update={"seed": PICTURE_SEED})
            ask = partial(validator.family.prompt_arguments, validator.components)
            work = partial(draw_pictures, pipeline, ask, prompts, recipe, validator.picture_size, numbers)
            own = dict(zip(numbers, AtOnce(at_once, "pictures").attempt(work) or [], strict=False))
    drawn = {number: picture for each in all_gather(own) for number, picture in each.items()}
    stop_request.check(STOPPED)
    return [drawn[number] for number in sorted(drawn)]


@dataclass
class Scorer:
    """Scores drawn pictures by their captions, and by features of held-out and training pictures."""

    image_text: ImageTextScore | None
    features: FeatureModel | None
    of_held_out: Any = None  # (N, D)
    of_training: Any = None  # (M, D)
    training_pictures: list[Image.Image] = field(default_factory=list)
    why_not: str | None = None  # there are no scores of features

    @classmethod
    def of(cls, built: Run, config: Evaluation) -> Scorer:
        """Raises RecipeError for a model that cannot be loaded."""
        recipe, size = built.recipe, built.validator.picture_size
        name = config.feature_model or (TINY_FEATURES if max(size) <= TINY_SIDE else None)
        clip = config.clip_model or (TINY_FEATURES if name == TINY_FEATURES else None)
        device = built.accelerator.device
        image_text = ImageTextScore(clip, device, recipe.cache_dir) if clip else None
        if name is None:
            why = "there are no scores of features: name a network by --feature_model, such as facebook/dinov2-small"
            logger.warning("%s.", why.capitalize())
            return cls(image_text, None, why_not=why)
        features = FeatureModel(name, device=device, batch_size=config.batch_size, cache_dir=recipe.cache_dir)
        assert built.data.held_out is not None
        assert built.data.rows is not None or built.data.watched is not None
        rows = built.data.rows if built.data.rows is not None else built.data.watched.rows  # type: ignore[union-attr]
        held_out = [pixels for _, pixels in real_pictures(built.data.held_out.rows, recipe, size)]
        chosen = choose(rows, config.num_training_pictures).rows
        training = [pixels for _, pixels in real_pictures(chosen, recipe, size)]
        if not held_out or len(training) < 2:
            why = "there are no scores of features: the rows hold moments instead of pictures, or too few"
            logger.warning("%s.", why.capitalize())
            return cls(image_text, None, why_not=why)
        pictures = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in training]
        return cls(image_text, features, features(held_out), features(training), pictures)

    def add_to(self, evaluated: Evaluated) -> None:
        """Score the pictures of what was evaluated."""
        if self.image_text:
            evaluated.figures["image_text_score"] = self.image_text(evaluated.pictures, evaluated.prompts)
        if self.features:
            drawn = self.features(evaluated.pictures)
            evaluated.scores, evaluated.missing = score_features(drawn, self.of_held_out, self.of_training)
            evaluated.neighbours = nearest_training_pictures(drawn, self.of_training)


# ------------------------------------------------------------------------------------------ results


def table(evaluated: list[Evaluated]) -> str:
    """Figures in rows, a column for each target."""
    rows = figure_rows(evaluated)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def write_results(evaluated: list[Evaluated], scorer: Scorer | None, output_dir: Path) -> None:
    """evaluation.json, errors and grids of each target, and the page. Raises OSError."""
    output_dir.mkdir(parents=True, exist_ok=True)
    features = scorer.features.name if scorer and scorer.features else None

    def is_above(run: Path | None) -> bool:
        return run is not None and (run / EVALUATION).resolve() == output_dir.resolve()

    content = {
        "features": features,
        "targets": [
            {
                "target": each.name,
                "figures": each.figures,
                "scores": as_json(each.scores),
                "missing": each.missing,
                "num_pictures": len(each.pictures),
                "of_this_run": is_above(each.run),
                **({"bound": each.bit_figures} if each.bit_figures else {}),
            }
            for each in evaluated
        ],
    }
    text = json.dumps(in_texts(redacted, content), indent=1, ensure_ascii=False) + "\n"
    replace_file(output_dir / EVALUATION_RESULTS, text)  # first, since it says whose folder this is
    for number, each in enumerate(evaluated, 1):
        about = {"target": redacted(each.name), "num_train_timesteps": each.num_timesteps}
        if each.errors is not None:
            write_table(each.errors, output_dir / f"errors-{number}.parquet", about)
        if each.bits is not None:
            write_table(error_table(each.bits), output_dir / f"bits-{number}.parquet", about)
        if each.pictures:
            grid = picture_grid(each.pictures, in_texts(redacted, each.prompts))
            save_whole(grid, output_dir / f"pictures-{number}.png")
    page = write_evaluation_page(evaluated, scorer.training_pictures if scorer else [], features, output_dir)
    say(f"\nresults         {output_dir / EVALUATION_RESULTS}\npage            {page}")
    if any(is_above(each.run) for each in evaluated):  # whose page shows its bits
        say(f"page of the run {write_run_page(output_dir.parent)}")
