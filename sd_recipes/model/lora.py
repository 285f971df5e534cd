"""LoRA: small changes to layers of the UNet and the text encoder, W + (α/r)·B·A (Hu et al. 2021), by peft.

Only A and B are trained, in float32; the layers themselves stay as they are. A file that a LoRA starts from is read by
diffusers' own converters, after its names and shapes are compared with the model's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict

from sd_recipes.errors import RecipeError, nearest, one_line
from sd_recipes.model.components import Components
from sd_recipes.model.recognise import of_tensors
from sd_recipes.model.weight_files import PickledWeights, UnreadableWeights, Weights, open_weights
from sd_recipes.recipe import LoraConfig, Recipe

LORA_FILE = LORA_WEIGHT_NAME_SAFE  # as diffusers calls it, in a folder
ADAPTER = "default"  # peft's name of it
Layer = torch.nn.Linear | torch.nn.Conv2d  # that can be changed
WORDS = {"unet": "UNet", "text_encoder": "text encoder"}
# What `attention` and `all` stand for: components of layers' names, and where in the UNet they may lie.
ATTENTION = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
BLOCKS = {"unet": ("down_blocks.", "mid_block.", "up_blocks."), "text_encoder": ("",)}
# Names of tensors by earlier versions of diffusers to peft's.
TO_PEFT: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "unet": convert_unet_state_dict_to_peft,
    "text_encoder": partial(convert_state_dict_to_peft, original_type=StateDictType.DIFFUSERS_OLD),
}
# The settings of peft's configuration that say what a LoRA is.
OF_A_CONFIG = ("target_modules", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_dora", "use_rslora")
OTHER_KINDS = {"hada_w": "a LoHa", "lokr_": "a LoKr", "oft_": "an OFT", "dora_scale": "a DoRA in kohya's keys"}


def add_lora(recipe: Recipe, components: Components) -> None:
    """Freeze the models, and give their layers the changes that are trained: new ones, or those of --lora_weights.

    New ones change nothing at first (B is 0). Raises RecipeError.
    """
    names = ("unet", "text_encoder") if recipe.lora_text_encoder else ("unet",)
    modules: dict[str, torch.nn.Module] = {name: getattr(components, name) for name in names}
    for module in modules.values():
        module.requires_grad_(False)
    if recipe.lora_weights is not None:
        _load(recipe, modules)
    else:
        _add_new(recipe, modules)
    for module in modules.values():
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(".lora_" in name)


def lora_layers(module: torch.nn.Module) -> dict[str, LoraLayer]:
    """The layers of a model that a LoRA changes, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def lora_config(module: torch.nn.Module) -> dict[str, Any]:
    """What is changed of a model, as the settings of peft's configuration that say so."""
    layers = lora_layers(module)
    return {
        "target_modules": sorted(layers),
        "use_dora": any(layer.use_dora[ADAPTER] for layer in layers.values()),
        "use_rslora": any(layer.use_rslora[ADAPTER] for layer in layers.values()),
        **_with_pattern("r", "rank_pattern", {name: layer.r[ADAPTER] for name, layer in layers.items()}),
        **_with_pattern(
            "lora_alpha", "alpha_pattern", {name: layer.lora_alpha[ADAPTER] for name, layer in layers.items()}
        ),
    }


def lora_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The changes to a model, by peft's names."""
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    return tensors


# ------------------------------------------------------------------------------------------ new ones


def _add_new(recipe: Recipe, modules: Mapping[str, torch.nn.Module]) -> None:
    assert recipe.lora_rank is not None
    layers = {name: _layers(module) for name, module in modules.items()}
    chosen = choose_layers(recipe.lora_targets or ["attention"], layers)
    for name, module in modules.items():
        _check_rank(recipe.lora_rank, layers[name], chosen[name], name)
        config = PeftConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha or recipe.lora_rank,  # type: ignore[arg-type]  # it may be a fraction
            lora_dropout=recipe.lora_dropout,
            target_modules=chosen[name],
            use_dora=recipe.lora_use_dora,
            init_lora_weights="gaussian",  # as diffusers' script has it
        )
        inject_adapter_in_model(config, module, adapter_name=ADAPTER)


def _layers(module: torch.nn.Module) -> dict[str, Layer]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Layer)}


