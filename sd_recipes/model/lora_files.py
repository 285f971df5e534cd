"""LoRA files: low-rank changes to a model's layers, under several programs' names, read, merged and written.

    diffusers   unet.MODULE.lora_A.weight, unet.MODULE.lora_B.weight, and earlier names of the same
    kohya       lora_unet_MODULE.lora_down.weight, .lora_up.weight, .alpha; the module's dots are underscores
    ComfyUI     diffusion_model.MODULE.lora_down.weight, .lora_up.weight, the UNet's modules as in single files

kohya's scripts name the UNet's modules as diffusers does, but those of SDXL as single files do (`input_blocks_4_1_…`).
Whoever wrote a file, its modules are found by their names without dots, among those of the model that it belongs to.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE

from sd_recipes.assets import Generation
from sd_recipes.errors import RecipeError
from sd_recipes.model.original_layout import unet_name
from sd_recipes.model.recognise import of_tensors
from sd_recipes.model.weight_files import (
    PickledWeights,
    Shape,
    UnfittingWeights,
    UnreadableWeights,
    Weights,
    open_weights,
)

LORA_FILE = LORA_WEIGHT_NAME_SAFE  # as diffusers calls it, in a folder
ADAPTER_METADATA = LORA_ADAPTER_METADATA_KEY  # key of diffusers' metadata, peft's settings by part
LORA_PARTS = ("unet", "text_encoder", "text_encoder_2")
PREFIXES = {
    "unet": ("unet.", "lora_unet_", "diffusion_model."),
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_", "text_encoders.clip_l.transformer."),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_", "text_encoders.clip_g.transformer."),
}
WIDTHS: dict[int, Generation] = {768: 1, 1024: 2, 2048: "XL"}  # of the text states that a UNet reads
# What a tensor is, by the end of its name.
ENDINGS = {
    "down": re.compile(r"(\.lora_A(\.\w+)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight"),
    "up": re.compile(r"(\.lora_B(\.\w+)?|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight"),
    "alpha": re.compile(r"\.alpha"),
    "magnitude": re.compile(r"(\.lora_magnitude_vector(\.\w+)?(\.weight)?|\.dora_scale)"),
}
# Layers that diffusers' first LoRA files name otherwise.
EARLIER_NAMES = {".processor": "", "self_attn.to_q": "self_attn.q_proj", "self_attn.to_k": "self_attn.k_proj",
                 "self_attn.to_v": "self_attn.v_proj", "self_attn.to_out": "self_attn.out_proj"}  # fmt: skip
READS_TEXT = re.compile(r"attn2.to.k.*(down|lora_A)")
ONLY_IN_XL = re.compile(
    r"(text_encoder_2|lora_te2|text_encoders\.clip_g)[._]"
    r"|.*(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks).*transformer_blocks[._]1[._]"
)
OTHER_FAMILIES = re.compile(r"(transformer|lora_transformer|lora_te3)[._]|.*(double|single|joint)_blocks")
OTHER_KINDS = {"hada_w": "a LoHa", "lokr_": "a LoKr", "oft_": "an OFT"}  # by what is in their tensors' names


@dataclass(frozen=True)
class LoraLayer:
    """The change of one layer's weight W (out, in, …) to W + α / rank · up down.

    With a magnitude m (DoRA; Liu et al. 2024, equation 5), to m times that over the norm of each of its rows.
    """

    down: torch.Tensor  # (rank, in, …), … being a convolution's kernel
    up: torch.Tensor  # (out, rank, …), … being ones
    alpha: float
    magnitude: torch.Tensor | None = None  # (out,)

    @property
    def rank(self) -> int:
        return len(self.down)

    def merged(self, weight: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        """The changed weight, float32, of the same shape; of `strength` 0.5, half the way to it."""
        changed = self.up.float().flatten(1) @ self.down.float().flatten(1) * (self.alpha / self.rank)
        changed = weight.float() + changed.reshape(weight.shape)
        if self.magnitude is not None:
            factor = self.magnitude.float() / changed.flatten(1).norm(dim=1)
            changed = changed * factor.reshape(-1, *[1] * (weight.ndim - 1))
        return changed if strength == 1 else torch.lerp(weight.float(), changed, strength)

    def with_alpha(self, alpha: float) -> LoraLayer:
        """The same change, written with another α."""
        return self if alpha == self.alpha else replace(self, up=self.up.float() * (self.alpha / alpha), alpha=alpha)


def lora_parts(components: Any) -> dict[str, torch.nn.Module]:
    """The models of a pipeline that a LoRA may change, by part."""
    return {part: getattr(components, part) for part in LORA_PARTS if hasattr(components, part)}


Lora = Mapping[str, Mapping[str, LoraLayer]]  # by part and module
LayerShapes = Mapping[str, Mapping[str, Shape]]  # of the weights of a model's layers, by part and module


def layer_shapes(parts: Mapping[str, torch.nn.Module]) -> LayerShapes:
    """Of the layers that a LoRA may change: those with a weight of two dimensions or more."""
    return {
        part: {
            name.removesuffix(".weight"): tuple(value.shape)
            for name, value in module.state_dict().items()
            if name.endswith(".weight") and value.ndim >= 2
        }
        for part, module in parts.items()
    }


def is_lora(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names holds a LoRA."""
    return any(_split(name) for name in names)


