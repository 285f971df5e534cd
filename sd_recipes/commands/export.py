"""`sd-recipes export`: a run, a checkpoint or a model in the form that another program reads.

    sd-recipes export runs/boats --to single_file --output boats.safetensors

The data that a run was trained on are not needed; the model that it began with is, for the parts that were not trained.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sd_recipes import assets
from sd_recipes.assets import Generation
from sd_recipes.checkpoints.format import remove
from sd_recipes.checkpoints.saver import FAILURES
from sd_recipes.commands.export_settings import Export
from sd_recipes.commands.of_run import LoadedModel, load_base, load_model, lora_file, merge_loras
from sd_recipes.errors import RecipeError, one_line
from sd_recipes.export.lora import LoraTarget, export_lora, origin_in, origin_of
from sd_recipes.export.pipeline import export_pipeline
from sd_recipes.export.safetensors_file import DTYPES, encoder_layer
from sd_recipes.export.single_file import ARCHITECTURES, check_can_be_one_file, export_single_file
from sd_recipes.model.lora_extraction import extract_lora
from sd_recipes.model.lora_files import Lora, generation_of_lora, open_lora, rank_of
from sd_recipes.model.weight_files import open_weights
from sd_recipes.redaction import shown
from sd_recipes.runtime.console import hide_library_bars, say

logger = logging.getLogger(__name__)

OF_A_PART = (".json", ".txt", ".safetensors", ".bin", ".model")  # suffixes of the files in a pipeline's folders


def export(config: Export) -> None:
    """Write what `config` names. Raises RecipeError; the output is there whole, or as it was."""
    output = Path(config.output).expanduser()
    try:
        if config.to == "pipeline":
            output = output.resolve()  # `.` has no name to write beside
            put_back(output)
        check_is_free(output, config)
    except OSError as error:
        raise RecipeError(f"--output {output} cannot be used ({one_line(error)}): choose another") from error
    hide_library_bars()
    try:
        if config.is_lora:
            write_lora(config, output)
        else:
            write_model(config, output)
    except FAILURES as error:
        raise RecipeError(
            f"--output {output} cannot be written ({one_line(error)}): make room, or choose another"
        ) from error


def check_is_free(output: Path, config: Export) -> None:
    """Raises RecipeError if something is there that may not be written over."""
    if not output.exists():
        return
    if not config.overwrite:
        raise RecipeError(f"--output {output} is there already: choose another name, or add --overwrite")
    if output.is_dir() != (config.to == "pipeline"):
        raise RecipeError(f"--output {output} is {'a folder' if output.is_dir() else 'a file'}: choose another name")
    if output.is_dir() and (others := others_in(output)):
        named = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise RecipeError(
            f"--output {output} holds something else than a pipeline ({named}), which would be lost: choose another"
        )


def others_in(folder: Path) -> list[str]:
    """What lies in a folder and is not its pipeline's: all of it, if there is none that can be read."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = {name for name, kind in index.items() if isinstance(kind, list) and any(kind)}
    except (OSError, ValueError, AttributeError):
        return sorted(path.name for path in folder.iterdir())
    others = {path.name for path in folder.iterdir()} - parts - {"model_index.json"}
    inside = [path for part in parts if (folder / part).is_dir() for path in (folder / part).iterdir()]
    others |= {f"{path.parent.name}/{path.name}" for path in inside if path.is_dir() or path.suffix not in OF_A_PART}
    return sorted(others)


# -------------------------------------------------------------------------------------------------- models


def write_model(config: Export, output: Path) -> None:
    """A pipeline or a single file, with the LoRAs merged. Raises RecipeError, OSError and SafetensorError."""
    model = load_model(config.source, config.weights, config.model, flag="")
    if config.to == "single_file":
        check_can_be_one_file(model.components)
    merge_loras(model, config.loras)
    merged = [f"{Path(file).stem}:{weight:g}" for file, weight in config.loras]
    if config.to == "pipeline":
        dtype = config.dtype or "fp32"
        model.check_range(dtype)
        with folder_beside(output) as folder:
            export_pipeline(model.family, model.components, folder, DTYPES[dtype])
        say(f"pipeline        {output}")
        return
    digest = export_single_file(
        model.components,
        output,
        dtype=config.dtype or "fp16",
        title=config.title or output.stem,
        resolution=model.resolution,
        more={
            **(origin_of(model.family, model.recipe) if model.recipe else {}),
            **({"modelspec.merged_from": ", ".join([shown(config.source), *merged])} if merged else {}),
            **encoder_layer(model.family, model.components.clip_skip),
        },
    )
    say(f"single file     {output}\nsha256 (tensors) {digest}")


def put_back(output: Path) -> None:
    """Give a folder its name back, if a kill came while `folder_beside` replaced it. Raises OSError."""
    if (old := _set_aside(output)).exists() and not output.exists():
        old.rename(output)


def _set_aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.removed")


