"""Optimizers by name and by class: they resume to the bit, and what is evaluated and exported is what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from launching import finish, flags_of, start, torchrun
from safetensors.torch import load_file
from training_runs import assert_equal, assert_leaves_as_it_came, forget_accelerator, train, weights

from sd_recipes.checkpoints.best import list_best
from sd_recipes.checkpoints.format import step_of
from sd_recipes.commands.train import run
from sd_recipes.errors import RecipeError
from sd_recipes.flags import load_recipe, recipe_text
from sd_recipes.memory.plan import Untraceable, plan_memory
from sd_recipes.memory.remedies import BF16_WEIGHTS, EIGHT_BIT, FUSED_BACKWARD
from sd_recipes.memory.step import OPTIMIZER
from sd_recipes.optimizers import read_kwargs
from sd_recipes.recipe import Recipe
from sd_recipes.training.build_parts import UNET_WEIGHTS
from sd_recipes.training.optimizer_check import check_optimizer
from sd_recipes.training.optimizer_state import running_values
from sd_recipes.training.run import Run

CPU = torch.device("cpu")
SCHEDULE_FREE = "schedule_free_adamw"
NAMED = ["adamw", "adamw8bit", "paged_adamw8bit", "lion", "lion8bit", "sgd", "adafactor", "prodigy", SCHEDULE_FREE]
BY_CLASS = ["torch.optim.NAdam", "torch.optim.Muon", "bitsandbytes.optim.AdEMAMix8bit", "schedulefree.SGDScheduleFree"]


def recipe_of(**settings: Any) -> Recipe:
    return Recipe(pretrained_model_name_or_path="x", train_data_dir="y", **settings)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion", "sgd", "adafactor", "torch.optim.RAdam"])
def test_those_that_step_bf16_weights_are_let_through(optimizer: str) -> None:
    check_optimizer(recipe_of(optimizer=optimizer, weights_dtype="bf16", mixed_precision="bf16"), CPU)


@pytest.mark.parametrize("optimizer", [*NAMED, *BY_CLASS])
def test_those_that_go_on_to_the_bit_are_let_through(optimizer: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    check_optimizer(recipe_of(optimizer=optimizer), CPU)
    assert torch.equal(torch.get_rng_state(), before), "a run's draws do not depend on it"
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "torch.optim.NAdams"}, r"torch.optim.NAdams does not exist \(nearest: NAdam\): torch.optim has"),
        ({"optimizer": "torch.optimm.Adam"}, "no module torch.optimm is installed here: install the package"),
        ({"optimizer": "nowhere.at.All"}, "no module nowhere is installed here"),
        ({"optimizer": "torch.nn.Linear"}, "torch.nn.Linear is no class of an optimizer: torch.nn has none"),
        ({"optimizer": "torch.optim.Optimizer"}, "torch.optim.Optimizer is no class of an optimizer"),
        ({"optimizer": "torch.optim.LBFGS"}, "LBFGS cannot be stepped with these settings .*use another optimizer"),
        ({"optimizer": "torch.optim.SparseAdam"}, "SparseAdam does not support dense gradients"),
        ({"optimizer": "odd_optimizers.KeepsLists"}, "keeps history as list, and a checkpoint holds tensors and"),
        ({"optimizer": "odd_optimizers.CountsByItself"}, "keeps state that its state_dict does not hold"),
        ({"optimizer": "odd_optimizers.KeepsListsOfKernels"}, "keeps history as list, and a checkpoint holds tensors"),
        ({"optimizer": "odd_optimizers.CountsToFive"}, "keeps state that its state_dict does not hold"),
        ({"optimizer": "odd_optimizers.KeepsItsMode"}, "evaluates other weights when it is asked again, for its eval"),
        ({"optimizer": "odd_optimizers.Leaves"}, r"Leaves refuses what it is given \(SystemExit: 2\): change"),
        ({"optimizer": "odd_optimizers.LacksAPackage"}, r"refuses what it is given \(ModuleNotFoundError: No module"),
        ({"optimizer": "odd_optimizers.HasNoRate"}, "takes no learning rate as lr"),
        ({"optimizer": "broken_module.Adam"}, r"broken_module cannot be imported \(ZeroDivisionError: "),
        ({"optimizer": "leaving_module.Adam"}, r"leaving_module cannot be imported \(SystemExit: 3\): mend its"),
        (
            {"optimizer": "torch.optim.Adagrad", "weights_dtype": "bf16", "mixed_precision": "bf16"},
            "--optimizer torch.optim.Adagrad with --weights_dtype bf16 cannot be stepped .*use another optimizer",
        ),
        ({"optimizer_kwargs": {"amsgrads": True}}, r"amsgrads: --optimizer adamw takes no .* \(nearest: amsgrad\)"),
        ({"optimizer_kwargs": {"betas": 3}}, r"--optimizer adamw refuses what it is given \(TypeError"),
        ({"optimizer": SCHEDULE_FREE, "adam_beta1": 0.0}, "ZeroDivisionError"),
        ({"optimizer": "schedulefree.SGDScheduleFree", "use_ema": True}, "--use_ema averages .*by itself: drop one"),
        (
            {"optimizer": "prodigy", "fused_backward_pass": True, "max_grad_norm": 0},
            r"--fused_backward_pass steps .*prodigy keeps numbers of all of them \(d, .*\): drop one",
        ),
        (
            {"optimizer": SCHEDULE_FREE, "weights_dtype": "bf16", "mixed_precision": "bf16"},
            "--weights_dtype bf16 steps some parameters after the others",
        ),
        (
            {"optimizer": "prodigy", "param_groups": [{"pattern": "*", "learning_rate": 0.5}]},
            "with these settings and the learning rates 1, 0.5 .*only supported for values of 0",
        ),
        ({"optimizer": "prodigy", "learned_uncertainty": True}, "and the learning rates 1, "),
    ],
)
def test_what_cannot_go_on_is_refused_before_anything_is_loaded(
    settings: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("1 / 0")
    (tmp_path / "leaving_module.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RecipeError, match=words) as error:
        check_optimizer(recipe_of(**settings), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("optimizer", "package", "extra"),
    [("prodigy", "prodigyopt", "optimizers"), (SCHEDULE_FREE, "schedulefree", "optimizers"),
     ("lion", "bitsandbytes", "bitsandbytes")],
)  # fmt: skip
def test_a_missing_package_is_named_with_its_extra(
    optimizer: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("prodigy", "eight_bit"):
        monkeypatch.delitem(sys.modules, f"sd_recipes.training.{module}", raising=False)
    monkeypatch.delattr("sd_recipes.training.eight_bit", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RecipeError, match=rf"--optimizer {optimizer} needs {package}: .*sd-recipes\[{extra}\]"):
        check_optimizer(recipe_of(optimizer=optimizer), CPU)


FLAGS = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "y"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--optimizer", "prodgy"], r"there is no such optimizer \(nearest: prodigy\): give one of adamw"),
        (["--optimizer", "os.system()"], "there is no such optimizer"),
        (["--optimizer_kwargs", "d_coef"], "give NAME=VALUE, such as d_coef=0.5"),
        (["--optimizer_kwargs", "eps=1", "eps=2"], "eps is given twice: drop one"),
        (["--optimizer_kwargs", "lr=1"], "lr is given by --learning_rate: drop it here"),
        (
            ["--optimizer", "torch.optim.Adam", "--adam_beta1", "0.5"],
            "--adam_beta1 0.5 is not read by --optimizer torch",
        ),
        (["--optimizer", "lion", "--adam_epsilon", "1"], "--adam_epsilon 1.0 is not read by --optimizer lion"),
        (["--optimizer", "lion", "--channels_last", "always"], "--channels_last always contradicts --optimizer lion"),
        (["--optimizer", SCHEDULE_FREE, "--use_ema"], "--use_ema averages the weights, which .*by itself: drop one"),
        (["--optimizer", SCHEDULE_FREE, "--ema_snapshots"], "--ema_snapshots averages the weights"),
        (["--optimizer", "prodigy", "--scale_lr"], "--scale_lr multiplies a learning rate, which .*finds: drop one"),
        (["--param_groups", "1e-5"], "give PATTERN=RATE, such as"),
        (["--param_groups", "*.attn2.*=fast"], "--param_groups: .*valid number"),
        (["--param_groups", "*=-1"], "--param_groups: .*greater than or equal to 0"),
    ],
)
def test_mistakes_on_the_command_line(flags: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe([*FLAGS, *flags])


def test_settings_of_an_optimizer_are_the_same_by_flags_and_in_a_recipe(tmp_path: Path) -> None:
    flags = ["--optimizer_kwargs", "betas=0.9,0.99", "d0=1e-5", "beta3=None", "decouple=False", "slice_p=11"]
    flags += ["--param_groups", "*.attn2.*=1e-5", "unet.a=b.*=0"]
    by_flags = load_recipe([*FLAGS, *flags])
    assert by_flags.optimizer_kwargs == {
        "betas": [0.9, 0.99], "d0": 1e-5, "beta3": None, "decouple": False, "slice_p": 11
    }  # fmt: skip
    assert [(each.pattern, each.learning_rate) for each in by_flags.param_groups or []] == [
        ("*.attn2.*", 1e-5), ("unet.a=b.*", 0.0),
    ]  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(recipe_text(by_flags))
    assert load_recipe(["--config", str(tmp_path / "recipe.yaml")]).model_dump(exclude={"config"}) == (
        by_flags.model_dump(exclude={"config"})
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("(0.9,0.99)", [0.9, 0.99]), ("0.9,0.99", [0.9, 0.99]), ("[0.9, 0.99]", [0.9, 0.99]), ("(0.9,)", [0.9]),
     ("(0.9)", 0.9), ("(1e-30, 1e-3)", [1e-30, 1e-3]), ("'warm'", "warm"), ("", None)],
)  # fmt: skip
def test_values_of_settings_are_read_as_other_trainers_do(text: str, value: Any) -> None:
    assert read_kwargs([f"name={text}"]) == {"name": value}


def test_prodigys_rate_is_1_and_others_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert recipe_of(optimizer="prodigy").learning_rate == 1.0
    for optimizer in ("prodigy", "prodigyopt.Prodigy"):
        check_optimizer(recipe_of(optimizer=optimizer, learning_rate=1.0), CPU)
        assert caplog.messages == []
        check_optimizer(recipe_of(optimizer=optimizer, learning_rate=1e-4), CPU)
        (words,) = caplog.messages
        assert words.startswith(f"--learning_rate 0.0001 multiplies the rate that --optimizer {optimizer} finds by")
        assert "change d_coef" in words
        caplog.clear()
    for optimizer in (SCHEDULE_FREE, "schedulefree.AdamWScheduleFree"):
        check_optimizer(recipe_of(optimizer=optimizer, lr_scheduler="constant_with_warmup"), CPU)
        assert caplog.messages == []
        check_optimizer(recipe_of(optimizer=optimizer, lr_scheduler="cosine"), CPU)
        (words,) = caplog.messages
        assert words.startswith(f"--lr_scheduler cosine lowers a rate that --optimizer {optimizer} needs constant")
        caplog.clear()


# --------------------------------------------------------------------------------------------- whole runs


IN_TWO_PARTS = {
    "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2, "max_train_steps": 5, "checkpointing_steps": 3,
}  # fmt: skip


def in_two_parts(settings: dict[str, Any]) -> Run:
    """A run that saved at step 3 of 5, after one that went on from there had the same state to the bit."""
    whole = train(settings | IN_TWO_PARTS)
    resumed = train(settings | IN_TWO_PARTS, resume_from_checkpoint="checkpoint-3")
    first, second = (run.state.state_dict() for run in (whole, resumed))
    assert first.values == second.values
    assert first.tensors.keys() == second.tensors.keys()
    for file, tensors in first.tensors.items():
        assert_equal(tensors, second.tensors[file])
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"optimizer": "lion", "use_ema": True}, {"optimizer": "lion8bit", "gradient_accumulation_steps": 2},
    {"optimizer": "torch.optim.NAdam"}, {"optimizer": "schedulefree.RAdamScheduleFree"},
    {"optimizer": SCHEDULE_FREE, "train_text_encoder": True, "text_encoder_learning_rate": 1e-4},
    {"optimizer": "prodigy", "lora_rank": 2, "lora_text_encoder": True, "learning_rate": 1.0},
    {"optimizer": "lion", "mixed_precision": "bf16", "weights_dtype": "bf16"},
    {"optimizer": "lion", "fused_backward_pass": True, "max_grad_norm": 0},
])  # fmt: skip
def test_a_run_goes_on_to_the_bit(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    in_two_parts(settings | changes)


def test_prodigys_estimate_goes_on_and_is_logged(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"optimizer": "prodigy", "optimizer_kwargs": {"d_coef": 100.0}, "learning_rate": 1.0}
    (values,) = running_values(in_two_parts(settings).state.optimizer)
    assert values["k"] == 4, "the first step of the warm-up has the rate 0"
    assert values["d"] > 1e-5
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert lines[0]["effective_lr"] == 0.5e-6
    assert lines[-1]["effective_lr"] == values["d"]


def test_schedule_free_trains_one_point_and_leaves_another(
    settings: dict[str, Any], tiny_pipeline: Path, tmp_path: Path
) -> None:
    """Saved, kept as the best and exported is x = y + (1 - 1/β)(z - y), and training goes on from y, undisturbed."""
    settings |= {"optimizer": SCHEDULE_FREE, "validation_split": "2", "validation_samples": 4}
    plain = train(settings | IN_TWO_PARTS, output_dir=str(tmp_path / "plain"), checkpointing_steps=100)
    settings |= {"validation_steps": 3}
    whole = in_two_parts(settings)
    assert_equal(weights(plain), weights(whole))
    forget_accelerator()
    run(Recipe(**(settings | IN_TWO_PARTS)))  # nothing is left but to export
    x = {}
    for step in (3, 5):
        saved = tmp_path / "run" / f"checkpoint-{step}"
        y = load_file(saved / "unet" / UNET_WEIGHTS)
        state = load_file(saved / "optimizer.safetensors")
        x[step] = {name: each.lerp(state[f"unet/{name}/z"], 1 - 1 / 0.9) for name, each in y.items()}
        assert not torch.equal(x[step]["conv_in.weight"], y["conv_in.weight"])
        assert_equal(x[step], load_file(saved / "unet_ema" / UNET_WEIGHTS))
    (best,) = list_best(tmp_path / "run")
    assert_equal(x[step_of(best)], load_file(best / "unet" / UNET_WEIGHTS))
    with whole.state.evaluated(whole.model.components):
        assert_equal(x[5], weights(whole))
    assert_equal(x[5], dict(StableDiffusionPipeline.from_pretrained(tmp_path / "run").unet.state_dict()))
    assert_leaves_as_it_came(tmp_path / "run", tiny_pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["lion", "prodigy", SCHEDULE_FREE])
def test_two_processes_are_one(settings: dict[str, Any], tmp_path: Path, optimizer: str) -> None:
    settings |= {"optimizer": optimizer, "checkpointing_steps": 4, "train_batch_size": 4}
    if optimizer == "prodigy":
        settings["learning_rate"] = 1.0
    train(settings, output_dir=str(tmp_path / "one"))
    two = settings | {"output_dir": str(tmp_path / "two"), "train_batch_size": 2}
    finish(start(torchrun(2), *flags_of(two)))
    one, other = (load_file(tmp_path / name / "checkpoint-4" / "unet" / UNET_WEIGHTS) for name in ("one", "two"))
    # A sign, or a gradient over its own size, turns rounding into a whole step where the gradient is about 0.
    near = torch.cat([torch.isclose(each, other[name], rtol=1e-3, atol=1e-5).flatten() for name, each in one.items()])
    assert near.float().mean() > 0.999


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("optimizer", "number"),
    [("lion", 1), ("prodigy", 4), pytest.param(SCHEDULE_FREE, 2, marks=pytest.mark.slow),
     pytest.param("torch.optim.NAdam", 2, marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_plan_counts_their_states(tiny_pipeline: Path, optimizer: str, number: int) -> None:
    """In multiples of the weights: Lion's moment, Prodigy's two with s and p0, schedule-free's second one and z."""
    recipe = recipe_of(optimizer=optimizer, resolution=32, train_batch_size=1)
    recipe = recipe.model_copy(update={"pretrained_model_name_or_path": str(tiny_pipeline)})
    at_its_step = plan_memory(recipe, "cpu").moments["optimizer"].by_kind
    assert at_its_step[OPTIMIZER] / at_its_step["weights"] == pytest.approx(number, rel=0.05)


def test_one_that_cannot_step_without_values_is_not_planned_and_trains_all_the_same(tiny_pipeline: Path) -> None:
    recipe = recipe_of(optimizer="odd_optimizers.LooksAtNumbers", resolution=32, train_batch_size=1)
    check_optimizer(recipe, CPU)
    with pytest.raises(Untraceable, match=r"LooksAtNumbers cannot be planned, .*\(.*Error: .*\): plan with"):
        plan_memory(recipe.model_copy(update={"pretrained_model_name_or_path": str(tiny_pipeline)}), "cpu")


def test_what_they_do_not_go_with_is_not_proposed() -> None:
    bf16 = {"mixed_precision": "bf16", "train_batch_size": 1}
    for optimizer in ("prodigy", SCHEDULE_FREE, "torch.optim.NAdam"):
        for remedy in (BF16_WEIGHTS, FUSED_BACKWARD, EIGHT_BIT):
            assert remedy.changes(recipe_of(optimizer=optimizer, **bf16)) is None
    assert EIGHT_BIT.changes(recipe_of(optimizer_kwargs={"amsgrad": True})) is None
    assert BF16_WEIGHTS.changes(recipe_of(optimizer="lion", **bf16)) is not None