def generation_of_lora(shapes: Mapping[str, Shape]) -> Generation | None:
    """Of Stable Diffusion, by what only SDXL has, or the width of the text states that the UNet's changes read.

    None if the names and shapes do not tell.
    """
    if any(OTHER_FAMILIES.match(name) for name in shapes):
        return None
    if any(ONLY_IN_XL.match(name) for name in shapes):
        return "XL"
    found = (WIDTHS.get(shape[1]) for name, shape in shapes.items() if READS_TEXT.search(name) and shape[1:])
    return next((each for each in found if each), None)


def _generation_of_model(shapes: LayerShapes) -> Generation | None:
    if "text_encoder_2" in shapes:
        return "XL"
    found = (WIDTHS.get(shape[1]) for name, shape in shapes["unet"].items() if name.endswith("attn2.to_k"))
    return next((each for each in found if each), None)


def _split(name: str) -> tuple[str, str] | None:
    """The module, with its part's prefix, and what the tensor is of it; None if it is of no LoRA."""
    for kind, ending in ENDINGS.items():
        found = re.search(rf"{ending.pattern}$", name)
        if found and (kind != "alpha" or name.startswith("lora_")):
            module = name[: found.start()]
            for old, new in EARLIER_NAMES.items():
                module = module.replace(old, new)
            return module, kind
    return None


# --------------------------------------------------------------------------------------------------- reading


def open_lora(
    name: str | Path,
    place: str,
    parts: Mapping[str, Any],
    *,
    unfitting: str = "name the model that it was trained on, or another LoRA",
    allow_pickle: bool = False,
    pickled: str = "convert it with `sd-recipes convert`",
) -> Lora:
    """The LoRA in a file, or in a folder of one, for the model that has these parts.

    Raises RecipeError, which begins with `place`; ways out are `unfitting` for a LoRA of another model, and `pickled`.
    """
    path = Path(name).expanduser()
    file = path / LORA_FILE if path.is_dir() else path
    if not file.exists():
        raise RecipeError(f"{place}: there is no such LoRA: give a .safetensors file, or a folder with {LORA_FILE}")
    try:
        weights = open_weights(file, file.name, allow_pickle=allow_pickle)
        return read_lora(weights, layer_shapes(parts), parts["unet"].config)
    except UnfittingWeights as error:
        raise RecipeError(f"{place} {error}: {unfitting}") from error
    except PickledWeights as error:
        raise RecipeError(f"{place} {error}: get it as .safetensors, or {pickled}") from error
    except UnreadableWeights as error:
        raise RecipeError(f"{place} {error}") from error


def read_lora(weights: Weights, shapes: LayerShapes, unet_config: Mapping[str, Any]) -> Lora:
    """The LoRA in a file, for a model whose layers have these shapes.

    Raises UnfittingWeights for a LoRA of another model, and UnreadableWeights for a file that holds none, or another
    kind of change.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}  # part and module: kind: the tensor's name
    tables = {part: _modules_by_name(part, shapes[part], unet_config) for part in shapes}
    unknown = []
    if kind := next((OTHER_KINDS[part] for part in OTHER_KINDS if any(part in name for name in weights.shapes)), None):
        raise UnreadableWeights(f"is {kind}: only LoRA and DoRA are read")
    if not is_lora(weights.shapes):
        raise UnreadableWeights(f"is not a LoRA, but {of_tensors(weights.shapes).words}: choose a LoRA")
    its, models = generation_of_lora(weights.shapes), _generation_of_model(shapes)
    if its and its != models and (models or its == "XL"):
        words = f"Stable Diffusion {models}" if models else "not"
        raise UnfittingWeights(f"is a LoRA of another model: of Stable Diffusion {its}, and this one is {words}")
    for name in weights.shapes:
        split = _split(name.removeprefix("base_model.model."))
        if split is None:
            raise UnreadableWeights(f"holds {name}, which is no part of a LoRA: only LoRA and DoRA are read")
        part, plain = _part_of(split[0])
        if module := tables.get(part, {}).get(plain):
            found.setdefault((part, module), {})[split[1]] = name
        else:
            unknown.append(name)
    if unknown:
        raise UnfittingWeights(
            f"is a LoRA of another model: {len(unknown)} of its {len(weights.shapes)} tensors are of layers that this "
            f"one lacks (such as {unknown[0]})"
        )
    lora: dict[str, dict[str, LoraLayer]] = {}
    settings = _settings(weights)
    for (part, module), names in found.items():
        _check_shapes(weights, names, module, shapes[part][module])
        alpha = None if "alpha" in names else _alpha_of(module, weights.shapes[names["down"]][0], settings[part])
        lora.setdefault(part, {})[module] = _read_layer(weights, names, shapes[part][module], alpha)
    return lora


def _part_of(module: str) -> tuple[str, str]:
    """The part that a file's module is of, and its name without prefix and dots."""
    for part, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if module.startswith(prefix):
                return part, module.removeprefix(prefix).replace(".", "_")
    return "", module


