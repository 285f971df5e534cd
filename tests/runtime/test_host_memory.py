"""Buffers that share blocks, and the allocator's settings."""

from __future__ import annotations

import os

import pytest
import torch
from diffusers import UNet2DConditionModel

from sd_recipes.runtime.allocator import VARIABLES, set_up_allocator
from sd_recipes.runtime.host_memory import allocate, buffers_like, nbytes_of, packed, power_of_two


def test_the_blocks_of_stable_diffusion_take_what_its_weights_take() -> None:
    with torch.device("meta"):
        weights = list(UNet2DConditionModel(cross_attention_dim=768).parameters())
    sizes = [nbytes_of(each) for each in weights]
    total = sum(each.nbytes for each in weights)
    assert total == pytest.approx(3.44e9, rel=0.01)
    assert sum(map(power_of_two, sizes)) > 1.15 * total, "what a pinned buffer for each would take"
    blocks = packed(sizes)
    assert sum(block.nbytes for block in blocks) < 1.02 * total
    assert sorted(number for block in blocks for number in block.places) == list(range(len(sizes)))
    assert all(block.nbytes == power_of_two(block.nbytes) <= 2**27 for block in blocks)


def test_a_buffer_is_laid_out_as_its_tensor_and_has_room_of_its_own() -> None:
    tensors = [
        torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        torch.tensor(3.0),
        torch.arange(1000, dtype=torch.uint8),
        torch.randn(7, 9, dtype=torch.bfloat16).t(),
        torch.zeros(0, 4),
        torch.randn(300, 300, dtype=torch.float64),
    ]
    buffers = buffers_like(tensors)
    for buffer, tensor in zip(buffers, tensors, strict=True):
        assert (buffer.dtype, buffer.shape, buffer.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert not buffer.any()
        buffer.copy_(tensor)
    assert all(torch.equal(buffer, tensor) for buffer, tensor in zip(buffers, tensors, strict=True))
    assert len({buffer.untyped_storage().data_ptr() for buffer in buffers}) == 1
    assert buffers_like([]) == []


def test_a_tensor_larger_than_a_block_has_one_of_its_own_size() -> None:
    blocks = packed([300, 10, 20, 200, 10], block_bytes=64)
    assert [block.nbytes for block in blocks] == [512, 32]
    assert [block.places for block in blocks] == [{0: 0, 3: 300, 1: 500}, {2: 0, 4: 20}]
    assert [each.nbytes for each in (allocate(block, pinned=False) for block in blocks)] == [512, 32]


@pytest.mark.parametrize("given", [None, *VARIABLES])
def test_segments_grow_unless_the_user_has_said_otherwise(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    if given:
        monkeypatch.setenv(given, "max_split_size_mb:128")
    set_up_allocator()
    set_up_allocator()
    wanted = {given: "max_split_size_mb:128"} if given else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert {name: os.environ[name] for name in VARIABLES if name in os.environ} == wanted
