"""kohya's dataset.toml: its keys as settings of a recipe, and a line for each key that has no counterpart.

Its format is that of `--dataset_config` in kohya's sd-scripts, as TOML or JSON. Imports no torch.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sd_recipes.errors import RecipeError, nearest, one_line
from sd_recipes.reading import StrangeFile, read_text

MAX_BYTES = 2**20
FLAG = "--dataset_config"

# What a key may hold, in words, and whether a value is that. A bool is an int in Python, and is none here.
KINDS: dict[str, Callable[[Any], bool]] = {
    "true or false": lambda value: isinstance(value, bool),
    "a whole number": lambda value: type(value) is int,
    "a number": lambda value: type(value) in (int, float),
    "text": lambda value: isinstance(value, str),
    "one whole number or two": lambda value: [type(side) for side in _sides(value)] == [int, int],
    "two numbers": lambda value: isinstance(value, list) and [type(one) in (int, float) for one in value] == [True] * 2,
    "a table": lambda value: isinstance(value, dict),
}  # fmt: skip
# By what may hold them: keys of a dataset may stand in [general] too, those of a subset in both.
OF_DATASETS = {
    "true or false": ("bucket_no_upscale", "enable_bucket"),
    "a whole number": ("batch_size", "bucket_reso_steps", "max_bucket_reso", "min_bucket_reso", "validation_seed"),
    "a number": ("network_multiplier", "validation_split"),
    "one whole number or two": ("resolution", "skip_image_resolution"),
}
OF_SUBSETS = {
    "true or false": (
        "alpha_mask", "cache_info", "color_aug", "enable_wildcard", "flip_aug", "random_crop", "shuffle_caption",
    ),
    "a whole number": ("caption_dropout_every_n_epochs", "keep_tokens", "num_repeats", "token_warmup_min"),
    "a number": ("caption_dropout_rate", "caption_tag_dropout_rate", "token_warmup_step"),
    "text": (
        "caption_extension", "caption_prefix", "caption_separator", "caption_suffix", "class_tokens",
        "keep_tokens_separator", "resize_interpolation", "secondary_separator",
    ),
    "two numbers": ("face_crop_aug_range",),
    "a table": ("custom_attributes",),
}  # fmt: skip
OF_ONE_SUBSET = {
    "true or false": ("is_reg",),
    "text": ("conditioning_data_dir", "image_dir", "metadata_file"),
}
INTERPOLATION = {
    "lanczos": "lanczos", "nearest": "nearest", "bilinear": "bilinear", "linear": "bilinear", "bicubic": "bicubic",
    "cubic": "bicubic", "area": "box", "box": "box",
}  # fmt: skip

# Keys without a counterpart: the value that asks for nothing, and why there is none or what to use instead.
TAGS = "every tag of a caption is there from the first step on"
SIDES = "buckets have about as many pixels as the resolution, in shapes from --bucket_step"
HELD_OUT = "what is held out is a share of all rows, and depends on no seed: --validation_split"
NOT_MAPPED: dict[str, tuple[Any, str]] = {
    "cache_info": (False, "sizes and captions are read anew by every run"),
    "color_aug": (False, "colours are left as they are"),
    "conditioning_data_dir": (
        None,
        "ControlNets are not trained; masks are put beside their pictures, as a-mask.png, for --masked_loss",
    ),
    "custom_attributes": ({}, "nothing would read them"),
    "face_crop_aug_range": (None, "crops do not look for faces"),
    "max_bucket_reso": (None, SIDES),
    "min_bucket_reso": (None, SIDES),
    "network_multiplier": (1, "networks beside the model are not trained"),
    "skip_image_resolution": (None, "small pictures are not skipped; `sd-recipes inspect` lists them"),
    "token_warmup_min": (1, TAGS),
    "token_warmup_step": (0, TAGS),
    "validation_seed": (None, HELD_OUT),
    "validation_split": (0, HELD_OUT),
}


class _NotMapped(Exception):
    """A value that has no counterpart; the message says why."""


def _resolution(value: Any) -> int:
    width, height = _sides(value)
    if width != height:
        side = round((width * height) ** 0.5 / 8) * 8
        raise _NotMapped(
            f"{value} has two sides, and --resolution is one: {side} has about as many pixels, and with "
            "--aspect_ratio_buckets pictures keep their shapes"
        )
    return width


def _max_upscale(no_upscale: bool) -> float:
    if not no_upscale:
        raise _NotMapped("pictures are enlarged up to --max_upscale; raise it where that is not enough")
    return 1.0


def _text_or_none(text: str) -> str | None:
    return text or None


# Settings of the whole run: the key's counterpart, how its value is translated, and kohya's default.
OF_THE_RUN: dict[str, tuple[str, Callable[[Any], Any], Any]] = {
    "alpha_mask": ("mask_from_alpha", bool, False),
    "batch_size": ("train_batch_size", int, 1),
    "bucket_no_upscale": ("max_upscale", _max_upscale, False),
    "bucket_reso_steps": ("bucket_step", int, 64),
    "caption_dropout_every_n_epochs": ("caption_dropout_every_n_epochs", int, 0),
    "caption_dropout_rate": ("caption_dropout", float, 0),
    "caption_prefix": ("caption_prefix", _text_or_none, ""),
    "caption_separator": ("tag_separator", str, ","),
    "caption_suffix": ("caption_suffix", _text_or_none, ""),
    "caption_tag_dropout_rate": ("caption_tag_dropout_rate", float, 0),
    "enable_bucket": ("aspect_ratio_buckets", bool, False),
    "enable_wildcard": ("enable_wildcard", bool, False),
    "flip_aug": ("random_flip", bool, False),
    "keep_tokens": ("keep_tags", int, 0),
    "keep_tokens_separator": ("keep_tokens_separator", _text_or_none, ""),
    "random_crop": ("crop", lambda is_random: "random" if is_random else "center", False),
    "resize_interpolation": ("image_interpolation_mode", INTERPOLATION.__getitem__, None),
    "resolution": ("resolution", _resolution, None),
    "secondary_separator": ("secondary_separator", _text_or_none, ""),
    "shuffle_caption": ("shuffle_tags", bool, False),
}


@dataclass
class _Subset:
    """A subset: where it stands in the file, its own keys, those of its dataset, and what holds for it."""

    place: str
    own: dict[str, Any]
    of_dataset: dict[str, Any]
    general: dict[str, Any]

    @property
    def dataset(self) -> str:
        return self.place.partition(".")[0]

    @property
    def keys(self) -> dict[str, Any]:
        return {**self.general, **self.of_dataset, **self.own}

    @property
    def is_table(self) -> bool:
        """Whether it is in the style for fine-tuning: captions in a metadata file, not beside the pictures."""
        return "metadata_file" in self.own


def read_dataset_config(
    name: str, decided: Mapping[str, Any] = MappingProxyType({})
) -> tuple[dict[str, Any], list[str]]:
    """The settings that a dataset config stands for, and a line for each of its keys that has no counterpart.

    Only keys that are in the file give a setting, and none of those `decided` elsewhere. Raises RecipeError for a file
    that cannot be read, for unknown keys (with the nearest name), values of another type, and what is not there.
    """
    try:
        return _Reading(_parse(name)).result(decided)
    except _Mistake as mistake:
        raise RecipeError(f"{FLAG} {name}: {mistake}") from None


class _Mistake(ValueError):
    """A mistake in the file; the message continues after its name."""


def _parse(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    if not path.is_file():
        raise _Mistake("no such file")
    try:
        # It may be a symbolic link, which read_text does not follow.
        text = read_text(path.resolve(), MAX_BYTES).removeprefix("\ufeff")
        content = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        number = re.search(r"at line (\d+)", str(error))
        line = text.splitlines()[int(number[1]) - 1] if number else ""
        hint = "; write a path of Windows in single quotes" if '"' in line and "\\" in line else ""
        raise _Mistake(f"{one_line(error)}{hint}") from None
    except (OSError, StrangeFile, RecursionError, ValueError) as error:
        raise _Mistake(one_line(error)) from None
    if not isinstance(content, dict):
        raise _Mistake(f"it holds a {type(content).__name__}, where [general] and [[datasets]] belong")
    return content


class _Reading:
    def __init__(self, content: dict[str, Any]) -> None:
        self.lines: list[str] = []
        self.settings: dict[str, Any] = {}
        _check_names(content, ["general", "datasets"], "", "settings of the run are flags of their own")
        general = content.get("general", {})
        _check(general, "general", [OF_DATASETS, OF_SUBSETS])
        self._tell_unmapped("general", general)
        self.subsets: list[_Subset] = []
        for number, dataset in enumerate(_tables(content.get("datasets"), "datasets")):
            self._read_dataset(f"datasets[{number}]", dataset, general)

    def _read_dataset(self, place: str, dataset: dict[str, Any], general: dict[str, Any]) -> None:
        keys = {key: value for key, value in dataset.items() if key != "subsets"}
        _check(keys, place, [OF_DATASETS, OF_SUBSETS])
        self._tell_unmapped(place, keys)
        subsets = []
        for number, own in enumerate(_tables(dataset.get("subsets"), f"{place}.subsets")):
            subset = _Subset(f"{place}.subsets[{number}]", own, keys, general)
            _check(own, subset.place, [OF_SUBSETS, OF_ONE_SUBSET])
            self._tell_unmapped(subset.place, own)
            subsets.append(subset)
        if len({subset.is_table for subset in subsets}) > 1:
            raise _Mistake(
                f"{place} has subsets with a metadata_file and without: put them into [[datasets]] of their own"
            )
        known: dict[str, str] = {}
        for subset in subsets:
            source = "metadata_file" if subset.is_table else "image_dir"
            if source not in subset.own:
                raise _Mistake(f"{subset.place} has no image_dir: name the folder of its pictures")
            other = known.setdefault(subset.own[source], subset.place)
            if other != subset.place:
                self._tell(f"{subset.place}.{source}", f"left out, as kohya does, since {other} has the same")
            elif subset.keys.get("num_repeats", 1) < 1:
                self._tell(f"{subset.place}.num_repeats", "below 1, so that the subset is left out, as kohya does")
            else:
                self.subsets.append(subset)

    def result(self, decided: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The settings but for those decided elsewhere, and the lines."""
        if not self.subsets:
            raise _Mistake("no subset is left to train on: correct num_repeats")
        self.settings["data_sources"] = [self._source(subset) for subset in self.subsets]
        self.settings["folder_repeats"] = False  # here, kohya's scripts do not look at a folder's name
        for key, (name, _, _) in OF_THE_RUN.items():
            if name not in decided:
                self._map(key)
        if "center_crop" in decided:
            self.settings.pop("crop", None)
        moving = ("shuffle_tags", "caption_tag_dropout_rate")
        if self.settings.get("keep_tags") and not any(decided.get(name, self.settings.get(name)) for name in moving):
            self.settings.pop("keep_tags")
            self._tell("keep_tokens", "without shuffle_caption or caption_tag_dropout_rate, all tags stay")
        return self.settings, list(dict.fromkeys(self.lines))  # what stands in a dataset is told once

    def _source(self, subset: _Subset) -> dict[str, Any]:
        """The entry of data_sources."""
        keys = subset.keys
        source = {"weight": "rows", "repeats": keys.get("num_repeats", 1)}
        if keys.get("is_reg"):
            source["is_reg"] = True
        folder = subset.own.get("image_dir")
        if folder is not None and not Path(folder).expanduser().is_dir():
            raise _Mistake(f"{subset.place}.image_dir {folder}: no such folder")
        if subset.is_table or folder is None:
            return source | self._table(subset, folder)
        extension, caption = keys.get("caption_extension"), keys.get("class_tokens")
        # Where no picture has a file of its own, the class tokens are the caption of all.
        if extension and (not caption or _has_files(folder, extension)):
            source["caption_extension"] = extension
        return source | {"train_data_dir": folder} | ({"caption": caption} if caption else {})

    def _table(self, subset: _Subset, folder: str | None) -> dict[str, Any]:
        file = Path(subset.own["metadata_file"]).expanduser()
        try:
            content = file.read_bytes()
        except OSError as error:
            raise _Mistake(f"{subset.place}.metadata_file {file}: {error.strerror}") from None
        column = "caption" if b'"caption"' in content or b'"tags"' not in content else "tags"
        if column == "caption" and b'"tags"' in content:
            self._tell(f"{subset.place}.metadata_file", "captions are its `caption`; its `tags` are not added to them")
        for key in ("caption_extension", "class_tokens"):
            for place, keys in ((subset.dataset, subset.of_dataset), (subset.place, subset.own)):
                if key in keys:
                    self._tell(f"{place}.{key}", "captions are those of the metadata_file")
        root = {"image_root": folder} if folder else {}
        return {"dataset_name": str(file), "caption_column": column, **root}

    def _map(self, key: str) -> None:
        """Set the counterpart of a key, if all subsets agree."""
        name, translate, default = OF_THE_RUN[key]
        of_dataset = any(key in keys for keys in OF_DATASETS.values())
        # What is said of captions and pictures is of those that are trained, beside which class pictures come.
        trained = [subset for subset in self.subsets if of_dataset or not subset.keys.get("is_reg")] or self.subsets
        values: dict[str, Any] = {}
        for subset in trained:
            values[subset.dataset if of_dataset else subset.place] = subset.keys.get(key, default)
        first, *others = values.values()
        if any(_sides(other) != _sides(first) for other in others):
            shown = {place: "none" if value is None else json.dumps(value) for place, value in values.items()}
            named = ", ".join(f"{value} in {place}" for place, value in shown.items())
            self._tell(key, f"{named}; --{name} is one setting for the whole run: give the flag")
            return
        for subset in self.subsets:
            if subset not in trained:
                self._tell_class_pictures(subset, key, first, default)
        if not any(key in subset.keys for subset in trained):
            return
        try:
            self.settings[name] = translate(first)
        except _NotMapped as reason:
            self._tell(key, str(reason))
        except KeyError:
            raise _Mistake(f"{key} {first!r} is none of {', '.join(INTERPOLATION)}") from None

    def _tell_class_pictures(self, subset: _Subset, key: str, of_trained: Any, default: Any) -> None:
        """Tell what a subset of class pictures has else than it asks for."""
        own = subset.keys.get(key, default)
        if key in ("caption_prefix", "caption_suffix"):
            if own:
                self._tell(f"{subset.place}.{key}", "class pictures get no prefix and suffix")
        elif own != of_trained:
            shown = "what is usual here" if of_trained is None else json.dumps(of_trained)
            self._tell(f"{subset.place}.{key}", f"{shown} holds for class pictures too")

    def _tell_unmapped(self, place: str, keys: dict[str, Any]) -> None:
        for key, value in keys.items():
            if key in NOT_MAPPED and value != NOT_MAPPED[key][0]:
                share = f" {value:g}" if key == "validation_split" else ""
                self._tell(f"{place}.{key}", NOT_MAPPED[key][1] + share)

    def _tell(self, place: str, why: str) -> None:
        self.lines.append(f"{place}: not mapped: {why}")