def _modules_by_name(part: str, modules: Iterable[str], unet_config: Mapping[str, Any]) -> dict[str, str]:
    """A part's modules by every name, without dots, that files have them under."""
    table: dict[str, str] = {}
    for module in modules:
        names = {module, module.removesuffix(".0")}  # `to_out.0` is `to_out` in diffusers' first files
        names |= {_in_single_file(module, unet_config)} if part == "unet" else {_in_text_model(module)}
        table |= {name.replace(".", "_"): module for name in names}
    return table | {module.replace(".", "_"): module for module in modules}


def _in_single_file(module: str, unet_config: Mapping[str, Any]) -> str:
    return unet_name(f"{module}.weight", unet_config).removesuffix(".weight")


def _in_text_model(module: str) -> str:
    """A module as files name it: transformers has put a text encoder's layers under `text_model.`, or has not."""
    return module if module.startswith("text_projection") else f"text_model.{module.removeprefix('text_model.')}"


def _check_shapes(weights: Weights, names: Mapping[str, str], module: str, shape: Shape) -> None:
    if missing := {"down", "up"} - names.keys():
        raise UnreadableWeights(f"is not whole: {module} has no {min(missing)} matrix: choose another copy")
    down, up = weights.shapes[names["down"]], weights.shapes[names["up"]]
    if min(len(down), len(up)) < 2 or (up[0], math.prod(down[1:])) != (shape[0], math.prod(shape[1:])):
        change = f"{up[0]} x {math.prod(down[1:])}" if up else "nothing"
        raise UnfittingWeights(
            f"is a LoRA of another model: it changes {module} by {change} values, and this one has "
            f"{shape[0]} x {math.prod(shape[1:])} there"
        )
    if up[1] != down[0] or not down[0]:
        raise UnreadableWeights(f"is damaged: {module} has a rank of {down[0]} and of {up[1]}: choose another copy")
    if "alpha" in names and math.prod(weights.shapes[names["alpha"]]) != 1:
        raise UnreadableWeights(f"is damaged: {names['alpha']} is no single number: choose another copy")
    if "magnitude" in names and math.prod(weights.shapes[names["magnitude"]]) != shape[0]:
        raise UnreadableWeights(f"has magnitudes of inputs at {module}: only those of outputs are read")


def _read_layer(weights: Weights, names: Mapping[str, str], shape: Shape, alpha: float | None) -> LoraLayer:
    """In float32, shaped like the layer's own weight, whatever the file made of it; α if it has no tensor of it.

    Raises UnreadableWeights for numbers that are not finite.
    """
    tensors = {kind: weights.read(name).float() for kind, name in names.items()}
    for kind, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UnreadableWeights(f"holds numbers that are not finite, in {names[kind]}: choose another copy")
    rank = len(tensors["down"])
    return LoraLayer(
        down=tensors["down"].reshape(rank, *shape[1:]),
        up=tensors["up"].reshape(shape[0], rank, *[1] * (len(shape) - 2)),
        alpha=tensors["alpha"].item() if alpha is None else alpha,
        magnitude=tensors["magnitude"].flatten() if "magnitude" in tensors else None,
    )


def _settings(weights: Weights) -> dict[str, dict[str, Any]]:
    """peft's settings of each part, from the metadata that diffusers writes. Raises UnreadableWeights."""
    try:
        stated = json.loads(weights.metadata.get(ADAPTER_METADATA, "{}"))
        return {
            part: {
                name.removeprefix(f"{part}."): value for name, value in stated.items() if name.startswith(f"{part}.")
            }
            for part in LORA_PARTS
        }
    except (ValueError, AttributeError) as error:
        raise UnreadableWeights(
            f"has metadata ({ADAPTER_METADATA}) that is no JSON of settings: choose another copy"
        ) from error


