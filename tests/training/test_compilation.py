"""A compiled UNet: what is compiled and how often, and that it trains as the eager one does."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.compiler.config
from diffusers import StableDiffusionPipeline
from training_runs import assert_equal, build, fit_from, losses, train, weights

from sd_recipes.errors import RecipeError
from sd_recipes.export.pipeline import export_trained
from sd_recipes.flags import load_recipe
from sd_recipes.model import compilation
from sd_recipes.recipe import Recipe


@pytest.fixture(autouse=True)
def _compiler_is_left_as_it_was() -> Iterator[None]:
    config = torch.compiler.config
    was = config.recompile_limit, config.accumulated_recompile_limit
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    config.recompile_limit, config.accumulated_recompile_limit = was


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The programs that torch.compile asks for. They are not compiled further, and so compute the same to the bit."""
    found: list[torch.fx.GraphModule] = []

    def noted(program: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(program)
        return program.forward

    arguments = compilation.compiler_arguments
    monkeypatch.setattr(
        compilation, "compiler_arguments",
        lambda how: {**arguments(how), "backend": noted, "options": None},
    )  # fmt: skip
    return found


# Dynamo looks whether an activation has a gradient, as it does where warnings are no errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
VALIDATED = {"validation_split": "train", "validation_steps": 1, "validation_prompts": ["disc"],
             "validation_inference_steps": 1}  # fmt: skip


@pytest.mark.slow
def test_blocks_share_programs_that_validations_do_not_use(
    settings: dict[str, Any], programs: list[torch.fx.GraphModule], caplog: pytest.LogCaptureFixture
) -> None:
    """8 rows in batches of 3: an epoch ends with a smaller one, which has programs of its own."""
    settings |= {"train_batch_size": 3, "max_train_steps": 3}
    eager = train(settings, output_dir=settings["output_dir"] + "-eager")
    with caplog.at_level(logging.WARNING):
        compiled = build(settings, **VALIDATED, compile="blocks")
        fit_from(compiled)
    assert_equal(weights(eager), weights(compiled))
    num_blocks = sum(isinstance(module, compilation.REPEATED) for module in compiled.model.components.unet.modules())
    assert 0 < len(programs) < 2 * num_blocks
    assert "recompile_limit" not in caplog.text
    assert all("_orig_mod" not in name for name in weights(compiled))


@pytest.mark.slow
def test_a_whole_unet_is_one_program_for_each_shape_and_a_graph_begins_with_each_micro_batch(
    settings: dict[str, Any], programs: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    settings |= {"train_batch_size": 3, "max_train_steps": 2, "gradient_accumulation_steps": 2}
    eager = train(settings, output_dir=settings["output_dir"] + "-eager")
    compiled = train(settings, **VALIDATED, compile="graphs")
    assert_equal(weights(eager), weights(compiled))
    assert len(programs) == 2
    assert len(begun) == 3, "8 rows in batches of 3, two to a step"


def test_a_gradient_of_a_graph_is_copied_out_of_its_memory_before_micro_batches_are_added_up(
    settings: dict[str, Any],
) -> None:
    """As CUDA graphs have it: each backward pass writes its gradients to the same memory."""
    run = build(settings, compile="graphs", gradient_accumulation_steps=2)
    parameter = run.model.components.unet.conv_in.weight
    of_graph = torch.zeros_like(parameter)

    class OfGraph(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
            return weight.sum()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return of_graph.add_(1).view_as(of_graph)

    for expected in (1, 3):
        OfGraph.apply(parameter).backward()
        assert parameter.grad is not None
        assert parameter.grad.unique().tolist() == [expected]


@pytest.mark.parametrize(("changes", "num_programs"), [({}, 4), ({"dream_training": True}, 8)])
def test_as_many_programs_as_a_run_has_shapes_and_ways_to_call_the_unet(
    settings: dict[str, Any], changes: dict[str, Any], num_programs: int
) -> None:
    torch.compiler.config.recompile_limit = 1
    build(settings, compile="unet", **changes)
    assert torch.compiler.config.recompile_limit == num_programs


def test_compile_unet_is_another_name(settings: dict[str, Any]) -> None:
    assert Recipe(**settings, compile_unet=True).compile == "unet"
    flags = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "y"]
    with pytest.raises(RecipeError, match="--compile_unet contradicts --compile blocks: drop one of them"):
        load_recipe([*flags, "--compile_unet", "--compile", "blocks"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: without one nothing is compiled here")
@pytest.mark.parametrize(("how", "changes"), [
    ("blocks", {"gradient_checkpointing": True, "train_batch_size": 2, "gradient_accumulation_steps": 2}),
    ("blocks", {"lora_rank": 2, "mixed_precision": "bf16"}),
    ("unet", {}),
    ("graphs", {"use_ema": True}),
])  # fmt: skip
def test_what_is_compiled_trains_as_the_eager_one_up_to_rounding(
    settings: dict[str, Any], how: str, changes: dict[str, Any]
) -> None:
    """And resumes to the bit, and leaves a pipeline that draws."""
    settings |= {"optimizer": "sgd", "learning_rate": 1e-2, "max_train_steps": 4, "checkpointing_steps": 2, **changes}
    eager = train(settings, output_dir=settings["output_dir"] + "-eager")
    compiled = train(settings, compile=how)
    tolerance = 2e-2 if "mixed_precision" in changes else 1e-4
    assert losses(compiled) == pytest.approx(losses(eager), rel=tolerance)
    resumed = train(
        settings, compile=how, output_dir=settings["output_dir"] + "-resumed",
        resume_from_checkpoint=f"{settings['output_dir']}/checkpoint-2",
    )  # fmt: skip
    assert_equal(weights(compiled), weights(resumed))
    components = compiled.model.components
    export_trained(compiled.model.family, components, compiled.recipe, compiled.output_dir)
    if "lora_rank" not in changes:
        stock = StableDiffusionPipeline.from_pretrained(compiled.output_dir)
        stock.set_progress_bar_config(disable=True)
        stock("disc", num_inference_steps=1, height=32, width=32)
