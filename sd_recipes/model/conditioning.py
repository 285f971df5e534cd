"""A cache of captions' text states, for captions that are few and do not change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch

from sd_recipes.runtime.host_memory import pinned_like

TextStates = Mapping[str, torch.Tensor]  # what the text models say, (B, …) each
# What the UNet is conditioned on besides noisy latents and timesteps, (B, …) each, by its argument's name.
Conditioning = Mapping[str, torch.Tensor]
ADDED = ("text_embeds", "time_ids")  # those that UNets of diffusers take within `added_cond_kwargs`
MAX_TEXT_BYTES = 2**30  # of kept text states: in bf16 about 9,000 captions of CLIP-L, or 3,400 of SDXL


def unet_arguments(conditioning: Conditioning) -> dict[str, Any]:
    """The keyword arguments with which a UNet of diffusers is called."""
    arguments: dict[str, Any] = {name: each for name, each in conditioning.items() if name not in ADDED}
    if added := {name: conditioning[name] for name in ADDED if name in conditioning}:
        arguments["added_cond_kwargs"] = added
    return arguments


class CachedText:
    """`encode` with a cache of up to `max_bytes`, which drops the captions that were used least recently.

    What a GPU encodes is kept in pinned host memory, which it leaves and enters without a wait of the host.
    """

    def __init__(self, encode: Callable[[torch.Tensor], TextStates], max_bytes: int = MAX_TEXT_BYTES) -> None:
        self.encode = encode
        self.max_bytes = max_bytes
        self.device = torch.device("cpu")  # of the text states; known once some were encoded
        self.states: dict[bytes, TextStates] = {}  # the most recently used last
        self.new: set[bytes] = set()  # those encoded since the last `keep`

    def keep(self) -> None:
        """What the captions were encoded for is done."""
        self.new.clear()

    def forget(self) -> None:
        """Drop the captions encoded since the last `keep`: they come again, maybe in other batches."""
        for key in self.new:
            self.states.pop(key, None)
        self.new.clear()

    def __call__(self, input_ids: torch.Tensor) -> TextStates:
        """(B, L) int64 in host memory to text states (B, …), each row's as `encode` first returned them."""
        assert input_ids.device.type == "cpu", "looking captions up must not wait for the device"
        keys = [row.numpy().tobytes() for row in input_ids]
        new = [place for place, key in enumerate(keys) if key not in self.states]
        if new:
            encoded = self.encode(pinned_like(input_ids[new], input_ids))
            self.device = next(iter(encoded.values())).device
            for number, place in enumerate(new):
                # A copy each: a slice would keep the whole batch's tensor alive.
                self.states[keys[place]] = {name: _kept(each[number]) for name, each in encoded.items()}
                self.new.add(keys[place])
        for key in dict.fromkeys(keys):
            self.states[key] = self.states.pop(key)
        found = [self.states[key] for key in keys]
        too_many = max(0, len(self.states) - self.max_bytes // sum(each.nbytes for each in found[0].values()))
        for key in list(islice(self.states, too_many)):
            del self.states[key]
        return {
            name: torch.stack([states[name].to(self.device, non_blocking=True) for states in found])
            for name in found[0]
        }


def _kept(states: torch.Tensor) -> torch.Tensor:
    if states.device.type != "cuda":
        return states.clone()
    return torch.empty(states.shape, dtype=states.dtype, pin_memory=True).copy_(states, non_blocking=True)
