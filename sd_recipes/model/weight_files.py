"""Files of weights: names and shapes are known at once, values are read one by one, and nothing in a file is run."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sd_recipes.errors import one_line

PICKLES = (".ckpt", ".bin", ".pt", ".pth")  # suffixes of files that torch.save writes
SUFFIXES = (".safetensors", ".sft", ".gguf", *PICKLES)
MAX_HEADER_BYTES = 100_000_000  # what safetensors allows

Shape = tuple[int, ...]


class UnreadableWeights(ValueError):
    """A file that holds no weights that can be read; the message continues after the file's name."""


class PickledWeights(UnreadableWeights):
    """A pickle, which is read only where that was asked for."""


class UnfittingWeights(UnreadableWeights):
    """Weights whose names or shapes are not those of the part that they were taken for."""


@dataclass(frozen=True)
class Weights:
    """Named tensors that lie in files. `read` gives one by its name, in host memory, in the type it is stored in."""

    place: str  # how messages name the file
    shapes: Mapping[str, Shape]
    read: Callable[[str], torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """The tensors in `names`, new name to old."""
        return replace(
            self,
            shapes={new: self.shapes[old] for new, old in names.items()},
            read=lambda new: self.read(names[new]),
        )

    def under(self, prefix: str) -> Weights:
        """The tensors whose names begin with `prefix`, named without it."""
        return self.renamed({name.removeprefix(prefix): name for name in self.shapes if name.startswith(prefix)})


def joined(shards: list[Weights], place: str) -> Weights:
    """The tensors of several files as if they were in one."""
    holder = {name: shard for shard in shards for name in shard.shapes}
    return Weights(place, {name: holder[name].shapes[name] for name in holder}, lambda name: holder[name].read(name))


def open_weights(path: Path, place: str, *, allow_pickle: bool) -> Weights:
    """The tensors of a file, which is judged by its content, not by its suffix.

    Raises PickledWeights for a pickle without `allow_pickle`, and UnreadableWeights.
    """
    if not path.is_file():
        raise UnreadableWeights("is not a regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES:
        return _open_safetensors(path, place, size)
    if head[:2] == b"PK" or head[:1] == b"\x80" or (not head and path.suffix in PICKLES):
        if not allow_pickle:
            raise PickledWeights("is in PyTorch's pickle format, which can hold code besides weights")
        return _open_pickle(path, place)
    raise UnreadableWeights(_what_else(head))


def _what_else(head: bytes) -> str:
    """What a file is, by its first bytes, that is neither safetensors nor a pickle."""
    text = head.decode(errors="replace").strip()
    if not head:
        return "is empty: copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer in the place of the weights: run `git lfs pull` where it was cloned"
    if text[:1] == "<":
        return "is a web page in the place of the weights: download it again, logged in if the site asks for it"
    if head[:4] == b"GGUF":
        return "is a GGUF file, whose weights are quantised and cannot be trained: get the model as .safetensors"
    words = f" (it begins with {text[:40]!r})" if text.isprintable() else ""
    return f"is not a safetensors file{words}: copy or download it again"


def _open_safetensors(path: Path, place: str, size: int) -> Weights:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length)
    cut_short = "is cut short, at {:,} of {:,} bytes: copy or download it again"
    if len(text) < length:
        raise UnreadableWeights(cut_short.format(size, 8 + length))
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if end > size:
            raise UnreadableWeights(cut_short.format(size, end))
        read = safe_open(path, "pt").get_tensor
    except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnreadableWeights(f"is a damaged safetensors file ({one_line(error, 100)}): copy it again") from error
    return Weights(place, shapes, read, metadata)


class LightningCallback:
    """Stands for a class of PyTorch Lightning that the first checkpoints of Stable Diffusion name; it does nothing."""


def _open_pickle(path: Path, place: str) -> Weights:
    name = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    try:
        with torch.serialization.safe_globals([(LightningCallback, name)]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UnreadableWeights(
            f"holds more than weights{_wanted(error)} which could be code and is not run: get the model as "
            ".safetensors from someone you trust"
        ) from error
    # A broken archive raises what its reader meets: RuntimeError, EOFError, KeyError, ValueError, OSError.
    except Exception as error:
        raise UnreadableWeights(f"cannot be read ({one_line(error, 100)}): copy or download it again") from error
    tensors = dict(_tensors(content))
    return Weights(place, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__)


def _wanted(error: Exception) -> str:
    """What a pickle asked for that is no part of weights, by torch's words (2.13)."""
    match = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
    return f", {match[1]}," if match else ""


def _tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested mappings, with the keys that lead to each; `state_dict` is left out of the names."""
    if isinstance(content, torch.Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, int) and prefix == "global_step.":  # which tells Stable Diffusion 2's models apart
        yield "global_step", torch.tensor(content)
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, prefix if key == "state_dict" else f"{prefix}{key}.")
