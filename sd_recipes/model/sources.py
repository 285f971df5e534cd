"""Where a model's parts come from: a pipeline folder, a Hub repository or a single file, and what fills in the rest."""

from __future__ import annotations

import difflib
import json
import logging
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import CLIPTokenizer

from sd_recipes import assets
from sd_recipes.errors import RecipeError, one_line
from sd_recipes.flags import is_resolved_recipe
from sd_recipes.model import recognise
from sd_recipes.model.distilled import distilled
from sd_recipes.model.loading import COMPILED, say_unwrapped, unwrapped
from sd_recipes.model.lora_files import LORA_FILE
from sd_recipes.model.original_layout import take_part
from sd_recipes.model.recognise import PARTS, Recognised
from sd_recipes.model.weight_files import (
    SUFFIXES,
    PickledWeights,
    UnreadableWeights,
    Weights,
    joined,
    open_weights,
)
from sd_recipes.reading import read_text
from sd_recipes.recipe import ModelConfig

logger = logging.getLogger(__name__)

MODEL = "--pretrained_model_name_or_path"
# Of a part's folder: its configuration, and the beginning of its weight files' names, as safetensors and as pickles.
CONFIGS = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
}
STEMS = {
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"),
    "text_encoder_2": ("model", "pytorch_model"),
}
ENCODER_LAYER = "modelspec.encoder_layer"  # of a single file: which layer from the end its text states are of
MAX_JSON_BYTES = 64 * 2**20  # of a configuration, or of the index of a part's shards
HUB_VARIANTS = ("fp16", "bf16")  # tried where the plain files are missing; a folder shows which there are


@dataclass
class Source(ABC):
    """A model as it was named by a flag."""

    flag: str
    name: str
    config: ModelConfig
    way_out = "get the whole of it again, with the config.json that was saved with it"

    @property
    def place(self) -> str:
        return f"{self.flag} {self.name}"

    @property
    @abstractmethod
    def recognised(self) -> Recognised:
        """What it is, and which parts it has."""

    @property
    @abstractmethod
    def distilled(self) -> str | None:
        """If it is a model that draws in a few steps, how that is known and what to do instead of training it."""

    @abstractmethod
    def read_config(self, part: str) -> dict[str, Any]:
        """The JSON of a part's configuration. Raises RecipeError."""

    @abstractmethod
    def weights(self, part: str, config: Mapping[str, Any], names: Iterable[str]) -> Weights:
        """The tensors of a part, named as the module `names` them. Raises RecipeError."""

    @abstractmethod
    def tokenizer(self, part: str) -> CLIPTokenizer:
        """Raises RecipeError."""

    @property
    @abstractmethod
    def pipeline_settings(self) -> Mapping[str, Any]:
        """What its model_index.json says; empty without one. Raises RecipeError."""

    def noise_schedule_hints(self) -> dict[str, Any]:
        """What the weights themselves say of the scheduler's settings."""
        return {}

    @property
    def encoder_layer(self) -> int | None:
        """Which layer from the end its text states are of, if it says so; the last is 1."""
        return None

    def say_noise_schedule(self) -> None:
        """Say what was taken from the weights, or could not be."""
        if hints := self.noise_schedule_hints():
            settings = ", ".join(f"{name} {value}" for name, value in hints.items())
            logger.info("%s says of itself, and it is trained so: %s.", self.place, settings)
        elif self.recognised.generation == 2 and not self.config.base:
            logger.warning(
                "%s is of Stable Diffusion 2 and does not say what it predicts: v is taken, as for its models of 768 "
                "pixels. For one that was made from 2-base (512 pixels) give --prediction_type epsilon.", self.place,
            )  # fmt: skip

    def cannot_load(self, part: str, words: object, error: Exception | None = None) -> NoReturn:
        raise RecipeError(f"{self.place}: cannot load {part}: {words}") from error


