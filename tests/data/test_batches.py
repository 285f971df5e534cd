"""A batch: what it carries, and that it can be divided without changing what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import build

from sd_recipes.data.images import fit_image, place_crop
from sd_recipes.training.loop import backward


def gradient_of(run: Any, micro_batches: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    run.state.optimizer.zero_grad()
    loss = backward(micro_batches, run.model, None, run.accelerator)
    gradient = torch.cat([each.grad.flatten() for each in run.state.parameters.values()])
    return loss, gradient.clone()


@pytest.mark.parametrize("number", [2, 3, 4, 9])
def test_a_divided_step_has_the_same_gradient(settings: dict[str, Any], number: int) -> None:
    run = build(settings, input_perturbation=0.1, caption_dropout=0.3)
    micro_batches = next(run.batches(0, 1))
    pieces = [piece for batch in micro_batches for piece in batch.split(number)]
    assert len(pieces) == min(number, 4)
    assert [piece.plan.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert np.concatenate([piece.plan.positions for piece in pieces]).tolist() == [0, 1, 2, 3]
    (loss, gradient), (divided_loss, divided_gradient) = gradient_of(run, micro_batches), gradient_of(run, pieces)
    torch.testing.assert_close(divided_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(divided_gradient, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("size", "pieces"), [(1, [1, 1, 1, 1]), (2, [2, 2]), (3, [2, 2]), (4, [4]), (9, [4])])
def test_a_micro_batch_is_what_a_batch_is_divided_into(settings: dict[str, Any], size: int, pieces: list[int]) -> None:
    run = build(settings)
    (batch,) = next(run.batches(0, 1))
    assert [len(piece.weights) for piece in batch.in_parts_of(size)] == pieces


def test_what_comes_from_the_store_is_divided_with_the_rest(settings: dict[str, Any]) -> None:
    """Of a batch some of whose rows have moments and others pixels, each piece has its own."""
    run = build(settings, center_crop=True, cache_latents="disk")
    assert run.store is not None
    batch = next(run.batches(0, 1))[0]
    made = torch.arange(4.0)[:, None, None, None].expand(4, 8, 8, 8)
    mixed = type(batch)(
        **{
            **{name: getattr(batch, name) for name in batch.__dataclass_fields__},
            "moments": made.clone(),
            "to_encode": torch.tensor([0, 3]),
            "pixels": batch.pixels[[0, 3]],
            "records": [batch.records[0], batch.records[3]],
        }
    )
    first, second = mixed.split(2)
    assert first.to_encode.tolist() == [0]
    assert second.to_encode.tolist() == [1]
    assert [len(first.records), len(second.records)] == [1, 1]
    assert second.records[0] is batch.records[3]
    whole = mixed.all_moments(run.model.encoder.encode)
    parts = torch.cat([piece.all_moments(run.model.encoder.encode) for piece in (first, second)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"center_crop": True}, {"crop": "none"}], ids=["random", "center", "none"])
def test_a_batch_says_where_its_crops_come_from(settings: dict[str, Any], image_folder: Path, changes: Any) -> None:
    """The crop that the batch tells of, taken from the picture, is what its pixels show: also mirrored."""
    run = build(settings, random_flip=True, resolution=24, train_batch_size=8, **changes)
    batch = next(run.batches(0, 1))[0]
    assert batch.original_size.tolist() == [[32, 40]] * 8
    assert batch.target_size.tolist() == [[24, 24]] * 8
    flips = set()
    for number, row in enumerate(batch.plan.rows.tolist()):
        image = Image.open(run.data.rows[row]["image"]["path"]).convert("RGB")
        (height, width), _ = place_crop((32, 40), (24, 24), None if changes.get("crop") else (0.5, 0.5))
        covering = fit_image(image, (height, width), interpolation="lanczos", crop_u=None, flip=False)
        top, left = batch.crop_corner[number].tolist()
        candidates = {}
        for flip in (False, True):
            shown = covering[:, :, ::-1] if flip else covering
            cut = shown[:, top : top + 24, left : left + 24].astype(int)
            candidates[flip] = np.abs(cut - batch.pixels[number].numpy()).mean()
        flips.add(min(candidates, key=candidates.__getitem__))
        assert min(candidates.values()) < 3, (candidates, top, left)
    assert flips == {False, True}


def test_stored_rows_tell_the_same_as_pictures(settings: dict[str, Any]) -> None:
    run = build(settings, center_crop=True, cache_latents="disk", random_flip=True)
    fresh = next(run.batches(0, 1))[0]
    assert run.store is not None
    fresh.all_moments(run.model.encoder.encode, run.store)
    run.store.flush()
    again = build(settings, center_crop=True, cache_latents="disk", random_flip=True)
    stored = next(again.batches(0, 1))[0]
    assert len(stored.to_encode) == 0
    for name in ("original_size", "crop_corner", "target_size"):
        assert torch.equal(getattr(stored, name), getattr(fresh, name)), name
