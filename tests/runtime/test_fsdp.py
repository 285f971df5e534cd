"""A UNet divided among processes trains as a whole one does, and goes on as one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from launching import finish, flags_of, launcher_environment, start, torchrun
from safetensors.torch import load_file
from test_distributed import CONFIGS, assert_close, losses, samples, saved
from test_gradients import start_two, what_ended
from test_loop import assert_ended_on_both
from training_runs import assert_equal, assert_leaves_as_it_came, average, forget_accelerator, train, weights

from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import start_accelerator
from sd_recipes.training.state import OPTIMIZER


@pytest.fixture
def fsdp(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `accelerate launch --config_file accelerate_configs/fsdp2.yaml` gives its processes, without a GPU."""
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.device_count", lambda: 8)
        variables, _ = launcher_environment(CONFIGS / "fsdp2.yaml")
    chosen = {name: value for name, value in variables.items() if name.startswith(("FSDP", "ACCELERATE_USE_FSDP"))}
    assert len(chosen) > 5
    return chosen


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Seven rows in global batches of four, in micro-batches of one: of an epoch's last three one process has one."""
    return settings | {
        "optimizer": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.5, "use_ema": True, "max_train_samples": 7,
        "random_flip": True, "checkpointing_steps": 100, "train_batch_size": 1, "gradient_accumulation_steps": 2,
        "max_train_steps": 6,
    }  # fmt: skip


def run_divided(fsdp: dict[str, str], processes: int, settings: dict[str, Any], **changes: Any) -> str:
    flags = flags_of(settings | changes)
    return finish(start(torchrun(processes), *flags, script="tests/record_samples.py", **fsdp))


@pytest.mark.slow
def test_defect_1_an_infinite_gradient_on_one_of_two_divided_processes(
    settings: dict[str, Any], fsdp: dict[str, str], tmp_path: Path
) -> None:
    settings |= {"train_batch_size": 2, "gradient_accumulation_steps": 1}
    assert_ended_on_both(settings, tmp_path / "out", **fsdp)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_divided_run_is_the_whole_one_and_goes_on_to_the_bit(
    settings: dict[str, Any], fsdp: dict[str, str], tmp_path: Path, optimizer: str
) -> None:
    one = train(settings, train_batch_size=4, gradient_accumulation_steps=1, output_dir=str(tmp_path / "one"))
    settings |= {"validation_prompts": "a disc", "validation_steps": 3, "validation_inference_steps": 2}
    settings |= {"optimizer": optimizer}
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    output = run_divided(fsdp, 2, settings, output_dir=uninterrupted)
    assert "sharded over 2 processes (FSDP2)" in output
    run_divided(fsdp, 2, settings, output_dir=resumed, max_train_steps=3)
    run_divided(fsdp, 2, settings, output_dir=resumed)
    for folder in ("unet", "unet_ema"):
        assert_equal(saved(uninterrupted, 6, folder), saved(resumed, 6, folder))
    states = [load_file(path / "checkpoint-6" / OPTIMIZER) for path in (uninterrupted, resumed)]
    assert_equal(*states)
    assert len(states[0]) >= len(weights(one))
    assert losses(uninterrupted) == losses(resumed)
    picture = "samples/step-000006.png"
    assert (uninterrupted / picture).read_bytes() == (resumed / picture).read_bytes()
    # Each sample once, by one of the processes.
    assert [position for position, _ in samples(uninterrupted)] == list(range(21))
    if optimizer == "sgd":  # AdamW makes a full step of the smallest difference in a gradient
        assert losses(uninterrupted) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        assert_close(weights(one), saved(uninterrupted, 6, "unet"))
        assert_close(average(one).named_tensors(), saved(uninterrupted, 6, "unet_ema"))
    # What is exported is whole, has the average's weights, and is of diffusers' own classes.
    assert_equal(
        StableDiffusionPipeline.from_pretrained(uninterrupted).unet.state_dict(), saved(uninterrupted, 6, "unet_ema")
    )
    assert (
        UNet2DConditionModel.load_config(uninterrupted / "checkpoint-6" / "unet")["_class_name"]
        == "UNet2DConditionModel"
    )


@pytest.mark.slow
def test_sdxls_unet_is_divided_too(
    settings: dict[str, Any], tiny_xl_pipeline: Path, fsdp: dict[str, str], tmp_path: Path
) -> None:
    settings |= {"pretrained_model_name_or_path": str(tiny_xl_pipeline), "max_train_steps": 3}
    one = train(settings, train_batch_size=4, gradient_accumulation_steps=1, output_dir=str(tmp_path / "one"))
    assert "sharded over 2 processes (FSDP2)" in run_divided(fsdp, 2, settings, output_dir=tmp_path / "two")
    assert_close(weights(one), saved(tmp_path / "two", 3, "unet"))
    assert_close(average(one).named_tensors(), saved(tmp_path / "two", 3, "unet_ema"))
    unet = StableDiffusionXLPipeline.from_pretrained(tmp_path / "two").unet
    assert_equal(unet.state_dict(), saved(tmp_path / "two", 3, "unet_ema"))