def choose_layers(targets: Iterable[str], layers: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """The layers of each model that targets name, out of all `layers`. Raises RecipeError for what names none.

    A target is `attention`, `all`, or components of names, such as attn2 or ff.net.0.proj.
    """
    chosen: dict[str, set[str]] = {model: set() for model in layers}
    for target in targets:
        found = {model: _matching(target, model, names) for model, names in layers.items()}
        if not any(found.values()):
            parts = {part for names in layers.values() for name in names for part in _parts(name)}
            near = nearest(target, {"attention", "all", *parts}) or f" (there are {_some(parts)})"
            raise RecipeError(
                f"--lora_targets {target} is in the name of no layer of the {_in_words(layers)}{near}: use attention, "
                "all, or names of layers"
            )
        for model, names in found.items():
            chosen[model] |= names
    for model, names in chosen.items():
        if not names:
            way_out = ", or drop --lora_text_encoder" if model == "text_encoder" else ""
            raise RecipeError(
                f"--lora_targets {' '.join(targets)} names no layer of the {WORDS[model]}: add attention, or its "
                f"{ATTENTION[model][0]}{way_out}"
            )
    return {model: sorted(names) for model, names in chosen.items()}


def _matching(target: str, model: str, names: Iterable[str]) -> set[str]:
    if target == "all":
        return {name for name in names if name.startswith(BLOCKS[model])}
    wanted = ATTENTION[model] if target == "attention" else (target,)
    return {name for name in names if any(f".{each}." in f".{name}." for each in wanted)}


def _parts(name: str) -> set[str]:
    """What of a layer's name a user may mean: its components, and its last ones together."""
    components = name.split(".")
    return {each for each in components if not each.isdecimal()} | {
        ".".join(components[-number:]) for number in range(1, min(4, len(components) + 1))
    }


def _some(parts: Iterable[str]) -> str:
    return ", ".join(sorted(part for part in parts if "." not in part and not part.isdecimal())[:12])


def _in_words(models: Iterable[str]) -> str:
    return " and the ".join(WORDS[model] for model in models)


def _check_rank(rank: int, layers: Mapping[str, Layer], chosen: Iterable[str], model: str) -> None:
    """Raises RecipeError for a rank that no change of the smallest layer's weight can have."""
    shapes = {name: layers[name].weight.shape for name in chosen}
    highest, name = min((min(shape[0], shape[1:].numel()), name) for name, shape in shapes.items())
    if rank > highest:
        raise RecipeError(
            f"--lora_rank {rank} is over the size of the {WORDS[model]}'s {name}, whose weight is "
            f"{_times(shapes[name])}: use --lora_rank {highest} at most, or --lora_targets without that layer"
        )


def _times(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


# ------------------------------------------------------------------------------------------ of a file


def _load(recipe: Recipe, modules: Mapping[str, torch.nn.Module]) -> None:
    """Give the models the changes of --lora_weights. Raises RecipeError for a file that does not fit them."""
    place = f"--lora_weights {recipe.lora_weights}"
    changes = _read(recipe, place)
    if "unet" not in changes:
        raise RecipeError(f"{place} does not change the UNet: choose a LoRA of Stable Diffusion 1 or 2")
    if changes.keys() - modules.keys():
        raise RecipeError(f"{place} changes the text encoder too: add --lora_text_encoder")
    if modules.keys() - changes.keys():
        raise RecipeError(f"{place} does not change the text encoder: drop --lora_text_encoder")
    for model, module in modules.items():
        tensors, config = changes[model]
        _check_fits(place, model, tensors, _layers(module), recipe)
        try:
            inject_adapter_in_model(
                PeftConfig(**config, lora_dropout=recipe.lora_dropout), module, adapter_name=ADAPTER
            )
            own = lora_tensors(module)
            if different := sorted(own.keys() ^ tensors.keys()):
                raise ValueError(f"{different[0]} is missing, or not what its metadata say")
            for name, tensor in own.items():  # without a copy: they are the parameters' own memory
                tensor.copy_(tensors[name])
        # peft checks neither metadata nor shapes, and raises what its layers meet.
        except Exception as error:
            raise RecipeError(f"{place} cannot be loaded ({one_line(error)}): choose another") from error
        _check_given(place, recipe, lora_config(module))


def _read(recipe: Recipe, place: str) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """The changes in a file by model: tensors by peft's names, and peft's configuration. Raises RecipeError."""
    weights = _open(recipe, place)
    try:
        header = dict(json.loads(weights.metadata.get(LORA_ADAPTER_METADATA_KEY, "{}")))
        tensors = {name: weights.read(name).float() for name in weights.shapes}
        state, alphas = StableDiffusionPipeline.lora_state_dict(tensors)
    # Whatever diffusers' converters meet in names that they do not know.
    except Exception as error:
        raise RecipeError(
            f"{place} is not a LoRA of Stable Diffusion in diffusers' or kohya's keys ({one_line(error, 120)}): choose "
            "another, or convert it first"
        ) from error
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise RecipeError(f"{place} holds numbers that are not finite, in {broken[0]}: choose another copy")
    changes: dict[str, dict[str, torch.Tensor]] = {}
    of_layer: dict[str, dict[str, float]] = {}
    for old, tensor in state.items():
        model, _, name = old.partition(".")
        if model not in TO_PEFT:
            raise RecipeError(
                f"{place} is of another family than Stable Diffusion 1 and 2 (it changes {old}): choose a LoRA of "
                "the model that is trained"
            )
        (new,) = TO_PEFT[model]({name: tensor})
        # By which earlier versions of transformers named CLIP's layers, and later ones DoRA's lengths.
        new = new.removeprefix("text_model.").replace("_vector.weight", "_vector")
        if new.endswith(".alpha") and tensor.numel() == 1:
            of_layer.setdefault(model, {})[new.removesuffix(".alpha")] = tensor.item()
            continue
        changes.setdefault(model, {})[new] = tensor
        alpha = (alphas or {}).get(f"{old.partition('.lora.')[0]}.alpha")
        if alpha is not None:
            of_layer.setdefault(model, {})[_layer_of(new)] = alpha
    return {
        model: (of_model, _config(model, of_model, of_layer.get(model, {}), header))
        for model, of_model in changes.items()
    }


def _open(recipe: Recipe, place: str) -> Weights:
    path = Path(recipe.lora_weights or "").expanduser()
    if path.is_dir():
        path = path / LORA_FILE
    if not path.exists():
        raise RecipeError(f"{place}: there is no {path}: give a LoRA's .safetensors file, or the folder of {LORA_FILE}")
    try:
        weights = open_weights(path, place, allow_pickle=recipe.allow_pickle_weights)
    except PickledWeights as error:
        raise RecipeError(f"{place} {error}: get it as .safetensors, or add --allow_pickle_weights") from error
    except UnreadableWeights as error:
        raise RecipeError(f"{place} {error}") from error
    if other := next(
        (kind for part, kind in OTHER_KINDS.items() if any(part in name for name in weights.shapes)), None
    ):
        raise RecipeError(f"{place} is {other}, which is not trained here: choose a plain LoRA")
    found = of_tensors(weights.shapes)
    if not any("lora" in name for name in weights.shapes):
        raise RecipeError(f"{place} is {found.words}, not a LoRA: choose a LoRA, or drop --lora_weights")
    return weights


def _config(
    model: str, tensors: Mapping[str, torch.Tensor], alphas: Mapping[str, float], header: Mapping[str, Any]
) -> dict[str, Any]:
    """peft's configuration of tensors: what the file says of itself, or else what follows from their shapes.

    Without an alpha it is the rank, as diffusers has it.
    """
    ranks = {_layer_of(name): tensor.shape[0] for name, tensor in tensors.items() if ".lora_A" in name}
    said = {name.removeprefix(f"{model}."): each for name, each in header.items() if name.startswith(f"{model}.")}
    if said:
        return {name: said[name] for name in OF_A_CONFIG if name in said}
    scales = {layer: alphas.get(layer, rank) for layer, rank in ranks.items()}
    return {
        "target_modules": sorted(ranks),
        "use_dora": any("lora_magnitude_vector" in name for name in tensors),
        **_with_pattern("r", "rank_pattern", ranks),
        **_with_pattern("lora_alpha", "alpha_pattern", scales),
    }


def _with_pattern(key: str, pattern: str, values: Mapping[str, float]) -> dict[str, Any]:
    """peft's way to give each layer a value: the most common one, and those of the others."""
    common = Counter(values.values()).most_common(1)[0][0]
    return {key: common, pattern: {name: value for name, value in sorted(values.items()) if value != common}}


def _layer_of(name: str) -> str:
    return name.partition(".lora_")[0]


def _check_fits(
    place: str, model: str, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, Layer], recipe: Recipe
) -> None:
    """Raises RecipeError for changes to layers that a model does not have, or has in another size."""
    base = recipe.pretrained_model_name_or_path
    for name, tensor in tensors.items():
        layer = layers.get(_layer_of(name))
        if layer is None:
            raise RecipeError(
                f"{place} is of another model than {base}: it changes {_layer_of(name)}, which the {WORDS[model]} does "
                "not have: choose a LoRA of this model"
            )
        if "lora_magnitude_vector" in name:
            continue
        weight, is_input = layer.weight, ".lora_A" in name
        sizes = [each.shape[1:].numel() if is_input else each.shape[:1].numel() for each in (weight, tensor)]
        if tensor.ndim < 2 or sizes[0] != sizes[1]:
            raise RecipeError(
                f"{place} is of another model than {base}: {name} is {_times(tensor.shape)}, and the "
                f"{WORDS[model]}'s layer {_times(weight.shape)}: choose a LoRA of this model"
            )


def _check_given(place: str, recipe: LoraConfig, config: Mapping[str, Any]) -> None:
    """Raises RecipeError if the recipe says otherwise than the file."""
    for flag, value, key, pattern in (
        ("lora_rank", recipe.lora_rank, "r", "rank_pattern"),
        ("lora_alpha", recipe.lora_alpha, "lora_alpha", "alpha_pattern"),
    ):
        there = {config[key], *config[pattern].values()}
        if value is not None and there != {value}:
            words = " and ".join(f"{each:g}" for each in sorted(there))
            raise RecipeError(f"--{flag} {value:g} contradicts {place}, which has {words}: drop it")
