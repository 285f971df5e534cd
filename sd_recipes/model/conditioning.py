"""input_ids to encoder_hidden_states."""

from __future__ import annotations

import torch
from transformers import CLIPTextModel


@torch.no_grad()
def encode_text(text_encoder: CLIPTextModel, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, L) int64 to the text model's last hidden states (B, L, D)."""
    return text_encoder(input_ids, return_dict=False)[0]
