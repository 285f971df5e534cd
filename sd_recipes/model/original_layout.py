"""The names that tensors have in Stable Diffusion's own layout, as single files do, by diffusers' and transformers'.

Rombach et al.'s code numbers the UNet's blocks from one end to the other, and the VAE's from the image inward. A later
version of either library may name its modules otherwise, but not these files. `take_part` reads this layout, and
`original_tensors` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sd_recipes.assets import Generation
from sd_recipes.model.weight_files import Shape, Weights

# Where a file of each generation of Stable Diffusion has its text encoders; under `model.` by OpenCLIP's names.
TEXT_PREFIXES: dict[Generation, dict[str, str]] = {
    1: {"text_encoder": "cond_stage_model.transformer."},
    2: {"text_encoder": "cond_stage_model.model."},
    "XL": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
# Where a file holds the parts; the first prefix that it has counts. `""`: a file of that part alone.
PREFIXES = {
    "unet": ("model.diffusion_model.", ""),
    "vae": ("first_stage_model.", "vae.", ""),
    "text_encoder": (*(each["text_encoder"] for each in TEXT_PREFIXES.values()), ""),
    "text_encoder_2": (TEXT_PREFIXES["XL"]["text_encoder_2"], ""),
}

UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_LAYERS = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0.conv": "downsample.conv",
    "upsamplers.0.conv": "upsample.conv",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
}
OPEN_CLIP_LAYERS = {
    "text_projection.weight": "text_projection",  # transposed
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
TEXT_PROJECTION = "text_projection"
IN_PROJ = re.compile(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)")  # OpenCLIP keeps the three in one tensor


def _replaced(name: str, table: Mapping[str, str]) -> str:
    """The name with whole words of the table replaced, where each occurs."""
    for new, old in table.items():
        name = re.sub(rf"(^|\.){re.escape(new)}(?=\.|$)", rf"\g<1>{old}", name)
    return name


def unet_name(name: str, config: Mapping[str, Any]) -> str:
    """`down_blocks.0.resnets.1.norm1.bias` to `input_blocks.2.0.in_layers.0.bias`."""
    layers = config["layers_per_block"]
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name):
        way, kind, rest = match[1], match[3], match[5]
        block, layer = int(match[2]), int(match[4])
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":  # after the attention, if the block has one
            place = 2 if "CrossAttn" in config["up_block_types"][block] else 1
            return f"output_blocks.{block * (layers + 1) + layers}.{place}.{rest}"
        number = block * (layers + 1) + layer + (1 if way == "down" else 0)
        side = "input_blocks" if way == "down" else "output_blocks"
        if kind == "attentions":
            return f"{side}.{number}.1.{rest}"
        return f"{side}.{number}.0.{_replaced(rest, UNET_RESNET)}"
    plain = _replaced(name, UNET_ENDS)
    return plain if "attentions" in name else _replaced(plain, UNET_RESNET)


def vae_name(name: str, config: Mapping[str, Any]) -> str:
    """`decoder.up_blocks.0.resnets.1.norm1.bias` to `decoder.up.3.block.1.norm1.bias`."""
    last = len(config["block_out_channels"]) - 1
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", name)
    return re.sub(r"(down|up)\.(\d+)\.resnets", r"\1.\2.block", _replaced(name, VAE_LAYERS))


def open_clip_name(name: str) -> str:
    """`encoder.layers.0.self_attn.out_proj.bias` to `transformer.resblocks.0.attn.out_proj.bias`."""
    return _replaced(name.removeprefix("text_model."), OPEN_CLIP_LAYERS)


def take_part(weights: Weights, part: str, config: Mapping[str, Any], names: Iterable[str]) -> Weights:
    """The tensors of `part` in a file, named as the module of that part names them (`names`).

    What the module lacks stays, under the file's own name. A file that has diffusers' names already is left as it is.
    """
    prefix = next((each for each in PREFIXES[part] if any(name.startswith(each) for name in weights.shapes)), "")
    found = weights.under(prefix)
    if part in TEXT_PREFIXES["XL"]:
        return _open_clip(found, names) if "token_embedding.weight" in found.shapes else found
    rename = unet_name if part == "unet" else vae_name
    old_of = {name: rename(name, config) for name in names}
    known = {name: old for name, old in old_of.items() if old in found.shapes}
    taken = set(known.values())
    return found.renamed({**{name: name for name in found.shapes if name not in taken}, **known})


def _open_clip(weights: Weights, names: Iterable[str]) -> Weights:
    """OpenCLIP's text tower, but for its last layer if the module ends before it, as Stable Diffusion 2's does."""
    old_of, thirds, transposed = {}, {}, set()
    for name in names:
        old = open_clip_name(name)
        if match := IN_PROJ.fullmatch(old):
            old, thirds[name] = f"{match[1]}in_proj_{match[3]}", "qkv".index(match[2])
        if old == TEXT_PROJECTION:
            transposed.add(name)
        if old in weights.shapes:
            old_of[name] = old
    taken = set(old_of.values())
    layers = {old.split(".")[2] for old in taken if old.startswith("transformer.resblocks.")}
    last = f"transformer.resblocks.{len(layers)}."
    left = {name: name for name in weights.shapes if name not in taken and not name.startswith(last)}
    renamed = weights.renamed({**left, **old_of})

    def shape_of(name: str) -> Shape:
        shape = renamed.shapes[name]
        if name in transposed:
            return shape[::-1]
        return (shape[0] // 3, *shape[1:]) if name in thirds else shape

    def read(name: str) -> torch.Tensor:
        tensor = renamed.read(name)
        if name in transposed:
            return tensor.T.contiguous()  # in another order of memory, a product would be rounded otherwise
        return tensor.chunk(3)[thirds[name]] if name in thirds else tensor

    return Weights(weights.place, {name: shape_of(name) for name in renamed.shapes}, read, weights.metadata)


# ---------------------------------------------------------------------------------------------------- writing

NUM_OPEN_CLIP_LAYERS = 24  # of which Stable Diffusion 2 uses all but the last


def original_tensors(
    part: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], generation: Generation
) -> dict[str, torch.Tensor]:
    """The tensors of a part by the names, and in the shapes, that a file of that Stable Diffusion has them in."""
    if part == "unet":
        return {f"{PREFIXES[part][0]}{unet_name(name, config)}": value for name, value in tensors.items()}
    if part == "vae":
        return {f"{PREFIXES[part][0]}{vae_name(name, config)}": _as_vae(name, value) for name, value in tensors.items()}
    prefix = TEXT_PREFIXES[generation][part]
    original = _original_open_clip(tensors, generation) if prefix.endswith(".model.") else _original_clip(tensors)
    return {prefix + name: value for name, value in original.items()}


def _as_vae(name: str, value: torch.Tensor) -> torch.Tensor:
    """The attention's matrices are convolutions of one pixel there."""
    return value[:, :, None, None] if "attentions" in name and value.ndim == 2 else value


