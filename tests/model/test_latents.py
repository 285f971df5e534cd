"""pixel_values to moments to latents."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from sd_recipes.model.latents import LatentEncoder, images_at_once, most_pixels, to_pixel_values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_defect_15_pixel_values_are_the_nearest_of_all_256_levels(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    values = to_pixel_values(levels, dtype)
    assert values.dtype == dtype
    neighbours = [torch.nextafter(values, torch.tensor(end, dtype=dtype)) for end in (-2.0, 2.0)]
    for level, value, *others in zip(range(256), values.tolist(), *(each.tolist() for each in neighbours), strict=True):
        exact = Fraction(2 * level, 255) - 1
        assert all(abs(Fraction(value) - exact) <= abs(Fraction(other) - exact) for other in others), level


def test_defect_15_pixel_values_in_float32_are_scaled_as_ever() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixel_values(levels, torch.float32), levels.to(torch.float32) / 127.5 - 1)


@pytest.fixture
def encoder(tiny_pipeline: Path) -> LatentEncoder:
    vae = AutoencoderKL.from_pretrained(tiny_pipeline, subfolder="vae").eval()
    return LatentEncoder(vae, torch.device("cpu"), torch.float32)


PIXELS = torch.randint(256, (7, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_a_large_batch_is_encoded_in_parts(encoder: LatentEncoder) -> None:
    sizes: list[int] = []
    encoder.vae.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    whole = encoder.encode(PIXELS)
    encoder.most_pixels = 3 * 32 * 32 + 1
    parts = encoder.encode(PIXELS)
    encoder.most_pixels = 1
    one_by_one = encoder.encode(PIXELS)
    assert sizes == [7, 3, 3, 1] + [1] * 7
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(one_by_one, whole)


def test_a_cpu_takes_eight_images_of_64_pixels_at_once_and_a_gpu_more(encoder: LatentEncoder) -> None:
    sizes: list[int] = []
    encoder.vae.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    encoder.encode(torch.zeros(9, 3, 64, 64, dtype=torch.uint8))
    assert sizes == [8, 1]
    assert images_at_once(most_pixels("cuda"), 64 * 64) == 256
    assert images_at_once(most_pixels("cpu"), 512 * 512) == 1


def test_sliced_an_image_is_encoded_alike_in_every_batch(encoder: LatentEncoder) -> None:
    encoder.vae.enable_slicing()
    whole = encoder.encode(PIXELS)
    assert torch.equal(torch.cat([encoder.encode(each[None]) for each in PIXELS]), whole)


def test_tiles_are_those_of_large_images_only(encoder: LatentEncoder) -> None:
    whole, large = encoder.encode(PIXELS), torch.cat([PIXELS, PIXELS.flip(-1)], dim=-1)
    large_whole = encoder.encode(large)
    encoder.vae.enable_tiling()
    assert encoder.vae.tile_sample_min_size == 32
    assert torch.equal(encoder.encode(PIXELS), whole)
    tiled = encoder.encode(large)
    assert tiled.shape == large_whole.shape
    assert not torch.allclose(tiled, large_whole)
