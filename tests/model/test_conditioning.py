from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import tiny_tokenizer
from transformers import CLIPTextModel

from sd_recipes.model.conditioning import CachedText
from sd_recipes.model.stable_diffusion import hidden_states


def test_defect_9_the_text_cache_keeps_the_last_captions_up_to_a_number_of_bytes(tiny_pipeline: Path) -> None:
    text_encoder = CLIPTextModel.from_pretrained(tiny_pipeline, subfolder="text_encoder").eval()
    captions = [f"disc number {number}" for number in range(12)]
    input_ids = tiny_tokenizer()(captions, padding="max_length", max_length=16, return_tensors="pt").input_ids
    expected = hidden_states(text_encoder, input_ids)
    of_one = expected[0].nbytes
    encoded: list[int] = []
    text_encoder.register_forward_pre_hook(lambda model, inputs: encoded.append(len(inputs[0])))
    cached = CachedText(lambda input_ids: {"encoder_hidden_states": hidden_states(text_encoder, input_ids)})
    cached.max_bytes = 3 * of_one + 1

    def states(*rows: int) -> list[int]:
        """Checks the states of these rows; how many captions were encoded for them."""
        encoded.clear()
        torch.testing.assert_close(cached(input_ids[list(rows)])["encoder_hidden_states"], expected[list(rows)])
        assert len(cached.states) <= 3
        # A view of a batch would hold all of it.
        storages = [kept["encoder_hidden_states"].untyped_storage() for kept in cached.states.values()]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        assert sum(held.values()) <= cached.max_bytes
        return encoded

    assert states(0, 1, 2) == [3]
    assert states(0, 1, 2, 0) == []
    assert states(0, 3) == [1], "1 goes, the one that was met first"
    assert states(2, 0, 3) == []
    assert states(1) == [1], "2 goes"
    assert states(0, 3, 1) == []
    assert states(0, 4, 5, 6, 7, 8, 0) == [5], "a batch that is larger than the cache"
    assert states(*range(12), *range(12)) == [18]
    cached.max_bytes = of_one - 1
    assert states(1, 2, 1) == [3]
    assert cached.states == {}