@contextmanager
def folder_beside(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write, which then takes its place; if it cannot, what was there is still there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    beside, old = output.with_name(f".{output.name}.{os.getpid()}.partial"), _set_aside(output)
    remove(beside)  # left by a kill
    try:
        yield beside
        if output.exists():
            remove(old)
            output.rename(old)
        try:
            beside.rename(output)
        except OSError:
            put_back(output)
            raise
        remove(old)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# -------------------------------------------------------------------------------------------------- LoRAs


@dataclass(frozen=True)
class FoundLora:
    """A LoRA, the model that it changes, and what is known of its origin, as metadata."""

    lora: Lora
    target: LoraTarget
    origin: Mapping[str, str]


def write_lora(config: Export, output: Path) -> None:
    """A LoRA of a run, of a file, or extracted. Raises RecipeError, OSError and SafetensorError."""
    file = lora_file(config.source)
    found = of_file(file, config) if file is not None else of_source(config)
    if config.to == "kohya_lora":
        say_what_diffusers_cannot_read(found.lora)
    digest = export_lora(
        found.lora,
        output,
        found.target,
        kohya=config.to == "kohya_lora",
        dtype=config.dtype or "fp16",
        title=config.title or output.stem,
        origin=found.origin,
    )
    say(f"LoRA            {output}\nrank            {rank_of(found.lora)}\nsha256 (tensors) {digest}")


def say_what_diffusers_cannot_read(lora: Lora) -> None:
    """Warn of what diffusers (0.42) makes nothing of in kohya's keys."""
    if any(layer.magnitude is not None for layers in lora.values() for layer in layers.values()):
        logger.warning(
            "It is a DoRA: diffusers leaves its magnitudes out where the keys are kohya's: use --to lora there."
        )
    if "text_projection" in lora.get("text_encoder_2", {}):
        logger.warning(
            "It changes the second text encoder's text_projection, which ComfyUI reads in kohya's keys, but with which "
            "diffusers refuses such a file: use --to lora there."
        )


def of_file(file: Path, config: Export) -> FoundLora:
    """The LoRA in a file, for --base, or for Stable Diffusion 1, 2 or XL of full size. Raises RecipeError."""
    if config.rank is not None:
        raise RecipeError(f"--rank {config.rank}: {file} is a LoRA already, which is written as it is: drop --rank")
    if config.weights is not None:
        raise RecipeError(f"--weights {config.weights}: {file} is a LoRA, with one kind of weights: drop --weights")
    if config.model and "base" not in config.model:
        flag = next(iter(config.model))
        raise RecipeError(f"--{flag} is about a model, and {file} is a LoRA: drop it, or name its model with --base")
    opened = open_weights(file, str(file), allow_pickle=False)
    origin = origin_in(opened.metadata)
    if base := config.model.get("base"):
        flags = {name: value for name, value in config.model.items() if name != "base"}
        model = load_model(base, None, flags, flag="--base")
        return FoundLora(open_lora(file, str(file), model.parts), LoraTarget.of(model.components), origin)
    generation = generation_of_lora(opened.shapes) or 1
    parts = outline_of(generation)
    lora = open_lora(file, str(file), parts, unfitting="name the model that it was trained on with --base")
    xl_unet = parts["unet"].config if generation == "XL" else None
    return FoundLora(lora, LoraTarget(ARCHITECTURES[generation], xl_unet=xl_unet), origin)


def outline_of(generation: Generation) -> dict[str, Any]:
    """The models that a LoRA may change, of full size and without weights."""
    folder = assets.CONFIGURATIONS[generation]
    with init_empty_weights():
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
        }
        if generation == "XL":
            second = CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
            parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
    return parts


def of_source(config: Export) -> FoundLora:
    """The LoRA of a run, or extracted from a model. Raises RecipeError."""
    model = load_model(config.source, config.weights, config.model, flag="")
    target = LoraTarget.of(model.components)
    origin = origin_of(model.family, model.recipe) if model.recipe is not None else {}
    return FoundLora(of_model(model, config), target, origin)


def of_model(model: LoadedModel, config: Export) -> Lora:
    """The LoRA that a run has trained, or one extracted from what it has trained. Raises RecipeError."""
    if model.lora is not None and config.rank is None:
        return model.lora
    if config.rank is None:
        raise RecipeError(
            f"{config.source} was trained whole, and is no LoRA: add --rank 16 to extract one, or use --to single_file"
        )
    merge_loras(model, config.loras)
    if config.tuned_from is not None:
        base = load_model(config.tuned_from, None, config.model, flag="--tuned_from")
    elif model.recipe is None or model.recipe.train_from_scratch:
        raise RecipeError(
            f"--rank {config.rank} extracts what fine-tuning has changed: name the model that {config.source} was made "
            "from with --tuned_from"
        )
    else:
        base = load_base(Path(model.recipe.output_dir), config.model, {})
    found = extract_lora(model.parts, base.parts, config.rank)
    say(f"explained       {found.explained:.1%} of the squared change of all weights")
    vaes = (each.components.vae.state_dict().values() for each in (model, base))
    if not all(map(torch.equal, *vaes)):
        logger.warning("The VAE differs too, which a LoRA does not change: draw with the VAE of %s.", config.source)
    return found.lora
