"""Weights into a module: their names are compared with the module's own, and nothing is left at random values."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

import torch

from sd_recipes.model.weight_files import Shape, UnfittingWeights, UnreadableWeights, Weights

logger = logging.getLogger(__name__)

COMPILED = "_orig_mod."  # in the names of what torch.compile has wrapped
# What torch.compile, FSDP, DDP and a trainer's own module put into the names of what they wrap.
INNER_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OUTER_WRAPPERS = ("module.", "model.", "unet.", "vae.", "text_encoder.")
# Names by another version of the libraries, for the same tensors.
OTHER_NAMES = {
    "vae": {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."},
    "text_encoder": {"text_model.": ""},
}
# Tensors that a file may hold besides, which say nothing of the part: positions, CLIP's other half, and what a VAE was
# trained with.
OF_CLIP = re.compile(r"(.*\.)?position_ids|(text|visual)_projection(\.weight)?|logit_scale|attn_mask|vision_model\.")
HARMLESS = {
    "unet": re.compile(r"(?!)"),
    "vae": re.compile(r"loss\.|model_ema\."),
    "text_encoder": OF_CLIP,
    "text_encoder_2": OF_CLIP,
}
QUANTISED = re.compile(r"absmax|quant_state|scaled_fp8|\.scale_weight|qweight")  # what such weights come with


def fill(module: torch.nn.Module, weights: Weights, part: str) -> None:
    """Give a module on the meta device the weights of `part`, in float32 and host memory.

    Raises UnfittingWeights if a tensor is missing, left over or of another shape, and says how many are, and
    UnreadableWeights if they cannot be trained.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = _plain_names(weights, part, expected)
    _compare_names(expected, found, part)
    differing = [name for name in expected if _without_ones(found.shapes[name]) != _without_ones(expected[name])]
    if differing:
        name = differing[0]
        raise UnfittingWeights(
            f"does not fit the {part}'s configuration: {name} has the shape {_written(found.shapes[name])}, and "
            f"{_written(expected[name])} is expected ({len(differing)} of {len(expected)} tensors differ)"
        )
    values = {}
    for name, shape in expected.items():
        value = found.read(name)
        if not value.is_floating_point():
            raise UnreadableWeights(
                f"holds quantised weights ({name} is {str(value.dtype).removeprefix('torch.')}), which cannot be "
                "trained: use the model in float32, float16 or bfloat16"
            )
        # A copy, so that the file may be written over while the run lasts. The convolutions of one pixel, in the VAE's
        # attention, are matrices in diffusers.
        values[name] = value.to(torch.float32, copy=True).reshape(shape)
    module.load_state_dict(values, assign=True)


def unwrapped(name: str) -> str:
    """A tensor's name without what a compiled, sharded or distributed module puts into it."""
    return INNER_WRAPPERS.sub("", name).removeprefix("module.")


def say_unwrapped(place: str, names: Mapping[str, str]) -> None:
    """Say which wrappers are left out of names, new to old."""
    wrappers = set()
    for new, old in names.items():
        inner = INNER_WRAPPERS.search(old)
        wrappers.add(inner.group() if inner else old.removesuffix(new))
    logger.info(
        "%s was saved from within a wrapper: %s is stripped from %d names of tensors.",
        place, ", ".join(sorted(wrappers)), len(names),
    )  # fmt: skip


def _plain_names(weights: Weights, part: str, expected: Iterable[str]) -> Weights:
    """The weights without wrappers in their names, which is said, and with the names of this version."""
    known, names, wrapped = set(expected), {}, {}
    for old in weights.shapes:
        new = unwrapped(old)
        while _current(new, part) not in known and (outer := new.partition(".")[0] + ".") in OUTER_WRAPPERS:
            new = new.removeprefix(outer)
        current = _current(new, part)
        if current in known and (current not in names or old == current):  # a plain name is preferred to a wrapped one
            names[current] = old
            if new != old:
                wrapped[new] = old
    if wrapped:
        say_unwrapped(weights.place, wrapped)
    left = set(weights.shapes) - set(names.values())
    return weights.renamed({**{unwrapped(old) if unwrapped(old) not in names else old: old for old in left}, **names})


def _current(name: str, part: str) -> str:
    for old, new in OTHER_NAMES.get(part, {}).items():
        name = name.replace(old, new)
    return name


def _compare_names(expected: dict[str, Shape], found: Weights, part: str) -> None:
    missing = [name for name in expected if name not in found.shapes]
    left_over = [name for name in found.shapes if name not in expected and not HARMLESS[part].match(name)]
    if not missing and not left_over:
        return
    if quantised := [name for name in left_over if QUANTISED.search(name)]:
        raise UnreadableWeights(
            f"holds quantised weights (such as {quantised[0]}), which cannot be trained: use the model in float32, "
            "float16 or bfloat16"
        )
    words = []
    if missing:
        words.append(f"{len(missing)} of its {len(expected)} tensors are missing (such as {missing[0]})")
    if left_over:
        words.append(f"{len(left_over)} of the file's {len(found.shapes)} are left over (such as {left_over[0]})")
    raise UnfittingWeights(f"does not hold this {part}: {' and '.join(words)}")


def _without_ones(shape: Shape) -> Shape:
    """(512, 512, 1, 1) and (512, 512) hold the same numbers in the same order."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _written(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "of a single number"
