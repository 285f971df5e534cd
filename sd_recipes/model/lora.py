"""LoRA: small changes to layers of the UNet and the text encoders, W + (α/r)·B·A (Hu et al. 2021), by peft.

Only A and B are trained, in float32; the layers themselves stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from sd_recipes.errors import RecipeError, nearest
from sd_recipes.model.components import Components
from sd_recipes.model.family import Family
from sd_recipes.model.lora_files import LoraLayer as FileLayer
from sd_recipes.model.lora_files import lora_parts, open_lora, peft_settings
from sd_recipes.recipe import LoraConfig, Recipe

ADAPTER = "default"  # peft's name of it
Layer = torch.nn.Linear | torch.nn.Conv2d  # that can be changed
WORDS = {"unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
# What `attention` and `all` stand for: components of layers' names, and where in the UNet they may lie.
OF_CLIP = ("q_proj", "k_proj", "v_proj", "out_proj")
ATTENTION = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": OF_CLIP,
    "text_encoder_2": OF_CLIP,
}
BLOCKS = {"unet": ("down_blocks.", "mid_block.", "up_blocks."), "text_encoder": ("",), "text_encoder_2": ("",)}

logger = logging.getLogger(__name__)


def add_lora(recipe: Recipe, family: Family, components: Components) -> None:
    """Freeze the models, and give their layers the changes that are trained: new ones, or those of --lora_weights.

    New ones change nothing at first (B is 0). Raises RecipeError.
    """
    names = ("unet", *family.text_models) if recipe.lora_text_encoder else ("unet",)
    modules: dict[str, torch.nn.Module] = {name: getattr(components, name) for name in names}
    unused = family.without_effect(components)
    for module in modules.values():
        module.requires_grad_(False)
    if recipe.lora_weights is not None:
        _load(recipe, components, modules, unused)
    else:
        _add_new(recipe, modules, unused)
    for module in modules.values():
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(".lora_" in name)


def lora_layers(module: torch.nn.Module) -> dict[str, LoraLayer]:
    """The layers of a model that a LoRA changes, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


@contextmanager
def without_lora(module: torch.nn.Module) -> Iterator[None]:
    """Within this context a model is what it was before its LoRA, and draws no dropout."""
    layers: list[Any] = list(lora_layers(module).values())
    was_training = module.training
    trained = [each for each in module.parameters() if each.requires_grad]
    module.eval()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        # peft has set them for all of its layers, and some may be frozen.
        module.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        module.train(was_training)


def trained_lora(module: torch.nn.Module) -> dict[str, FileLayer]:
    """What is changed of a model: the parameters themselves, by layers' names."""
    layers: Mapping[str, Any] = lora_layers(module)
    return {
        name: FileLayer(
            down=layer.lora_A[ADAPTER].weight.detach(),
            up=layer.lora_B[ADAPTER].weight.detach(),
            alpha=layer.lora_alpha[ADAPTER],
            magnitude=layer.lora_magnitude_vector[ADAPTER].weight.detach().flatten()
            if layer.use_dora[ADAPTER]
            else None,
        )
        for name, layer in layers.items()
    }


# ------------------------------------------------------------------------------------------ new ones


def _add_new(recipe: Recipe, modules: Mapping[str, torch.nn.Module], unused: Mapping[str, tuple[str, ...]]) -> None:
    assert recipe.lora_rank is not None
    layers = {name: _layers(module, unused.get(name, ())) for name, module in modules.items()}
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


def _layers(module: torch.nn.Module, unused: tuple[str, ...] = ()) -> dict[str, Layer]:
    """Those that can be changed, by name, but for those without effect."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, Layer) and not name.startswith(unused)
    }


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
            way_out = ", or drop --lora_text_encoder" if model != "unet" else ""
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


def _load(
    recipe: Recipe,
    components: Components,
    modules: Mapping[str, torch.nn.Module],
    unused: Mapping[str, tuple[str, ...]],
) -> None:
    """Give the models the changes of --lora_weights. Raises RecipeError for a file that does not fit them."""
    place = f"--lora_weights {recipe.lora_weights}"
    lora = open_lora(
        recipe.lora_weights or "",
        place,
        lora_parts(components),
        unfitting=f"choose a LoRA of {recipe.pretrained_model_name_or_path}",
        allow_pickle=recipe.allow_pickle_weights,
        pickled="add --allow_pickle_weights",
    )
    if "unet" not in lora:
        raise RecipeError(f"{place} does not change the UNet: choose one that was trained on it")
    there, wanted = lora.keys() - {"unet"}, modules.keys() - {"unet"}
    if there and not wanted:
        raise RecipeError(f"{place} changes the {_in_words(sorted(there))} too: add --lora_text_encoder")
    if wanted and not there:
        raise RecipeError(f"{place} does not change the {_in_words(sorted(wanted))}: drop --lora_text_encoder")
    if missing := sorted(wanted - there):
        raise RecipeError(
            f"{place} changes one text encoder and not the {_in_words(missing)}, and such a LoRA is not gone on with: "
            "choose another"
        )
    for part, prefixes in unused.items():
        if left_out := [name for name in lora.get(part, ()) if name.startswith(prefixes)]:
            logger.info(
                "%s changes %d layers of the %s that no text state depends on (such as %s): they are left out.",
                place, len(left_out), WORDS[part], left_out[0],
            )  # fmt: skip
            kept = {name: layer for name, layer in lora[part].items() if name not in left_out}
            lora = {**lora, part: kept}
    for part, module in modules.items():
        settings = peft_settings(lora[part])
        _check_can_be_trained(place, part, lora[part], _layers(module))
        _check_given(place, recipe, settings)
        inject_adapter_in_model(PeftConfig(**settings, lora_dropout=recipe.lora_dropout), module, adapter_name=ADAPTER)
        for name, own in trained_lora(module).items():  # views of the parameters' own memory
            given = lora[part][name]
            own.down.copy_(given.down)
            own.up.copy_(given.up)
            if own.magnitude is not None:
                assert given.magnitude is not None
                own.magnitude.copy_(given.magnitude)


def _check_can_be_trained(place: str, part: str, lora: Mapping[str, FileLayer], layers: Mapping[str, Layer]) -> None:
    """Raises RecipeError for changes that are merged and drawn with, but not trained."""
    if other := sorted(lora.keys() - layers.keys()):
        raise RecipeError(
            f"{place} changes the {WORDS[part]}'s {other[0]}, and only linear layers and convolutions are trained: "
            "choose another"
        )
    plain = sorted(name for name, layer in lora.items() if layer.magnitude is None)
    if 0 < len(plain) < len(lora):
        raise RecipeError(
            f"{place} is a DoRA of only some of the {WORDS[part]}'s layers (not of {plain[0]}), which is not trained: "
            "choose another"
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