def _alpha_of(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """A module's α by peft's settings; its rank if they say nothing. Raises UnreadableWeights."""
    try:
        alpha = _stated(settings, "lora_alpha", "alpha_pattern", module, rank)
        is_sound = math.isfinite(alpha) and _stated(settings, "r", "rank_pattern", module, rank) == rank
    except (TypeError, AttributeError, re.error):
        is_sound = False
    if not is_sound:
        raise UnreadableWeights(
            f"has metadata ({ADAPTER_METADATA}) that contradict its tensors at {module}: choose another copy"
        )
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def _stated(settings: Mapping[str, Any], key: str, pattern: str, module: str, default: int) -> Any:
    """A module's value as peft finds it."""
    patterns = settings.get(pattern) or {}
    value = next((each for name, each in patterns.items() if re.fullmatch(rf"(.*\.)?({name})", module)), None)
    return settings.get(key, default) if value is None else value


def peft_settings(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """What a LoRA changes of a part, as the settings of peft's configuration that say so."""
    return {
        "target_modules": sorted(layers),
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
        "use_rslora": False,  # which makes α count by the root of the rank
        **_with_pattern("r", "rank_pattern", {name: layer.rank for name, layer in layers.items()}),
        **_with_pattern("lora_alpha", "alpha_pattern", {name: layer.alpha for name, layer in layers.items()}),
    }


def _with_pattern(key: str, pattern: str, values: Mapping[str, float]) -> dict[str, Any]:
    """peft's way to give each layer a value: the most common one, and those of the others."""
    common = Counter(values.values()).most_common(1)[0][0]
    return {key: common, pattern: {name: value for name, value in sorted(values.items()) if value != common}}


# --------------------------------------------------------------------------------------------------- merging


@torch.no_grad()
def merge_lora(parts: Mapping[str, torch.nn.Module], lora: Lora, strength: float = 1.0) -> None:
    """Change the weights of a model's parts, in place."""
    for part, layers in lora.items():
        parameters = dict(parts[part].named_parameters())
        for module, layer in layers.items():
            weight = parameters[f"{module}.weight"]
            weight.copy_(layer.merged(weight, strength))


# --------------------------------------------------------------------------------------------------- writing


def diffusers_tensors(lora: Lora) -> dict[str, torch.Tensor]:
    """By the names that `load_lora_weights` of any version reads; α is told by metadata, if it is not the rank.

    If none of a text encoder's attention is changed, diffusers (0.42) understands only its own earlier names of the
    two matrices.
    """
    tensors = {}
    for part, layers in lora.items():
        down, up = ".lora_A.weight", ".lora_B.weight"
        if part != "unet" and not any("self_attn" in module for module in layers):
            down, up = ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"
        for module, layer in layers.items():
            name = f"{part}.{module if part == 'unet' else _in_text_model(module)}"
            tensors[name + down] = layer.down
            tensors[name + up] = layer.up
            if layer.magnitude is not None:
                is_convolution = layer.down.ndim > 2
                shape = (1, -1, *[1] * (layer.down.ndim - 2)) if is_convolution else (-1,)
                # As transformers (5.23) and peft (0.21) look for it.
                ending = "" if part == "unet" else ".weight"
                tensors[f"{name}.lora_magnitude_vector{ending}"] = layer.magnitude.reshape(shape)
    return tensors


def kohya_tensors(lora: Lora, xl_unet: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """By the names that kohya's scripts, A1111 and ComfyUI read; of SDXL, `xl_unet` is the configuration of its UNet.

    diffusers' `convert_state_dict_to_kohya` writes the same for a UNet whose α is its rank, but of SDXL diffusers'
    names; of other α, of DoRA and of a text encoder that is not SDXL's it writes something else. All layers have one
    α: where they differ, diffusers reads them wrongly (0.42).
    """
    alpha = alpha_of(lora)
    prefixes = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te_" if xl_unet is None else "lora_te1_",
        "text_encoder_2": "lora_te2_",
    }
    tensors = {}
    for part, layers in lora.items():
        for module, layer in layers.items():
            if part == "unet":
                name = module if xl_unet is None else _in_single_file(module, xl_unet)
            else:
                name = _in_text_model(module)
            name = prefixes[part] + name.replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = layer.down
            tensors[f"{name}.lora_up.weight"] = layer.with_alpha(alpha).up
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
            if layer.magnitude is not None:
                tensors[f"{name}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.down.ndim - 1))
    return tensors


def with_alpha_of_ranks(lora: Lora) -> Lora:
    """The same changes, each layer's α being its rank, which needs no metadata."""
    return {
        part: {module: layer.with_alpha(layer.rank) for module, layer in layers.items()}
        for part, layers in lora.items()
    }


def alpha_of(lora: Lora) -> float:
    """The α of most layers."""
    return Counter(layer.alpha for layers in lora.values() for layer in layers.values()).most_common(1)[0][0]


def rank_of(lora: Lora) -> int:
    """The largest rank."""
    return max(layer.rank for layers in lora.values() for layer in layers.values())
