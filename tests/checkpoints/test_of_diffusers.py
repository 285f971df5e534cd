"""Checkpoints of diffusers' script: made by accelerate's save_state, recognised, and taken over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from test_resume import figures, run_it
from training_runs import assert_equal, assert_leaves_as_it_came, average, build, forget_accelerator, weights

from sd_recipes.checkpoints.of_diffusers import is_of_diffusers
from sd_recipes.commands.train import restore
from sd_recipes.errors import RecipeError
from sd_recipes.training.build_parts import UNET_WEIGHTS

STEPS = 3


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"lr_scheduler": "linear", "max_train_steps": 6, "use_ema": True}


def their_checkpoint(
    settings: dict[str, Any], folder: Path
) -> tuple[UNet2DConditionModel, torch.optim.AdamW, EMAModel]:
    """checkpoint-3 of a loop like diffusers', saved by accelerate with the script's kind of hook; what is in it."""
    forget_accelerator()
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(settings["pretrained_model_name_or_path"], subfolder="unet")
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    accelerator = Accelerator(cpu=True)
    path = folder / f"checkpoint-{STEPS}"

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        ema.save_pretrained(path / "unet_ema")
        for model in models:
            model.save_pretrained(path / "unet")
            weights.pop()

    accelerator.register_save_state_pre_hook(save)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=6)
    prepared, wrapped, schedule = accelerator.prepare(unet, optimizer, schedule)
    for _ in range(STEPS):
        noise = torch.randn(2, 4, 8, 8)
        prediction = prepared(noise, torch.tensor([1, 5]), torch.randn(2, 16, 32)).sample
        accelerator.backward((prediction - noise).square().mean())
        wrapped.step()
        schedule.step()
        wrapped.zero_grad()
        ema.step(unet.parameters())
    accelerator.save_state(path)
    return unet, optimizer, ema


def test_unet_optimizer_average_and_step_are_taken_over(settings: dict[str, Any], tmp_path: Path) -> None:
    unet, optimizer, ema = their_checkpoint(settings, tmp_path / "old")
    path = tmp_path / "old" / f"checkpoint-{STEPS}"
    assert is_of_diffusers(path)
    run = build(settings, resume_from_checkpoint=str(path))
    restore(run)
    assert_equal(weights(run), unet.state_dict())
    names = [name for name, _ in unet.named_parameters()]
    theirs = dict(zip(names, optimizer.state.values(), strict=True))
    found = run.state.state_dict().tensors["optimizer.safetensors"]
    expected = {f"unet/{name}/{key}": value for name, each in theirs.items() for key, value in each.items()}
    assert_equal(dict(found), expected)
    assert_equal(
        average(run).named_tensors(),
        dict(zip([name for name, _ in unet.named_parameters()], ema.shadow_params, strict=True)),
    )
    assert average(run).num_updates == STEPS
    assert run.state.progress.global_step == STEPS
    assert run.state.schedule.get_last_lr() == pytest.approx([0.5e-3])


def test_the_run_goes_on_and_its_pipeline_draws(settings: dict[str, Any], tmp_path: Path) -> None:
    their_checkpoint(settings, tmp_path / "old")
    path, out = tmp_path / "old" / f"checkpoint-{STEPS}", tmp_path / "run"
    run_it(settings, resume_from_checkpoint=str(path), checkpointing_steps=1)
    assert [line["step"] for line in figures(out) if "train_loss" in line] == [4, 5, 6]
    assert all(0.1 < line["train_loss"] < 3 for line in figures(out) if "train_loss" in line)
    assert_leaves_as_it_came(out, Path(settings["pretrained_model_name_or_path"]))
    shutil.rmtree(tmp_path / "old")
    run_it(settings, max_train_steps=7)
    assert figures(out)[-1]["step"] == 7, "from its own checkpoint, without theirs"


def test_without_an_average_it_begins_at_the_unet(settings: dict[str, Any], tmp_path: Path) -> None:
    unet, *_ = their_checkpoint(settings, tmp_path / "old")
    path = tmp_path / "old" / f"checkpoint-{STEPS}"
    shutil.rmtree(path / "unet_ema")
    run = build(settings, resume_from_checkpoint=str(path))
    restore(run)
    assert_equal(average(run).named_tensors(), dict(unet.named_parameters()))
    assert average(run).num_updates == 0


def swap_two_shapes(path: Path) -> None:
    saved = torch.load(path / "optimizer.bin", weights_only=True)
    saved["state"][0], saved["state"][1] = saved["state"][1], saved["state"][0]
    torch.save(saved, path / "optimizer.bin")


def one_parameter_less(path: Path) -> None:
    saved = torch.load(path / "optimizer.bin", weights_only=True)
    last = max(saved["state"])
    del saved["state"][last]
    saved["param_groups"][0]["params"].remove(last)
    torch.save(saved, path / "optimizer.bin")


def of_sgd(path: Path) -> None:
    saved = torch.load(path / "optimizer.bin", weights_only=True)
    saved["state"] = {number: {"momentum_buffer": each["exp_avg"]} for number, each in saved["state"].items()}
    torch.save(saved, path / "optimizer.bin")


class Runs:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def hostile(path: Path) -> None:
    torch.save({"state": Runs(), "param_groups": []}, path / "optimizer.bin")


def without_unet(path: Path) -> None:
    shutil.rmtree(path / "unet")


def other_unet(path: Path) -> None:
    file = path / "unet" / UNET_WEIGHTS
    tensors = load_file(file)
    save_file({name: torch.zeros(1) if "conv_in" in name else value for name, value in tensors.items()}, file)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (swap_two_shapes, "exp_avg of unet/conv_in.weight is"),
        (one_parameter_less, "optimizer.bin has the state of"),
        (of_sgd, "optimizer.bin is not AdamW's: it has momentum_buffer"),
        (hostile, "Weights only load failed"),
        (lambda path: (path / "optimizer.bin").write_bytes(b"PK\x03\x04"), "start from its UNet alone"),
        (lambda path: (path / "optimizer.bin").unlink(), "No such file"),
        (without_unet, "start from the model itself, since checkpoint-3 has no folder unet/"),
        (other_unet, "conv_in"),
        (lambda path: (path / "unet_ema" / "config.json").write_text("{"), "start from its UNet alone"),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_way_to_use_the_unet(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    their_checkpoint(settings, tmp_path / "old")
    path = tmp_path / "old" / f"checkpoint-{STEPS}"
    damage(path)
    with pytest.raises(RecipeError) as error:
        run_it(settings, resume_from_checkpoint=str(path))
    told = str(error.value)
    assert words in told
    assert f"--resume_from_checkpoint {path}, of diffusers' script, cannot be taken over" in told
    assert "\n" not in told
    if damage is not without_unet:
        model = settings["pretrained_model_name_or_path"]
        assert f"--pretrained_model_name_or_path {path / 'unet'} --base {model}" in told
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("changes", [{"optimizer": "sgd"}, {"streaming": True}])
def test_settings_that_cannot_go_on_from_it(settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    their_checkpoint(settings, tmp_path / "old")
    with pytest.raises(RecipeError, match=r"of diffusers' script.*start from its UNet alone by"):
        run_it(settings, resume_from_checkpoint=str(tmp_path / "old" / f"checkpoint-{STEPS}"), **changes)


@pytest.mark.parametrize("beside", [[], ["model_index.json"], ["logs/text2image-fine-tune/events"]])
def test_their_output_folder_is_recognised_and_left_alone(
    settings: dict[str, Any], tmp_path: Path, beside: list[str]
) -> None:
    old = tmp_path / "old"
    their_checkpoint(settings, old)
    for name in beside:
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(json.dumps({}))
    before = sorted(old.rglob("*"))
    with pytest.raises(RecipeError) as error:
        run_it(settings, output_dir=str(old), resume_from_checkpoint="latest")
    told = str(error.value)
    assert f"holds no run of this program, but checkpoints of diffusers' script (checkpoint-{STEPS})" in told
    assert f"--resume_from_checkpoint {old / f'checkpoint-{STEPS}'}" in told
    assert f"--pretrained_model_name_or_path {old / f'checkpoint-{STEPS}' / 'unet'} --base" in told
    assert sorted(old.rglob("*")) == before


def test_a_checkpoint_of_this_program_is_not_theirs(settings: dict[str, Any], tmp_path: Path) -> None:
    run_it(settings, max_train_steps=1)
    assert not is_of_diffusers(tmp_path / "run" / "checkpoint-1")
    assert not is_of_diffusers(tmp_path / "run")
    assert not is_of_diffusers(tmp_path / "absent" / "checkpoint-1")