def source_of(config: ModelConfig, part: str) -> Source:
    """Where `part` comes from: --vae, the model itself, or --base. Raises RecipeError if none of them has it."""
    if part == "vae" and config.vae:
        source = open_source(config.vae, "--vae", config)
        if part not in source.recognised.parts:
            raise RecipeError(f"{source.place} is {source.recognised.words}: name a VAE, or a model that has one")
        return source
    model = open_source(config.pretrained_model_name_or_path or "", MODEL, config)
    if part in model.recognised.parts:
        return model
    if config.base is None:
        raise RecipeError(lacks(model))
    base = open_source(config.base, "--base", config)
    if part not in base.recognised.parts:
        raise RecipeError(f"{lacks(model)}; {base.place} is {base.recognised.words} and has none either")
    return base


def lacks(model: Source) -> str:
    """Which parts a model lacks, and the way out."""
    name = f"{model.place} is {model.recognised.words}"
    above = Path(model.name).expanduser().resolve().parent
    if isinstance(model, Folder) and (above / "model_index.json").is_file():
        return f"{name}, of the pipeline above it: name that one, {above}"
    missing = [part for part in model.recognised.missing if not (part == "vae" and model.config.vae)]
    if isinstance(model, Folder):
        folders = ", ".join(f"{part}/" for part in missing)
        parts = f"the folder{'s' if len(missing) > 1 else ''} {folders}"
    else:
        parts = ", ".join(part.replace("_", " ") for part in missing)
    flag = "--vae NAME" if missing == ["vae"] else "--base NAME"
    return f"{name} and lacks {parts}: add {flag}, a model to take that from"


def open_source(name: str, flag: str, config: ModelConfig) -> Source:
    """The model that a flag names. Raises RecipeError if there is none, or it is of a kind that cannot be used."""
    source = _open(name, flag, config)
    if not source.recognised.parts:
        raise RecipeError(f"{source.place} is {source.recognised.words}: {source.recognised.way_out}")
    return source


def _open(name: str, flag: str, config: ModelConfig) -> Source:
    if not name.strip():
        raise RecipeError(f"{flag} is empty: name a folder, a file or a Hub id")
    if name in assets.ASSETS:
        return Folder(flag, assets.resolve(name), config)
    if "://" in name:
        raise RecipeError(f"{flag} {name} is an address: {_instead_of_address(name)}")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~ of a user that there is not
        raise RecipeError(f"{flag} {name}: {one_line(error)}: write the whole path") from error
    if path.is_dir():
        return Folder(flag, name, config)
    if path.exists():
        return SingleFile(flag, name, config)
    is_file = path.suffix.lower() in SUFFIXES
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name or is_file
    if looks_like_path and re.fullmatch(r"[\w.-]+", name) and not is_file and not name.startswith("."):
        looks_like_path = False  # a Hub id without an owner, as the first models have
    if looks_like_path:
        raise RecipeError(f"{flag} {name}: no such {'file' if is_file else 'folder'}{_near(path)}")
    return HubRepository(flag, name, config)


def _near(path: Path) -> str:
    """Why a path may not be there."""
    if "\\" in str(path):
        return ": on this system folders are separated by /, not by \\"
    if not path.parent.is_dir():
        return f": there is no folder {path.parent} either"
    near = difflib.get_close_matches(path.name, [each.name for each in path.parent.iterdir()], n=1)
    return f" (nearest: {path.parent / near[0]})" if near else f": look into {path.parent.resolve()}"


def _instead_of_address(name: str) -> str:
    if match := re.match(r"https://huggingface\.co/([\w.-]+/[\w.-]+)(?:/(?:blob|resolve)/[\w.-]+/(.+))?", name):
        repo, file = match[1], (match[2] or "").partition("?")[0]
        return f"get the file with `hf download {repo} {file} --local-dir .` and name it" if file else f"name {repo}"
    return "download the file, and name it here"


# ----------------------------------------------------------------------------------------------- folders


