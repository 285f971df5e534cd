"""input_ids to encoder_hidden_states."""

from __future__ import annotations

from itertools import islice

import torch
from transformers import CLIPTextModel

MAX_TEXT_BYTES = 2**30  # of kept text states: about 9,000 captions of CLIP-L in bf16


@torch.no_grad()
def encode_text(text_encoder: CLIPTextModel, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, n * L) int64 to the text model's last hidden states (B, n * L, D), each chunk of L encoded alone.

    The ids may be in the host's memory; the states are on the text model's device.
    """
    length = min(input_ids.shape[1], text_encoder.config.max_position_embeddings)
    chunks = input_ids.reshape(-1, length).to(text_encoder.device, non_blocking=True)
    states = text_encoder(chunks, return_dict=False)[0]
    return states.reshape(len(input_ids), -1, states.shape[-1])


class CachedText:
    """Text states of captions that were met before; for captions that are few and do not change.

    Of more than `max_bytes` of them, those that were met last.
    """

    def __init__(self, text_encoder: CLIPTextModel, max_bytes: int = MAX_TEXT_BYTES) -> None:
        self.text_encoder = text_encoder
        self.max_bytes = max_bytes
        self.states: dict[bytes, torch.Tensor] = {}  # those that were met last at the end

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, n * L) int64 in the host's memory to states (B, n * L, D) on the text encoder's device."""
        assert input_ids.device.type == "cpu", "looking captions up must not wait for the device"
        keys = [row.numpy().tobytes() for row in input_ids]
        new = [place for place, key in enumerate(keys) if key not in self.states]
        if new:
            encoded = encode_text(self.text_encoder, input_ids[new])
            # Each its own copy: a part of the batch's tensor would keep the whole of it.
            self.states.update((keys[place], states.clone()) for place, states in zip(new, encoded, strict=True))
        for key in dict.fromkeys(keys):
            self.states[key] = self.states.pop(key)
        batch = torch.stack([self.states[key] for key in keys])
        too_many = max(0, len(self.states) - self.max_bytes // batch[0].nbytes)
        for key in list(islice(self.states, too_many)):
            del self.states[key]
        return batch
