"""Attention of heads narrower than 16 values on a CPU: torch's kernel takes half the time if zeros fill them up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

WIDTH = 16  # values, below which torch's (2.13) attention is slow on CPUs: docs/performance.md


class WidenedHeads:
    """A transformer block's attention, without mask, of heads that are filled up with zeros to `WIDTH` values.

    Zeros add nothing to a product of queries and keys, and the values' are cut off again: the result differs from that
    of diffusers' own processor by the order in which the kernel adds.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, L, C) hidden states, and text states (B, M, D) for cross-attention, to (B, L, C)."""
        assert attention_mask is None, "training and sampling here have no masks"
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, states in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        width = query.shape[-1]
        query, key, value = (F.pad(each, (0, WIDTH - width)) for each in (query, key, value))
        states = F.scaled_dot_product_attention(query, key, value, scale=width**-0.5)[..., :width]
        states = attn.to_out[0](states.transpose(1, 2).flatten(2))
        return attn.to_out[1](states) / attn.rescale_output_factor


def widen_narrow_heads(unet: Any) -> None:
    """Let those of a UNet's attentions that have narrow heads, and nothing special, be computed with wider ones."""
    for block in unet.modules():
        for name in ("attn1", "attn2"):
            attention = getattr(block, name, None)
            if attention is not None and _is_plain(attention) and attention.inner_dim // attention.heads < WIDTH:
                attention.set_processor(WidenedHeads())


def _is_plain(attention: Any) -> bool:
    special = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
    return all(getattr(attention, name, None) is None for name in special) and not attention.residual_connection