def _has_files(folder: str, suffix: str) -> bool:
    return any(path.name.endswith(suffix) for path in Path(folder).expanduser().rglob("*"))


def _sides(value: Any) -> list[Any]:
    """A size's two sides, if one number stands for both; any other value is compared as it is."""
    return value if isinstance(value, list) else [value, value]


def _tables(value: Any, place: str) -> list[dict[str, Any]]:
    name = "datasets.subsets" if place.endswith("subsets") else place
    if isinstance(value, dict):
        raise _Mistake(f"{place} is one table: write [[{name}]] with two brackets")
    if not isinstance(value, list) or not value or not all(isinstance(table, dict) for table in value):
        raise _Mistake(f"{place}: write at least one [[{name}]]; subsets name the pictures, and are part of a dataset")
    return value


def _check(keys: Any, place: str, kinds: list[dict[str, tuple[str, ...]]]) -> None:
    """Raise _Mistake for a key that may not stand there, or that holds another kind of value."""
    if not isinstance(keys, dict):
        raise _Mistake(f"{place} must be a table: [{place}]")
    known = {key: kind for allowed in kinds for kind, names in allowed.items() for key in names}
    elsewhere = {"[[datasets]]": OF_DATASETS, "[[datasets.subsets]]": OF_ONE_SUBSET}
    for key in keys:
        for where, allowed in elsewhere.items():
            if key not in known and any(key in names for names in allowed.values()):
                raise _Mistake(f"{place}.{key} belongs into {where}")
    _check_names(keys, list(known), f"{place}.", "settings of the run are flags of their own")
    for key, value in keys.items():
        if not KINDS[known[key]](value):
            raise _Mistake(f"{place}.{key} must be {known[key]}, not {value!r}")


def _check_names(keys: dict[str, Any], known: list[str], place: str, otherwise: str) -> None:
    for key in keys:
        if key not in known:
            raise _Mistake(f"unknown key {place}{key}{nearest(key, known) or f': {otherwise}'}")