def _original_clip(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names of that time, and the positions that it counted on."""
    original = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()}
    positions = torch.arange(len(original["text_model.embeddings.position_embedding.weight"]))[None]
    return {**original, "text_model.embeddings.position_ids": positions}


def _original_open_clip(tensors: Mapping[str, torch.Tensor], generation: Generation) -> dict[str, torch.Tensor]:
    """OpenCLIP's text tower, with what strict programs look for, though nothing is drawn by it.

    That is its temperature and, of Stable Diffusion 2, a last layer, of zeros, which changes nothing, and a projection,
    which is the identity.
    """
    original = {}
    thirds: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        old = open_clip_name(name)
        if match := IN_PROJ.fullmatch(old):
            thirds.setdefault(f"{match[1]}in_proj_{match[3]}", {})[match[2]] = value
        else:
            original[old] = value.T if old == TEXT_PROJECTION else value
    original |= {name: torch.cat([third[each] for each in "qkv"]) for name, third in thirds.items()}
    original["logit_scale"] = torch.zeros(())
    return original | _unused_layer(original) if generation == 2 else original


def _unused_layer(original: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What Stable Diffusion 2 leaves out of OpenCLIP."""
    last, unused = (f"transformer.resblocks.{NUM_OPEN_CLIP_LAYERS - number}." for number in (2, 1))
    added = {}
    if not any(name.startswith(unused) for name in original):
        copied = {name: value for name, value in original.items() if name.startswith(last)}
        added = {name.replace(last, unused): torch.zeros_like(value) for name, value in copied.items()}
    return {**added, TEXT_PROJECTION: torch.eye(original["ln_final.weight"].shape[0])}