class Folder(Source):
    """A pipeline, or some parts of one, in diffusers format: files below a folder of this machine."""

    under_another_name = "rename the folder"

    @property
    def path(self) -> Path:
        return Path(self.name).expanduser()

    @cached_property
    def recognised(self) -> Recognised:
        if self.is_one_part:
            return recognise.of_part(self.read_json("config.json") or {})
        # Of a model whose UNet is not taken, it does not matter which one it has.
        takes_unet = self.flag != "--vae" and not (self.config.train_from_scratch and self.config.unet_config)
        unet = (self.read_json("unet/config.json") or {}) if takes_unet else {}
        other = recognise.of_unet(unet)
        index = self.read_json("model_index.json")
        found = recognise.of_pipeline(index) if index else self._recognise_without_index()
        if recognise.is_xl_unet(unet):
            found = replace(found, generation="XL")
        return other if other and found.parts else self._with_parts_there(found)

    @property
    def distilled(self) -> str | None:
        recipe, scheduler = self.locate("recipe.yaml"), self.read_json("scheduler/scheduler_config.json") or {}
        return distilled(
            self.path.absolute(),
            self.under_another_name,
            sampler=scheduler.get("_class_name"),
            of_run=recipe is not None and is_resolved_recipe(recipe.resolve()),
        )

    def _recognise_without_index(self) -> Recognised:
        return recognise.of_plain_folder(self.path)

    def _with_parts_there(self, found: Recognised) -> Recognised:
        there = frozenset(part for part in found.parts if (self.path / part).is_dir())
        return replace(found, parts=there or found.parts)

    def locate(self, relative: str) -> Path | None:
        """A file, or None if there is none of that name."""
        path = self.path / relative
        return path if path.exists() else None

    def read_json(self, relative: str) -> dict[str, Any] | None:
        """A file of settings; None if there is no such file. Raises RecipeError."""
        path = self.locate(relative)
        if path is None:
            return None
        try:  # the Hub's cache consists of links, which read_text does not follow
            content = json.loads(read_text(path.resolve(), MAX_JSON_BYTES))
        except (OSError, ValueError, RecursionError) as error:
            raise RecipeError(f"{self.place}: {relative} is no JSON file ({one_line(error, 100)})") from error
        if not isinstance(content, dict):
            raise RecipeError(f"{self.place}: {relative} is not a JSON object of settings")
        return content

    @cached_property
    def is_one_part(self) -> bool:
        return self.read_json("model_index.json") is None and self.read_json("config.json") is not None

    def folder_of(self, part: str) -> str:
        """Of a part: a folder of its name, or this one, if it is that part alone."""
        return "" if self.is_one_part else f"{part}/"

    def read_config(self, part: str) -> dict[str, Any]:
        relative = self.folder_of(part) + CONFIGS.get(part, "config.json")
        config = self.read_json(relative)
        if config is None:
            self.cannot_load(part, f"there is no {relative}")
        return config

    def weights(self, part: str, config: Mapping[str, Any], names: Iterable[str]) -> Weights:
        opened = []
        for path in self._weight_files(part):
            shown = f"{self.folder_of(part)}{path.name}"
            try:
                opened.append(open_weights(path, shown, allow_pickle=self.config.allow_pickle_weights))
            except PickledWeights as error:
                self._refuse_pickle(part, shown, error)
            except UnreadableWeights as error:
                self.cannot_load(part, f"{shown} {error}", error)
        found = opened[0] if len(opened) == 1 else joined(opened, f"{self.folder_of(part)} with {len(opened)} shards")
        compiled = [name for name in found.shapes if COMPILED in name]
        if compiled:
            target = f"{self.path.name}-plain"
            self.cannot_load(
                part,
                f"{found.place} names {len(compiled)} of its {len(found.shapes)} tensors as a compiled model does "
                f"({compiled[0]}), under which no tool finds them: convert it with "
                f"`{convert_command(self.name, target)}` and name {target}",
            )
        return take_part(found, part, config, names)

    def _refuse_pickle(self, part: str, file: str, error: PickledWeights) -> NoReturn:
        target = f"{self.path.resolve().name}-safetensors"
        self.cannot_load(
            part,
            f"{file} {error}: convert it with `{convert_command(self.name, target)}` and name {target}, or add "
            "--allow_pickle_weights",
            error,
        )

    def _weight_files(self, part: str) -> list[Path]:
        """The files of a part's weights: those of --variant, else the plain ones, else the only variant there is."""
        folder, wanted = self.folder_of(part), self.config.variant
        variants = [wanted, None] if wanted else [None, *self._variants(part)]
        for variant in variants:
            if files := self._files_of(part, variant):
                if variant != wanted:
                    self._say_variant(part, variant, wanted)
                return files
        safe, pickled = STEMS[part]
        self.cannot_load(part, f"{folder or self.name} has neither {safe}.safetensors nor {pickled}.bin")

    def _say_variant(self, part: str, variant: str | None, wanted: str | None) -> None:
        if wanted is None:
            logger.info("%s: of the %s there are only %s weights: --variant %s.", self.place, part, variant, variant)
        elif part == "unet" and self.flag == MODEL:
            self.cannot_load(part, f"it has no --variant {wanted}: drop --variant, or name one that it has")
        else:
            logger.info("%s: of the %s there is no --variant %s: the plain weights.", self.place, part, wanted)

    def _variants(self, part: str) -> list[str]:
        """Variants of a part's weights, by the files' names."""
        stems = "|".join(set(STEMS[part]))
        names = (path.name for path in (self.path / self.folder_of(part)).glob("*"))
        pattern = re.compile(rf"(?:{stems})\.(?!safetensors|bin)(\w+?)(?:-00001-of-\d+)?\.(?:safetensors|bin)")
        found = {match[1] for name in names if (match := pattern.fullmatch(name))}
        return sorted(found, key=lambda variant: variant != "fp16")

    def _files_of(self, part: str, variant: str | None) -> list[Path]:
        """A part's files of one variant, safetensors if there are any; empty if there are none."""
        folder, dotted = self.folder_of(part), f".{variant}" if variant else ""
        for stem, suffix in zip(STEMS[part], ("safetensors", "bin"), strict=True):
            if path := self.locate(f"{folder}{stem}{dotted}.{suffix}"):
                return [path]
            index = f"{folder}{stem}.{suffix}.index{dotted}.json"
            if listed := self.read_json(index):
                return [self._shard(part, index, name) for name in _shards(listed)]
        return []

    def _shard(self, part: str, index: str, name: str) -> Path:
        if "/" in name or "\\" in name:
            self.cannot_load(part, f"{index} names a file outside its folder, {name}")
        path = self.locate(self.folder_of(part) + name)
        if path is None:
            self.cannot_load(part, f"the shard {name}, which {index} names, is missing: get the whole of the folder")
        return path

    @property
    def pipeline_settings(self) -> Mapping[str, Any]:
        return self.read_json("model_index.json") or {}

    def tokenizer(self, part: str) -> CLIPTokenizer:
        return self._from_pretrained(str(self.path), part)

    def _from_pretrained(self, name: str, part: str, **options: Any) -> CLIPTokenizer:
        # Without its files, transformers makes a tokenizer that knows no words.
        pair = (f"{part}/vocab.json", f"{part}/merges.txt")
        if self.locate(f"{part}/tokenizer.json") is None and None in map(self.locate, pair):
            self.cannot_load(part, f"there is neither {part}/tokenizer.json nor {' and '.join(pair)}")
        try:
            return CLIPTokenizer.from_pretrained(name, subfolder=part, **options)
        # transformers and huggingface_hub report an absent, broken or forbidden file with OSError, ValueError,
        # KeyError, RuntimeError or JSONDecodeError: no common base. All are about the model that the user named.
        except Exception as error:
            self.cannot_load(part, f"(CLIPTokenizer): {one_line(error, 400)}", error)


