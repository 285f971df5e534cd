"""Narrow heads are computed wider, and give what they gave."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from sd_recipes.model.narrow_heads import WidenedHeads, widen_narrow_heads


def unet_with(heads: list[int]) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(40, 80),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=heads,  # diffusers' name for the number of heads
        norm_num_groups=8,
    )


def widened(unet: UNet2DConditionModel) -> dict[str, bool]:
    return {name: isinstance(each, WidenedHeads) for name, each in unet.attn_processors.items()}


def test_outputs_and_gradients_are_those_of_diffusers_processor() -> None:
    plain, wide = unet_with([4, 8]), unet_with([4, 8])  # heads of 10 values
    widen_narrow_heads(wide)
    assert all(widened(wide).values())
    latents, states = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24)
    outputs = []
    for unet in (plain, wide):
        output = unet(latents, torch.tensor([3, 700]), states, return_dict=False)[0]
        output.square().sum().backward()
        outputs.append(output)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for (name, expected), (_, parameter) in zip(plain.named_parameters(), wide.named_parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, expected.grad, rtol=1e-3, atol=1e-3 * float(expected.grad.abs().max()), msg=name
        )


def test_only_narrow_heads_are_touched() -> None:
    unet = unet_with([4, 2])  # of 10 and of 40 values
    widen_narrow_heads(unet)
    found = widened(unet)
    assert {is_wide for name, is_wide in found.items() if name.startswith("down_blocks.0")} == {True}
    assert {is_wide for name, is_wide in found.items() if name.startswith(("down_blocks.1", "mid"))} == {False}
