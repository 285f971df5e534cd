"""Learning rates by parameters' names: who gets which, what is frozen, and what stays whole all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from training_runs import assert_equal, average, build, train, weights

from sd_recipes.errors import RecipeError
from sd_recipes.memory.plan import plan_memory
from sd_recipes.memory.step import AVERAGE, GRADIENTS, OPTIMIZER
from sd_recipes.recipe import Recipe
from sd_recipes.training.build_parts import UNET_WEIGHTS
from sd_recipes.training.description import describe
from sd_recipes.training.run import Run

GROUPS = [
    {"pattern": "*.attn2.*", "learning_rate": 1e-5},
    {"pattern": "unet.mid_block.*", "learning_rate": 2e-4},
    {"pattern": "*.down_blocks.*", "learning_rate": 0},
]


def rates(run: Run) -> dict[str, float]:
    """By PART/NAME, of the optimizer's own groups."""
    names = {id(parameter): name for name, parameter in run.state.parameters.items()}
    return {names[id(each)]: group["lr"] for group in run.state.optimizer.param_groups for each in group["params"]}


def test_the_first_pattern_that_matches_counts(settings: dict[str, Any]) -> None:
    run = build(settings, param_groups=GROUPS, scale_lr=True, train_text_encoder=True, text_encoder_learning_rate=3e-5)
    found = rates(run)
    assert found["unet/conv_in.weight"] == pytest.approx(4e-3)
    assert found["text_encoder/embeddings.token_embedding.weight"] == pytest.approx(1.2e-4)
    for name, _ in run.model.components.unet.named_parameters():
        if ".attn2." in name:
            assert found[f"unet/{name}"] == pytest.approx(4e-5)
        elif name.startswith("mid_block."):
            assert found[f"unet/{name}"] == pytest.approx(8e-4)
        elif "down_blocks." in name:
            assert f"unet/{name}" not in found
    unet, lines = run.model.components.unet, describe(run).splitlines()
    attention = [each for name, each in unet.named_parameters() if ".attn2." in name]
    number = sum(each.numel() for each in attention)
    place = lines.index(f"  parameters of groups *.attn2.*=1e-05 has {number:,} in {len(attention)} tensors")
    assert lines[place + 1].startswith(f"{'':<23}unet.mid_block.*=0.0002 has ")
    assert lines[place + 2].startswith(f"{'':<23}*.down_blocks.*=0 has ")
    assert list(found) == list(run.state.optimized), "saved and restored in this order"


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("*.atn2.*", r"--param_groups \*.atn2.\* matches no parameter \(nearest: attn2\): names are like unet\."),
        ("unet.down_block.*", r"matches no parameter \(nearest: unet.down_blocks\)"),
        ("unet.mid_block.attentions.*", r"matches only what patterns before it do: put it before them, or drop it"),
        ("*", "--param_groups freezes all of unet: leave something of it to train"),
    ],
)
def test_patterns_that_help_nobody(settings: dict[str, Any], pattern: str, words: str) -> None:
    groups = [{"pattern": "unet.mid_block.*", "learning_rate": 0}, {"pattern": pattern, "learning_rate": 0}]
    with pytest.raises(RecipeError, match=words):
        build(settings, param_groups=groups)