def _shards(index: Mapping[str, Any]) -> list[str]:
    named = index.get("weight_map")
    return sorted(set(map(str, named.values()))) if isinstance(named, dict) else []


def convert_command(source: str, target: str) -> str:
    return f"sd-recipes convert {shlex.quote(source)} {shlex.quote(target)}"


# --------------------------------------------------------------------------------------------------- Hub


class HubRepository(Folder):
    """A pipeline, or a part of one, in a Hub repository; files are downloaded one by one, as they are asked for."""

    under_another_name = "download it into a folder of another name, and name that"
    not_reached: Exception | None = None

    def locate(self, relative: str) -> Path | None:
        part = relative.partition("/")[0]
        try:
            return Path(hf_hub_download(self.name, relative, **self._options(part)))
        except LocalEntryNotFoundError as error:
            # The Hub was not asked, or not reached: what was downloaded before is all that can be found.
            self.not_reached = error
            if not self._was_downloaded(part):
                self.cannot_load(part, one_line(error, 400), error)
            return None
        except EntryNotFoundError:
            return None
        # huggingface_hub reports a missing, forbidden or misnamed repository with errors of several bases.
        except Exception as error:
            self.cannot_load(part, one_line(error, 400), error)

    def _options(self, part: str) -> dict[str, Any]:
        """--revision is the model's, not that of --vae or --base."""
        revision = self.config.revision
        if part == "unet" and self.config.non_ema_revision:
            revision = self.config.non_ema_revision
        return {"revision": revision if self.flag == MODEL else None, "cache_dir": self.config.cache_dir}

    def _was_downloaded(self, part: str) -> bool:
        """Whether files of the repository, at that revision, are in the cache."""
        try:
            snapshot_download(self.name, local_files_only=True, **self._options(part))
        except (LocalEntryNotFoundError, RepositoryNotFoundError):
            return False
        return True

    def _recognise_without_index(self) -> Recognised:
        try:
            files = HfApi().list_repo_files(self.name, revision=self._options("")["revision"])
        except Exception:  # offline; what is missing is said when it is asked for
            return Recognised("a repository", frozenset(PARTS))
        if LORA_FILE in files:
            return Recognised("a LoRA", way_out="name the model that it was trained on")
        if present := frozenset(part for part in PARTS if any(file.startswith(f"{part}/") for file in files)):
            words = "a repository without model_index.json"
            return Recognised(words, present, generation=recognise.generation_of(present))
        if single := next((file for file in files if file.endswith((".safetensors", ".ckpt"))), None):
            command = f"hf download {self.name} {shlex.quote(single)} --local-dir ."
            return Recognised("no pipeline, but a repository of files", way_out=f"get one with `{command}` and name it")
        return Recognised("a repository without a model", way_out="name another")

    def _with_parts_there(self, found: Recognised) -> Recognised:
        return found

    def _variants(self, part: str) -> list[str]:
        return list(HUB_VARIANTS)

    def tokenizer(self, part: str) -> CLIPTokenizer:
        return self._from_pretrained(self.name, part, **self._options(part))

    def cannot_load(self, part: str, words: object, error: Exception | None = None) -> NoReturn:
        if self.not_reached and self.not_reached is not error:
            words = f"{words} in the cache, and the Hub was not reached ({one_line(self.not_reached, 200)})"
        super().cannot_load(part, words, error)


