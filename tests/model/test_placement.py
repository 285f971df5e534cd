"""How the models run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from training_runs import build, forget_accelerator, train

from sd_recipes.commands.cache import fill_cache
from sd_recipes.errors import RecipeError
from sd_recipes.inspection.latents import load_model
from sd_recipes.model.placement import checkpoint_blocks, keep_memory_format
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import allow_tf32


@pytest.fixture(autouse=True)
def _no_precision_is_left() -> Iterator[None]:
    was = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = was
    torch.backends.cudnn.benchmark = False
    forget_accelerator()


def fill(settings: dict[str, Any]) -> None:
    forget_accelerator()
    fill_cache(Recipe(**settings))


@pytest.mark.parametrize("command", [train, fill])
@pytest.mark.parametrize("allowed", [False, True])
def test_defect_14_tf32_is_allowed_in_products_and_convolutions_or_in_neither(
    settings: dict[str, Any], command: Callable[[dict[str, Any]], Any], allowed: bool
) -> None:
    allow_tf32(not allowed)
    command(settings | {"allow_tf32": allowed, "center_crop": True, "max_train_steps": 1})
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")


def test_defect_14_figures_of_data_are_float32s(settings: dict[str, Any]) -> None:
    allow_tf32(True)
    load_model(Recipe(**settings))
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, False)


@pytest.fixture
def unet(tiny_pipeline: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet").train()


def step_of(unet: UNet2DConditionModel) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """How often the last residual block of each block ran in a step, and all gradients."""
    runs: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        return lambda *_: runs.__setitem__(name, runs.get(name, 0) + 1)

    blocks = {"mid": unet.mid_block, "down.0": unet.down_blocks[0], "down.1": unet.down_blocks[1]}
    blocks |= {"up.0": unet.up_blocks[0], "up.1": unet.up_blocks[1]}
    hooks = [block.resnets[-1].conv1.register_forward_pre_hook(count(name)) for name, block in blocks.items()]
    generator = torch.Generator().manual_seed(0)
    noisy, states = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 16, 32)))
    unet(noisy, torch.tensor([10, 500]), states).sample.square().mean().backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: each.grad.clone() for name, each in unet.named_parameters() if each.grad is not None}
    unet.zero_grad()
    return runs, gradients


@pytest.mark.parametrize(
    ("names", "chosen"),
    [(["down.0", "up.1"], {"down.0", "up.1"}), (["up", "mid"], {"up.0", "up.1", "mid"}), (["down", "down.1"],
     {"down.0", "down.1"})],
)  # fmt: skip
def test_only_the_blocks_that_are_named_recompute_and_to_the_bit(
    unet: UNet2DConditionModel, names: list[str], chosen: set[str]
) -> None:
    runs, expected = step_of(unet)
    assert set(runs.values()) == {1}
    checkpoint_blocks(unet, names)
    runs, found = step_of(unet)
    assert {name for name, times in runs.items() if times == 2} == chosen
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_block_that_there_is_not_is_refused_with_those_that_there_are(unet: UNet2DConditionModel) -> None:
    with pytest.raises(
        RecipeError,
        match=r"^--gradient_checkpointing_blocks up.7: .* give some of down, up, down.0, down.1, mid, up.0,",
    ):
        checkpoint_blocks(unet, ["mid", "up.7"])


def test_a_run_recomputes_the_blocks_that_it_names(settings: dict[str, Any]) -> None:
    run = build(settings, gradient_checkpointing_blocks=["mid"])
    unet = run.model.components.unet
    assert [unet.mid_block.gradient_checkpointing, unet.down_blocks[0].gradient_checkpointing] == [
        True,
        False,
    ]


@pytest.mark.parametrize("output_size", [None, (17, 16)])
def test_upsampling_of_a_large_batch_keeps_channels_last_and_its_values(
    monkeypatch: pytest.MonkeyPatch, output_size: tuple[int, int] | None
) -> None:
    """diffusers makes 64 images and more contiguous."""
    layers = torch.nn.Sequential(Upsample2D(32, use_conv=True)).to(memory_format=torch.channels_last)
    images = torch.randn(64, 32, 9, 8, generator=torch.Generator().manual_seed(0))
    images = images.to(memory_format=torch.channels_last).requires_grad_()
    interpolate, formats = torch.nn.functional.interpolate, []

    def noted(tensor: torch.Tensor, **settings: Any) -> torch.Tensor:
        formats.append(tensor.is_contiguous(memory_format=torch.channels_last))
        return interpolate(tensor, **settings)

    monkeypatch.setattr(torch.nn.functional, "interpolate", noted)

    def step() -> list[torch.Tensor]:
        layers.zero_grad()
        images.grad = None
        larger = layers[0](images, output_size)
        larger.square().mean().backward()
        return [each.clone() for each in (larger.detach(), images.grad, layers[0].conv.weight.grad)]  # type: ignore

    before = step()
    keep_memory_format(layers)
    after = step()
    assert formats == [False, True]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("wanted", [False, True])
def test_cudnn_times_its_convolutions_if_asked_to(settings: dict[str, Any], wanted: bool) -> None:
    torch.backends.cudnn.benchmark = not wanted
    build(settings, cudnn_benchmark=wanted)
    assert torch.backends.cudnn.benchmark is wanted
