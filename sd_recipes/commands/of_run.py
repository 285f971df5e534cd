"""Runs, checkpoints and models by their names, for commands that look at what was learned without training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from sd_recipes.checkpoints.best import BEST, list_best
from sd_recipes.checkpoints.format import MANIFEST, DamagedCheckpoint, Manifest, list_checkpoints, verify_checkpoint
from sd_recipes.checkpoints.run_folder import holds_run
from sd_recipes.checkpoints.snapshots import AVERAGES
from sd_recipes.errors import RecipeError, one_line
from sd_recipes.export.safetensors_file import check_range
from sd_recipes.flags import build_recipe, is_resolved_recipe, read_recipe_file
from sd_recipes.model.components import Components, load_scheduler
from sd_recipes.model.families import family_of
from sd_recipes.model.family import Family
from sd_recipes.model.loading import fill
from sd_recipes.model.lora_files import (
    ADAPTER_METADATA,
    LORA_FILE,
    LORA_PARTS,
    Lora,
    is_lora,
    layer_shapes,
    lora_parts,
    merge_lora,
    open_lora,
    read_lora,
)
from sd_recipes.model.sources import MODEL
from sd_recipes.model.weight_files import UnreadableWeights, Weights, open_weights
from sd_recipes.recipe import DIFFUSERS_LENGTH, ModelConfig, Recipe
from sd_recipes.training.build_model import convert
from sd_recipes.training.build_parts import LORA
from sd_recipes.training.state import AVERAGE, CONFIG, SNAPSHOTS

# What is left out of a run that is not trained, only evaluated.
NOT_TRAINED: dict[str, Any] = {
    "dry_run": True, "use_ema": False, "offload_ema": False, "ema_length": DIFFUSERS_LENGTH, "ema_snapshots": False,
    "ema_snapshots_limit": None, "compile": None, "compile_unet": False, "weights_dtype": "float32",
    "fused_backward_pass": False, "cache_latents": "off", "check_data": "off", "report_to": "none",
    "validation_prompts": None, "validation_clip_model": None, "validation_pictures": 0, "early_stopping": None,
    "export": "end", "profile_steps": 0,
}  # fmt: skip
# Where a checkpoint has a part's weights of each kind: suffixes of folders, the first that is there counts.
KINDS_IN_CHECKPOINT: dict[str | None, tuple[str, ...]] = {
    None: (AVERAGE, ""), "raw": ("",), "averaged": (AVERAGE,), "best": ("",),
    **{suffix.removeprefix("_"): (suffix,) for suffix in SNAPSHOTS},
}  # fmt: skip
LATENTS = 64  # a side of what a UNet is meant for, if its configuration does not say
PIPELINE_FILE = "model_index.json"
EXPORTED = (PIPELINE_FILE, LORA_FILE)  # one of which a run has in its folder when it is done
MODEL_PARTS = ("vae", *LORA_PARTS)  # those of a pipeline that have weights


def settings_of(run_dir: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run in a folder, with changes and what is not trained left out. Raises RecipeError."""
    path = run_dir / "recipe.yaml"
    if not is_resolved_recipe(path):
        raise RecipeError(f"{path} is not as the run wrote it: start the run once more, which writes it")
    return {**read_recipe_file(str(path)), **NOT_TRAINED, "output_dir": str(run_dir), **changes}


def product_of(run: Path) -> Path:
    """The file by which a run's pipeline or LoRA is loaded once it is done. Raises RecipeError."""
    settings = settings_of(run, {})
    is_lora = settings.get("lora_rank") or settings.get("lora_weights")
    return run / (LORA_FILE if is_lora else PIPELINE_FILE)


# ------------------------------------------------------------------------------------------ what a name stands for


@dataclass(frozen=True)
class Target:
    """What a name stands for: a model, or weights of a run, which has the rest."""

    name: str
    run: Path | None
    weights: Path | None = None  # a checkpoint, the best weights or averages; None for a model


def find_target(name: str, weights: str, exported: tuple[str, ...] = (PIPELINE_FILE,)) -> Target:
    """What a name stands for; a run for its pipeline, or for its newest checkpoint if that is not as far.

    `weights` is `evaluated`, or says which are wanted: a run has them in its newest checkpoint, and the `best` in a
    folder of their own. `exported` are files of which a run has one in its folder when it is done. Raises RecipeError
    for a path where there is nothing, and for a run that has saved nothing of that kind.
    """
    path = Path(name).expanduser()
    looks_like_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if not name or (looks_like_path and not path.exists()):
        raise RecipeError(f"{name or 'an empty name'}: no such file or folder")
    if (path / MANIFEST).is_file():
        run = path.resolve().parent
        return Target(name, run.parent if run.name in (BEST, AVERAGES) else run, path)
    if path.name == BEST and path.is_dir():
        return Target(name, path.resolve().parent, _best(path.resolve().parent, name))
    if not path.is_dir() or not holds_run(path):
        return Target(name, None)
    if weights == "best":
        return Target(f"{name} (best)", path, _best(path, name))
    done = next((path / file for file in exported if (path / file).is_file()), None)
    newest = next(reversed(list_checkpoints(path)), None)
    if newest is None and done is None:
        raise RecipeError(f"{name} is a run without a checkpoint or a pipeline so far: train on, and come back then")
    has_moved_on = newest is not None and done is not None and newest.stat().st_mtime > done.stat().st_mtime
    if newest is None or (done is not None and weights == "evaluated" and not has_moved_on):
        return Target(name, path)
    return Target(f"{name} ({newest.name})", path, newest)