@pytest.mark.slow
def test_a_divided_run_has_the_rates_of_the_whole_one_and_leaves_frozen_weights_alone(
    settings: dict[str, Any], fsdp: dict[str, str], tmp_path: Path
) -> None:
    groups = {"*.down_blocks.*": 0.0, "*.attn2.*": 0.02}
    one = train(
        settings, train_batch_size=4, gradient_accumulation_steps=1, output_dir=str(tmp_path / "one"),
        param_groups=[{"pattern": pattern, "learning_rate": rate} for pattern, rate in groups.items()],
    )  # fmt: skip
    assert any(not each.requires_grad for each in one.model.components.unet.parameters())
    words = [f"{pattern}={rate}" for pattern, rate in groups.items()]
    flags = [*flags_of(settings | {"output_dir": tmp_path / "two"}), "--param_groups", *words]
    finish(start(torchrun(2), *flags, script="tests/record_samples.py", **fsdp))
    assert_close(weights(one), saved(tmp_path / "two", 6, "unet"))
    assert_close(average(one).named_tensors(), {
        name: each for name, each in saved(tmp_path / "two", 6, "unet_ema").items() if name in average(one).names
    })  # fmt: skip


def test_a_divided_gradient_is_the_mean_over_the_usable_rows(
    settings: dict[str, Any], fsdp: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(settings["train_data_dir"], folder)
    for row in range(3):
        (folder / f"{row}.png").write_bytes(b"broken")
    settings |= {
        "train_data_dir": str(folder), "max_bad_rows": 3, "check_data": "off", "max_train_steps": 2,
        "max_grad_norm": 1e9,
    }  # fmt: skip
    one = train(settings, train_batch_size=4, gradient_accumulation_steps=1, output_dir=str(tmp_path / "one"))
    run_divided(fsdp, 2, settings, output_dir=tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert_close(weights(one), saved(tmp_path / "two", 2, "unet"))


def test_defect_10_frozen_parts_leave_a_divided_run_as_they_came(
    settings: dict[str, Any], fsdp: dict[str, str], tiny_pipeline: Path, tmp_path: Path
) -> None:
    pictures = {"validation_prompts": "a disc", "validation_steps": 2, "validation_inference_steps": 1}
    run_divided(fsdp, 2, settings | pictures, mixed_precision="bf16", max_train_steps=2, output_dir=tmp_path / "run")
    assert_leaves_as_it_came(tmp_path / "run", tiny_pipeline)


@pytest.mark.slow
def test_a_run_goes_on_divided_or_whole(settings: dict[str, Any], fsdp: dict[str, str], tmp_path: Path) -> None:
    one = train(settings, train_batch_size=4, gradient_accumulation_steps=1, output_dir=str(tmp_path / "one"))
    moved = {**settings, "output_dir": tmp_path / "moved"}
    run_divided(fsdp, 2, moved, max_train_steps=2)
    train(moved, output_dir=str(tmp_path / "moved"), max_train_steps=4, resume_from_checkpoint="latest")
    run_divided(fsdp, 3, moved)
    assert_close(weights(one), saved(tmp_path / "moved", 6, "unet"))


@pytest.mark.slow
def test_a_class_that_the_unet_has_not_is_named(settings: dict[str, Any], fsdp: dict[str, str], tmp_path: Path) -> None:
    wrong = fsdp | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,UNetBlock"}
    process = start(torchrun(2), *flags_of(settings), **wrong)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: fsdp_transformer_layer_cls_to_wrap of accelerate's configuration names UNetBlock" in output


@pytest.mark.parametrize(
    ("changes", "variables", "words"),
    [
        ({"optimizer": "adamw8bit"}, {}, "--optimizer adamw8bit needs whole weights"),
        ({"optimizer": "adafactor"}, {}, "use adamw or sgd"),
        ({"offload_ema": True}, {}, "--offload_ema needs whole weights"),
        ({"compile": "blocks"}, {}, "--compile blocks needs whole weights"),
        ({"compile_unet": True}, {}, "--compile_unet needs whole weights"),
        ({"channels_last": "always"}, {}, "--channels_last always needs whole weights"),
        ({}, {"FSDP_VERSION": "1"}, "write fsdp_version: 2"),
        ({}, {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ],
)
def test_what_does_not_go_with_it_is_said_before_anything_is_loaded(
    settings: dict[str, Any],
    fsdp: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    variables: dict[str, str],
    words: str,
) -> None:
    for name, value in (fsdp | variables).items():
        monkeypatch.setenv(name, value)
    forget_accelerator()
    with pytest.raises(RecipeError, match=words):
        start_accelerator(Recipe(**settings | changes))


def test_one_process_has_nothing_to_divide(
    settings: dict[str, Any],
    fsdp: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in fsdp.items():
        monkeypatch.setenv(name, value)
    training = train(settings, max_train_steps=1)
    assert "it stays whole" in caplog.text
    assert type(training.model.components.unet.conv_in.weight) is torch.nn.Parameter


@pytest.mark.slow
@pytest.mark.parametrize("place", ["forward", "last backward", "optimizer"])
def test_a_process_that_runs_out_of_memory_ends_the_run_with_advice(
    settings: dict[str, Any], fsdp: dict[str, str], place: str
) -> None:
    """Its processes wait for each other within the passes: no step is done again, and nobody hangs."""
    short = {"place": place, "fits": 0, "step": 3, "rank": 1}
    told = what_ended(start_two(settings | {"checkpointing_steps": 1}, {"short": short}, **fsdp))
    words = r"error: no memory for what follows step 2, which cannot be done again \(CUDA out of memory[^)]*\): use "
    assert re.search(words, told)
    assert "then resumes from checkpoint-2" in told