# ----------------------------------------------------------------------------------------- a single file


class SingleFile(Source):
    """A checkpoint in one file, or a part of one, in Stable Diffusion's own layout or diffusers'.

    Its configuration is that of --base or, without it, the one of its Stable Diffusion that comes with the package.
    """

    way_out = "get the whole file, or name a --base that has its configuration"

    @cached_property
    def opened(self) -> Weights:
        path = Path(self.name).expanduser()
        try:
            return open_weights(path, path.name, allow_pickle=self.config.allow_pickle_weights)
        except PickledWeights as error:
            target = Path(self.name).with_suffix(".safetensors").name
            target = target if target != path.name else f"{path.stem}-converted.safetensors"
            raise RecipeError(
                f"{self.place} {error}: convert it with `{convert_command(self.name, target)}` and name {target}, "
                "or add --allow_pickle_weights"
            ) from error
        except UnreadableWeights as error:
            raise RecipeError(f"{self.place} {error}") from error

    @cached_property
    def recognised(self) -> Recognised:
        return recognise.of_tensors(self.opened.shapes)

    @property
    def distilled(self) -> str | None:
        path = Path(self.name).expanduser()
        of_run = is_resolved_recipe(path.parent / "recipe.yaml")
        return distilled(path, "rename the file", metadata=self.opened.metadata, of_run=of_run)

    def configurations(self) -> Source:
        """Whose configuration this file has: --base's, for --vae that of the model's own VAE, or one of the package."""
        model, base = self.config.pretrained_model_name_or_path or "", self.config.base
        generation = self.recognised.generation
        if self.flag == "--vae":
            source, is_alone = open_source(model, MODEL, self.config), self.recognised.parts == {"vae"}
            if is_alone:  # whose tensors do not tell
                generation = source.recognised.generation
            # Of another family's model it is not: the scale of its latents is another.
            is_of_model = (generation == "XL") == (source.recognised.generation == "XL")
            if is_of_model and "vae" in source.recognised.parts:
                return source
        if self.flag != "--base" and base:
            return open_source(base, "--base", self.config)
        return Folder(self.flag, str(assets.CONFIGURATIONS[generation]), self.config)

    def read_config(self, part: str) -> dict[str, Any]:
        return self.configurations().read_config(part)

    def weights(self, part: str, config: Mapping[str, Any], names: Iterable[str]) -> Weights:
        plain = {unwrapped(name): name for name in self.opened.shapes}
        found = take_part(self.opened.renamed(plain), part, config, names)
        if part == next(filter(self.recognised.parts.__contains__, LOADED)) and (
            changed := {new: old for new, old in plain.items() if new != old}
        ):
            say_unwrapped(self.place, changed)
        if part == "unet" and any(name.startswith("model_ema.") for name in self.opened.shapes):
            logger.info("%s also holds averaged weights (model_ema.); the plain ones are trained.", self.place)
        return found

    @property
    def pipeline_settings(self) -> Mapping[str, Any]:
        return self.configurations().pipeline_settings

    def tokenizer(self, part: str) -> CLIPTokenizer:
        if self.flag != "--base" and self.config.base:
            return self.configurations().tokenizer(part)
        return CLIPTokenizer.from_pretrained(str(assets.CLIP_TOKENIZER), **self.read_config(part))

    @property
    def encoder_layer(self) -> int | None:
        stated = self.opened.metadata.get(ENCODER_LAYER, "")
        return int(stated) if re.fullmatch("[0-9]{1,3}", stated) else None

    def noise_schedule_hints(self) -> dict[str, Any]:
        """By the keys that trainers put into a file, by its metadata, and by what is known of Stable Diffusion 2."""
        shapes, metadata = self.opened.shapes, self.opened.metadata
        hints: dict[str, Any] = {}
        stated = next((metadata[key] for key in PREDICTION_KEYS if metadata.get(key)), "")
        if "v_pred" in shapes:
            hints["prediction_type"] = "v_prediction"
        elif stated.lower() in PREDICTION_TYPES:
            hints["prediction_type"] = PREDICTION_TYPES[stated.lower()]
        elif self.recognised.generation == 2 and shapes.get("global_step") in ((), (1,)):
            is_base = int(self.opened.read("global_step")) == GLOBAL_STEP_OF_BASE
            hints["prediction_type"] = "epsilon" if is_base else "v_prediction"
        if "ztsnr" in shapes:
            hints |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            # Epsilon says nothing of the picture where there is no signal (Lin et al. 2024, section 3.4).
            if hints.get("prediction_type") != "sample":
                hints["prediction_type"] = "v_prediction"
        return hints


LOADED = ("text_encoder", "text_encoder_2", "vae", "unet")  # parts with weights, in that order
# Metadata that say what a model predicts: the standard's, and those of earlier versions and of ComfyUI.
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_type", "modelspec.predict_key")
PREDICTION_TYPES = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon",
                    "sample": "sample"}  # fmt: skip
GLOBAL_STEP_OF_BASE = 875000  # Stable Diffusion 2-base, which predicts epsilon; the others of its kind predict v