def test_frozen_parameters_take_part_in_nothing_and_a_checkpoint_is_whole(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"param_groups": GROUPS, "use_ema": True, "lr_scheduler": "cosine", "max_train_steps": 5,
                 "checkpointing_steps": 3}  # fmt: skip
    whole = train(settings)
    fresh = weights(build(settings, output_dir=str(tmp_path / "fresh")))
    frozen = {name for name in fresh if "down_blocks." in name and ".attn2." not in name}
    unmoved = {name for name, each in weights(whole).items() if torch.equal(each, fresh[name])}
    assert unmoved == frozen
    names = {name.removeprefix("unet/") for name in whole.state.parameters}
    assert set(average(whole).names) == names == set(fresh) - frozen
    assert all(each.grad is None for each in whole.model.components.unet.parameters() if not each.requires_grad)
    saved = tmp_path / "run" / "checkpoint-3"
    assert {name.split("/")[1] for name in load_file(saved / "optimizer.safetensors")} == names
    for folder in ("unet", "unet_ema"):
        loaded = UNet2DConditionModel.from_pretrained(saved / folder).state_dict()
        assert {name for name, each in loaded.items() if torch.equal(each, fresh[name])} >= frozen

    resumed = train(settings, resume_from_checkpoint="checkpoint-3")
    assert_equal(weights(whole), weights(resumed))
    assert_equal(average(whole).named_tensors(), average(resumed).named_tensors())


@pytest.mark.slow
def test_groups_that_changed_go_on_by_name(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    settings |= {"use_ema": True, "max_train_steps": 5, "checkpointing_steps": 3}
    begun = train(settings, param_groups=GROUPS)
    raw, averaged = (
        load_file(begun.output_dir / "checkpoint-3" / name / UNET_WEIGHTS) for name in ("unet", "unet_ema")
    )
    saved = {name: averaged[name] if ".attn2." in name else each for name, each in raw.items()}
    thawed = train(settings, param_groups=[{"pattern": "*.attn2.*", "learning_rate": 0}],
                   resume_from_checkpoint="checkpoint-3")  # fmt: skip
    assert "--param_groups is " in caplog.text
    assert "the run continues with the new value" in caplog.text
    moved = {name for name, each in weights(thawed).items() if not torch.equal(each, saved[name])}
    assert moved == {name for name in saved if ".attn2." not in name}
    trained_before = {name.removeprefix("unet/") for name in begun.state.parameters}
    steps = {name.removeprefix("unet/"): state["step"].item() for name, state in by_name(thawed).items()}
    assert {steps[name] for name in moved - trained_before} == {2}, "they begin"
    assert {steps[name] for name in moved & trained_before} == {5}, "these go on"


def by_name(run: Run) -> dict[str, Any]:
    return {name: run.state.optimizer.state[parameter] for name, parameter in run.state.optimized.items()}


@pytest.mark.slow
def test_groups_of_a_lora_and_of_its_text_encoder(settings: dict[str, Any]) -> None:
    groups = [
        {"pattern": "unet_lora.*.attn2.*", "learning_rate": 0},
        {"pattern": "text_encoder_lora.*", "learning_rate": 1e-5},
    ]
    settings |= {"lora_rank": 2, "lora_text_encoder": True, "param_groups": groups, "checkpointing_steps": 2}
    whole = train(settings)
    assert {rate for name, rate in rates(whole).items() if name.startswith("text")} == {1e-5}
    resumed = train(settings, resume_from_checkpoint="checkpoint-2")
    for part in whole.state.parts.values():
        assert_equal(part.tensors(), resumed.state.parts[part.name].tensors())
        frozen = [name for name in part.tensors() if name not in part.parameters]
        assert all(".attn2." in name for name in frozen)
        assert bool(frozen) == (part.name == "unet_lora")


@pytest.mark.slow
def test_the_plan_counts_no_state_of_what_is_frozen(tiny_pipeline: Path) -> None:
    recipe = Recipe(pretrained_model_name_or_path=str(tiny_pipeline), train_data_dir="x", resolution=32, use_ema=True)
    groups = Recipe(**recipe.model_dump(exclude={"param_groups"}), param_groups=GROUPS)
    whole, part = (plan_memory(each, "cpu").moments["clipping"].by_kind for each in (recipe, groups))
    for kind in (OPTIMIZER, AVERAGE, GRADIENTS):
        assert 0 < part[kind] < 0.9 * whole[kind]
    assert part[OPTIMIZER] == pytest.approx(2 * part[GRADIENTS], rel=0.05)