def _best(run: Path, name: str) -> Path:
    kept = list_best(run)
    if not kept:
        raise RecipeError(f"{name} holds no weights that a run has kept as its best: name a checkpoint, or the run")
    return kept[-1]


# ------------------------------------------------------------------------------------------ loading without training


@dataclass(frozen=True)
class LoadedModel:
    """A model in float32 on the CPU, and what is known of it."""

    family: Family
    components: Components
    recipe: Recipe | None = None  # of the run that it is of
    lora: Lora | None = None  # which a run trained instead of the model itself; it is not merged into the components

    @property
    def resolution(self) -> int:
        """Pixels a side that its run trained at, or that its UNet is meant for."""
        if self.recipe is not None:
            return self.recipe.resolution
        latents = self.components.unet.config.sample_size
        return (latents if isinstance(latents, int) else LATENTS) * self.components.vae_scale_factor

    @property
    def parts(self) -> dict[str, Any]:
        """What a LoRA may change."""
        return lora_parts(self.components)

    def check_range(self, dtype: str) -> None:
        """Raises RecipeError for weights that a type (fp32, fp16, bf16) cannot hold."""
        for part, module in {"vae": self.components.vae, **self.parts}.items():
            check_range(module.state_dict(prefix=f"{part}."), dtype)


def load_model(name: str, weights: str | None, flags: Mapping[str, Any], flag: str = MODEL) -> LoadedModel:
    """The model that `name` stands for: a run, a checkpoint, a pipeline, a single file or a Hub id.

    `weights` chooses among a run's (None: those that are evaluated), and `flags` are settings of ModelConfig, which
    count more than the run's own. Its data are not needed. Raises RecipeError, which names the model by `flag`.
    """
    try:
        return _load(find_target(name, weights or "evaluated", EXPORTED), weights, flags)
    except RecipeError as error:
        raise RecipeError(str(error).replace(f"{MODEL} ", f"{flag} ".lstrip())) from error


def _load(target: Target, weights: str | None, flags: Mapping[str, Any]) -> LoadedModel:
    if target.weights is not None:
        return _load_weights(target, weights, flags)
    if lora_file(target.name):
        raise RecipeError(
            f"{MODEL} {target.name} is a LoRA: name the model that it was trained on, and add --lora {target.name}"
        )
    if weights is not None:
        holds = "is a run that has kept no checkpoint" if target.run else "is a model, with one kind of weights"
        raise RecipeError(f"--weights {weights}: {target.name} {holds}: drop --weights")
    if target.run and (product := product_of(target.run)).name == LORA_FILE:
        base = load_base(target.run, flags, {})
        return replace(base, lora=open_lora(product, str(product), base.parts))
    recipe = build_recipe(settings_of(target.run, {})) if target.run else None
    own = {"clip_skip": recipe.clip_skip} if recipe else {}  # which a pipeline's files do not say
    config = ModelConfig(**{**own, **flags, "pretrained_model_name_or_path": str(target.run or target.name)})
    family = family_of(config)
    components = family.load(config, load_scheduler(config), family.load_tokenizers(config))
    return LoadedModel(family, components, recipe)


def load_base(run: Path, flags: Mapping[str, Any], changes: Mapping[str, Any]) -> LoadedModel:
    """The model that a run began with, predicting what the run trains it to. Raises RecipeError."""
    recipe = build_recipe(settings_of(run, {**flags, **changes}))
    try:
        family = family_of(recipe)
        components = family.load(recipe, load_scheduler(recipe), family.load_tokenizers(recipe))
    except RecipeError as error:
        raise RecipeError(
            f"{error} ({run / 'recipe.yaml'} says so; its relative paths begin where the run was started)"
        ) from error
    convert(recipe, components, is_new=False)
    return LoadedModel(family, components, recipe)


