"""State made of named parts: a second part is saved, resumed, averaged and exported like the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import assert_equal, build, train

from sd_recipes.checkpoints.format import verify_checkpoint
from sd_recipes.errors import RecipeError
from sd_recipes.model.stable_diffusion import StableDiffusion
from sd_recipes.recipe import Recipe
from sd_recipes.training.build_parts import trained_parts
from sd_recipes.training.state import TrainedPart


class AdaptedDiffusion(StableDiffusion):
    """A Stable Diffusion whose text states go through a trained linear map: a second part, made here."""

    def conditioning(self, states: Any, batch: Any) -> Any:
        return {"encoder_hidden_states": self.adapter(states["encoder_hidden_states"])}


@pytest.fixture
def two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs train an adapter beside the UNet; nothing but the family and the list of parts knows of it."""

    def with_adapter(recipe: Recipe, family: Any, components: Any, batch_size: int) -> dict[str, TrainedPart]:
        adapter = torch.nn.Linear(32, 32, bias=False)
        torch.nn.init.eye_(adapter.weight)
        components.adapter = family.adapter = adapter

        def rebuild(tensors: Any) -> torch.nn.Module:
            raise AssertionError("it is not sharded")

        def export(tensors: Any, output_dir: Path) -> None:
            save_file(dict(tensors), output_dir / "adapter.safetensors")

        part = TrainedPart("adapter", adapter, "weights.safetensors", '{"size": 32}', 1e-2, rebuild, export)
        return trained_parts(recipe, family, components, batch_size) | {"adapter": part}

    monkeypatch.setattr("sd_recipes.training.build_model.trained_parts", with_adapter)
    monkeypatch.setattr("sd_recipes.training.build.family_of", lambda recipe: AdaptedDiffusion())


EVERYTHING = {
    "max_train_steps": 6, "checkpointing_steps": 3, "use_ema": True, "gradient_accumulation_steps": 2,
    "train_batch_size": 2, "lr_scheduler": "cosine",
}  # fmt: skip


@pytest.mark.usefixtures("two_parts")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd", "adafactor"])
def test_a_second_part_is_saved_resumed_and_averaged_to_the_bit(
    settings: dict[str, Any], tmp_path: Path, optimizer: str
) -> None:
    settings = {**settings, **EVERYTHING, "optimizer": optimizer}
    whole = train(settings, output_dir=str(tmp_path / "whole"))
    begun = train(settings, output_dir=str(tmp_path / "begun"), max_train_steps=3, lr_scheduler="constant")
    assert not torch.equal(begun.state.parts["adapter"].module.weight, torch.eye(32)), "it is trained"
    interrupted = tmp_path / "whole" / "checkpoint-3"
    manifest = verify_checkpoint(interrupted)
    assert {"adapter/weights.safetensors", "adapter_ema/weights.safetensors", "adapter/config.json"} <= set(
        manifest.files
    )
    resumed = train(settings, output_dir=str(tmp_path / "whole"), resume_from_checkpoint="checkpoint-3")
    for name in ("unet", "adapter"):
        one, other = whole.state.parts[name], resumed.state.parts[name]
        assert_equal(one.module.state_dict(), other.module.state_dict())
        assert_equal(one.average.named_tensors(), other.average.named_tensors())
    first, second = (run.state.state_dict() for run in (whole, resumed))
    assert first.values == second.values
    assert_equal(first.tensors["optimizer.safetensors"], second.tensors["optimizer.safetensors"])


@pytest.mark.usefixtures("two_parts")
def test_each_part_has_its_own_learning_rate(settings: dict[str, Any]) -> None:
    run = build(settings)
    assert [group["lr"] for group in run.state.optimizer.param_groups] == [1e-3, 1e-2]
    assert list(run.state.parameters)[-1] == "adapter/weight"


def test_a_checkpoint_of_other_parts_is_refused(settings: dict[str, Any], request: pytest.FixtureRequest) -> None:
    train(settings, max_train_steps=2, checkpointing_steps=2)
    request.getfixturevalue("two_parts")
    with pytest.raises(RecipeError, match=r"trains unet, adapter, and .*checkpoint-2 is of one that trains unet:"):
        train(settings, max_train_steps=4, resume_from_checkpoint="latest")


def test_tensors_are_named_by_the_parameter_they_belong_to(settings: dict[str, Any], tmp_path: Path) -> None:
    run = train(settings, max_train_steps=2, checkpointing_steps=2)
    names = set(load_file(tmp_path / "run" / "checkpoint-2" / "optimizer.safetensors"))
    assert {f"unet/{name}/exp_avg" for name, _ in run.model.components.unet.named_parameters()} <= names


def test_a_state_loads_into_parts_that_were_made_in_another_order(settings: dict[str, Any]) -> None:
    """By name, not by number: the optimizer of a run whose parameters are listed differently gets the right state."""
    run = train(settings, max_train_steps=2)
    saved = run.state.state_dict()
    fresh = build(settings)
    part = fresh.state.parts["unet"]
    names = list(part.parameters)[::-1]
    parameters = dict(part.module.named_parameters())
    group = fresh.state.optimizer.param_groups[0]
    group["params"][:] = [parameters[name] for name in names]
    fresh.state.parts = {"unet": _listed_as(part, names)}
    fresh.state.load_state_dict(
        {file: {name: tensor.clone() for name, tensor in named.items()} for file, named in saved.tensors.items()},
        saved.values,
    )
    for name, parameter in parameters.items():
        loaded = fresh.state.optimizer.state[parameter]["exp_avg"]
        assert torch.equal(loaded, saved.tensors["optimizer.safetensors"][f"unet/{name}/exp_avg"]), name


def _listed_as(part: TrainedPart, names: list[str]) -> TrainedPart:
    class Listed(TrainedPart):
        @property
        def parameters(self) -> dict[str, torch.nn.Parameter]:
            found = dict(self.module.named_parameters())
            return {name: found[name] for name in names}

    return Listed(part.name, part.module, part.weights_file, part.config, part.learning_rate, part.rebuild)


@pytest.mark.usefixtures("two_parts")
@pytest.mark.parametrize("use_ema", [False, True])
def test_a_part_leaves_what_it_exports_by_itself(settings: dict[str, Any], tmp_path: Path, use_ema: bool) -> None:
    """Its evaluated weights, which are the average's where there is one."""
    run = train(settings, use_ema=use_ema)
    run.state.export(tmp_path / "run", is_main=True)
    part = run.state.parts["adapter"]
    wanted = part.average.named_tensors() if part.average else part.module.state_dict()
    assert_equal(load_file(tmp_path / "run" / "adapter.safetensors"), dict(wanted))
    assert not torch.equal(wanted["weight"], torch.eye(32))


@pytest.mark.usefixtures("two_parts")
def test_an_average_is_exchanged_with_the_weights_and_back_to_the_bit(settings: dict[str, Any]) -> None:
    run = train(settings, use_ema=True)
    part = run.state.parts["unet"]
    weights_before = {name: each.detach().clone() for name, each in part.module.state_dict().items()}
    average_before = {name: each.clone() for name, each in part.average.named_tensors().items()}
    with run.state.evaluated(run.model.components):
        assert_equal(dict(part.module.state_dict()), average_before)
    assert_equal(dict(part.module.state_dict()), weights_before)
    assert_equal(dict(part.average.named_tensors()), average_before)