def _load_weights(target: Target, weights: str | None, flags: Mapping[str, Any]) -> LoadedModel:
    """A run's base with what a checkpoint, the best weights or averages hold of it. Raises RecipeError."""
    path = target.weights
    assert path is not None
    assert target.run is not None
    found = _tensors_in(target, path, weights)
    if weights is not None and (weights == "best") != (path.parent.name == BEST):
        way_out = f"name {target.run}" if weights == "best" else "drop --weights"
        raise RecipeError(f"--weights {weights}: {target.name} holds weights of another kind: {way_out}")
    of_scratch = settings_of(target.run, {}).get("train_from_scratch") and "unet" in found
    base = load_base(target.run, flags, {"unet_config": str(found["unet"].folder / CONFIG)} if of_scratch else {})
    lora: dict[str, Any] = {}
    for part, each in found.items():
        try:
            if is_lora(each.tensors.shapes):
                lora |= each.lora_of(base)
            else:
                fill(getattr(base.components, part), each.tensors, part)
        except (UnreadableWeights, SafetensorError, OSError) as error:
            raise RecipeError(f"{target.name} does not fit its run's model ({one_line(error)})") from error
    return LoadedModel(base.family, base.components, base.recipe, lora or None)


@dataclass(frozen=True)
class PartInCheckpoint:
    """The weights of one part of a model, or of its LoRA, and the folder that they lie in."""

    part: str
    folder: Path
    tensors: Weights

    def lora_of(self, model: LoadedModel) -> Lora:
        """The LoRA that it is, for a model. Raises UnreadableWeights.

        A checkpoint has it by peft's names with its settings beside it; a file of it has both in one.
        """
        settings = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
        metadata = {ADAPTER_METADATA: json.dumps({f"{self.part}.{name}": value for name, value in settings.items()})}
        renamed = self.tensors.renamed({f"{self.part}.{name}": name for name in self.tensors.shapes})
        return read_lora(replace(renamed, metadata=metadata), layer_shapes(model.parts), model.parts["unet"].config)


def _tensors_in(target: Target, path: Path, weights: str | None) -> dict[str, PartInCheckpoint]:
    """What a checkpoint has of each part in weights of that kind. Raises RecipeError."""
    try:
        folders = _part_folders(target, path, verify_checkpoint(path), weights)
        files = {part: next(folder.glob("*.safetensors")) for part, folder in folders.items()}
        return {
            part: PartInCheckpoint(
                part, file.parent, open_weights(file, f"{file.parent.name}/{file.name}", allow_pickle=False)
            )
            for part, file in files.items()
        }
    except (DamagedCheckpoint, UnreadableWeights, OSError) as error:
        raise RecipeError(f"{target.name} cannot be used ({one_line(error)}): name another checkpoint") from error


def _part_folders(target: Target, path: Path, manifest: Manifest, weights: str | None) -> dict[str, Path]:
    """The folder of each part's weights of that kind. Raises RecipeError if there are none."""
    names = {PurePosixPath(file).parent.name for file in manifest.files if file.endswith(".safetensors")}
    folders = {}
    for part in MODEL_PARTS:
        wanted = [part + of + kind for kind in KINDS_IN_CHECKPOINT[weights] for of in ("", LORA)]
        if found := next((folder for folder in wanted if folder in names), None):
            folders[part] = path / found
    if not folders:
        there = [kind for kind, (suffix, *_) in KINDS_IN_CHECKPOINT.items() if kind and f"unet{suffix}" in names]
        raise RecipeError(
            f"{target.name} has no {weights or 'raw'} weights: give --weights {' or '.join(there)}, which it has"
        )
    return folders


def lora_file(name: str) -> Path | None:
    """The file, if that is what a name stands for: a LoRA, or the folder of one that is no run.

    Raises RecipeError for one in a checkpoint, which has its settings, and maybe more of it, in other files.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / LORA_FILE).is_file() and not holds_run(path):
        return path / LORA_FILE
    if not path.is_file():
        return None
    try:
        if not is_lora(open_weights(path, path.name, allow_pickle=False).shapes):
            return None
    except UnreadableWeights:  # which is told when it is loaded as a model
        return None
    if (path.parent.parent / MANIFEST).is_file():
        raise RecipeError(f"{name} is the LoRA of one model in a checkpoint: name the checkpoint, {path.parent.parent}")
    return path


def merge_loras(model: LoadedModel, files: list[tuple[str, float]]) -> None:
    """Merge into the model's weights what its run trained of a LoRA, and LoRA files with their weights.

    Raises RecipeError for a file that holds none for this model, before anything is changed.
    """
    loras = [(_open(file, model), weight) for file, weight in files]
    if model.lora is not None:
        loras.insert(0, (model.lora, 1.0))
    for lora, weight in loras:
        merge_lora(model.parts, lora, weight)


def _open(name: str, model: LoadedModel) -> Lora:
    """The LoRA in a file, in a folder of one, or in a checkpoint of a run that trains one. Raises RecipeError."""
    place, path = f"--lora {name}", Path(name).expanduser()
    if not (path / MANIFEST).is_file():
        file = lora_file(name)
        return open_lora(file or name, place, model.parts)
    found = _tensors_in(Target(place, None, path), path, None)
    try:
        return {part: layers for each in found.values() for part, layers in each.lora_of(model).items()}
    except (UnreadableWeights, SafetensorError, OSError) as error:
        raise RecipeError(f"{place} cannot be used ({one_line(error)}): name another") from error
