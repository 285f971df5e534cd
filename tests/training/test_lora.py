"""A LoRA is trained, saved and left by itself, goes on to the bit, and draws in stock diffusers what it drew here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from launching import finish, flags_of, start, torchrun
from outside import draw, draw_as_validation, exported, loss_of_pictures
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import Run, assert_equal, build, forget_accelerator, losses, train

from sd_recipes.assets import CONFIGURATIONS
from sd_recipes.checkpoints.format import list_checkpoints
from sd_recipes.commands.evaluate import evaluate
from sd_recipes.commands.evaluate_settings import Evaluation
from sd_recipes.commands.train import run as run_to_its_end
from sd_recipes.errors import RecipeError
from sd_recipes.export.hub import publish
from sd_recipes.flags import load_recipe
from sd_recipes.model.lora import choose_layers, lora_layers
from sd_recipes.model.lora_files import LORA_FILE
from sd_recipes.model.stable_diffusion import StableDiffusion
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import start_accelerator
from sd_recipes.training.build_parts import WEIGHTS
from sd_recipes.training.state import OPTIMIZER

ALL: dict[str, Any] = {"lora_rank": 4, "lora_targets": ["all"], "lora_text_encoder": True}


def changes_of(run: Run) -> dict[str, torch.Tensor]:
    return {
        f"{part.name}/{name}": each.clone()
        for part in run.state.parts.values()
        for name, each in part.tensors().items()
    }


@pytest.mark.slow
def test_eight_pictures_are_learned_as_seen_from_outside(
    settings: dict[str, Any], tiny_pipeline: Path, image_folder: Path
) -> None:
    run = train(settings, lora_rank=16, lora_targets=["all"], max_train_steps=60, train_batch_size=8,
                learning_rate=1e-2, cache_latents="memory", center_crop=True)  # fmt: skip
    before = loss_of_pictures(StableDiffusionPipeline.from_pretrained(tiny_pipeline), image_folder, tiny_pipeline)
    assert loss_of_pictures(exported(run, tiny_pipeline), image_folder, tiny_pipeline) < 0.5 * before


def test_only_the_changes_are_trained_and_saved(settings: dict[str, Any], tiny_pipeline: Path) -> None:
    run = train(settings, **ALL, use_ema=True)
    base = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet").state_dict()
    unet = run.model.components.unet.state_dict()
    assert_equal(
        {name: unet[name.replace(".base_layer", "")] if name in unet else unet[_wrapped(name)] for name in base}, base
    )
    checkpoint = Path(run.recipe.output_dir) / "checkpoint-4"
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*.safetensors")}
    parts = ("unet_lora", "unet_lora_ema", "text_encoder_lora", "text_encoder_lora_ema")
    assert files == {OPTIMIZER, *(f"{part}/{WEIGHTS}" for part in parts)}
    for file in files:
        assert [name for name in load_file(checkpoint / file) if ".lora_" not in name] == []


def _wrapped(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    return f"{layer}.base_layer.{kind}"


@pytest.mark.parametrize("changes", [
    {**ALL, "lora_dropout": 0.2, "use_ema": True, "gradient_accumulation_steps": 2, "train_batch_size": 2},
    {"lora_rank": 2, "lora_use_dora": True, "mixed_precision": "bf16", "gradient_checkpointing": True,
     "lora_text_encoder": True, "text_encoder_steps": 3},
], ids=["dropout", "dora-bf16"])  # fmt: skip
def test_a_run_goes_on_to_the_bit(settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    settings |= {**changes, "checkpointing_steps": 2}
    whole = train(settings, output_dir=str(tmp_path / "whole"))
    torch.manual_seed(99)
    resumed = train(settings, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    first, second = (run.state.state_dict() for run in (whole, resumed))
    assert first.values == second.values
    for file, named in first.tensors.items():
        assert_equal(named, second.tensors[file])
    rounded = torch.bfloat16 if "mixed_precision" in changes else torch.float32
    for name, parameter in whole.model.components.unet.named_parameters():
        assert parameter.dtype == (torch.float32 if ".lora_" in name else rounded), name


@pytest.mark.parametrize("changes", [
    {"lora_rank": 4, "use_ema": True}, {**ALL, "lora_alpha": 2.5},
    pytest.param({**ALL, "lora_use_dora": True}, marks=pytest.mark.slow),
    {"lora_rank": 2, "lora_targets": ["attn2", "mlp"], "lora_text_encoder": True, "lora_use_dora": True},
], ids=["attention", "all", "dora", "without-attention"])  # fmt: skip
def test_stock_diffusers_draws_the_validations_pictures(
    settings: dict[str, Any], tiny_pipeline: Path, changes: dict[str, Any]
) -> None:
    run = train(settings, learning_rate=2e-2, max_train_steps=3, **changes)
    stock, plain = exported(run, tiny_pipeline), StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    own = draw_as_validation(run)
    np.testing.assert_allclose(draw(stock), own, atol=1e-3)  # a quarter of a gray level
    assert np.abs(draw(plain) - own).max() > 0.02
    again = build(settings, lora_weights=str(run.output_dir), lora_text_encoder="lora_text_encoder" in changes)
    np.testing.assert_allclose(draw_as_validation(again), own, atol=1e-3)
    assert [part.config for part in again.state.parts.values()] == [part.config for part in run.state.parts.values()]


def test_a_file_in_kohyas_keys_is_what_it_was_with_the_alpha_of_each_layer(
    settings: dict[str, Any], tiny_pipeline: Path, tmp_path: Path
) -> None:
    run = train(settings, **ALL, lora_alpha=4, learning_rate=2e-2, max_train_steps=2)
    exported(run, tiny_pipeline)
    tensors = convert_state_dict_to_kohya(load_file(run.output_dir / LORA_FILE))
    # Half the alpha and twice the matrix are the same change.
    for name in [name for name in tensors if name.endswith("attn2_to_v.alpha") or "fc1.alpha" in name]:
        tensors[name] = torch.tensor(2.0)
        tensors[name.replace(".alpha", ".lora_up.weight")] *= 2
    save_file({name: each.contiguous() for name, each in tensors.items()}, tmp_path / "kohya.safetensors")
    settings |= {"lora_weights": str(tmp_path / "kohya.safetensors"), "lora_text_encoder": True}
    again = build(settings, lora_rank=4)
    np.testing.assert_allclose(draw_as_validation(again), draw_as_validation(run), atol=1e-3)
    for name, layer in lora_layers(again.model.components.unet).items():
        assert layer.lora_alpha["default"] == (2 if name.endswith("attn2.to_v") else 4), name


def test_the_files_metadata_say_what_it_is(settings: dict[str, Any], tiny_pipeline: Path) -> None:
    run = train(settings, **ALL, lora_alpha=8, max_train_steps=1)
    exported(run, tiny_pipeline)
    with safe_open(run.output_dir / LORA_FILE, "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
    assert (metadata["rank"], metadata["alpha"], metadata["base_model"]) == ("4", "8", tiny_pipeline.name)
    assert "lora_rank: 4" in metadata["recipe"]
    assert str(tiny_pipeline) not in metadata["recipe"]
    assert json.loads(metadata["lora_adapter_metadata"])["unet.lora_alpha"] == 8
    assert all(name.startswith(("unet.", "text_encoder.text_model.")) and ".lora_" in name for name in names)


@pytest.mark.parametrize(("generation", "rank", "number"), [(1, 4, 797_184), (1, 8, 1_594_368), (2, 4, 829_952)])
def test_a_lora_of_the_attention_has_as_many_numbers_as_is_known(generation: int, rank: int, number: int) -> None:
    """Those of diffusers' script, for the published configurations."""
    config = UNet2DConditionModel.load_config(CONFIGURATIONS[generation] / "unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    layers = {name: each for name, each in unet.named_modules() if isinstance(each, torch.nn.Linear)}
    shapes = [layers[name].weight.shape for name in choose_layers(["attention"], {"unet": layers})["unet"]]
    assert sum(rank * (outputs + inputs) for outputs, inputs in shapes) == number


# ------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(("flags", "message"), [
    ("--lora_alpha 4", "--lora_alpha 4.0 is not read without --lora_rank: add --lora_rank 8, or drop it"),
    ("--lora_text_encoder", "--lora_text_encoder is not read without --lora_rank"),
    ("--lora_targets all attn2", "--lora_targets all attn2 is not read without"),
    ("--lora_rank 4 --train_from_scratch", "--lora_rank changes a trained UNet, .* drop --train_from_scratch, or"),
    ("--lora_weights x --train_from_scratch", "--lora_weights changes a trained UNet"),
    ("--lora_weights x --lora_use_dora", "--lora_use_dora contradicts --lora_weights, which says so .* drop it"),
    ("--rank 4 --lora_rank 8", "--rank 4 contradicts --lora_rank 8: drop one"),
    ("--lora_rank 0", "--lora_rank: .* greater than or equal to 1"),
    ("--lora_rank 4 --lora_text_encoder --cache_text", "--cache_text keeps what .* drop it"),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(flags: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", *flags.split()])


@pytest.mark.parametrize(("changes", "message"), [
    ({"lora_rank": 33}, r"--lora_rank 33 is over the size of the UNet's \S+attn2.to_k, whose weight is 64 x 32: use "
     "--lora_rank 32 at most"),
    ({"lora_rank": 4, "lora_targets": ["to_qq"]}, r"--lora_targets to_qq is in the name of no .* \(nearest: to_q\)"),
    ({"lora_rank": 4, "lora_targets": ["atention"]}, r"\(nearest: attention\)"),
    ({"lora_rank": 4, "lora_targets": ["xyzzy"]}, r"of the UNet \(there are attentions, attn1, attn2"),
    ({"lora_rank": 4, "lora_targets": ["to_q"], "lora_text_encoder": True},
     "--lora_targets to_q names no layer of the text encoder: add attention, or its q_proj, or drop --lora_text_enc"),
    ({"lora_rank": 4, "lora_targets": ["q_proj"], "lora_text_encoder": True}, "names no layer of the UNet: add atten"),
    ({"lora_rank": 4, "prediction_type": "v_prediction"}, "--prediction_type v_prediction is not the model's epsilon"),
    ({"lora_weights": "nowhere.safetensors"}, "--lora_weights nowhere.safetensors: there is no such LoRA"),
])  # fmt: skip
def test_a_lora_that_does_not_fit_the_model_is_refused(
    settings: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        build(settings, **changes)
    assert "\n" not in str(error.value)


K = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k"
PEFT = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"


@pytest.mark.parametrize(("shapes", "metadata", "message"), [
    ({f"{K}.lora_down.weight": (4, 48), f"{K}.lora_up.weight": (48, 4)}, {},
     "is a LoRA of another model: it changes .* by 48 x 48 values"),
    ({f"{K.replace('1', '7')}.lora_down.weight": (4, 64), f"{K.replace('1', '7')}.lora_up.weight": (64, 4)}, {},
     "is a LoRA of another model: 2 of its 2 tensors .*: choose a LoRA of "),
    ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 32),
      "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (64, 4)}, {}, "is a LoRA of another model"),
    ({"transformer.blocks.0.attn.to_q.lora_A.weight": (4, 32)}, {}, "is a LoRA of another model"),
    ({f"{K}.hada_w1_a": (4, 64)}, {}, "is a LoHa: only LoRA and DoRA are read"),
    ({f"{K}.lora_down.weight": (4, 64)}, {}, "is not whole: .* has no up matrix"),
    ({f"{PEFT}.lora_A.weight": (4, 64)}, {}, "is not whole: .* has no up matrix"),
    ({f"{PEFT}.lora_A.weight": (4, 64), f"{PEFT}.lora_B.weight": (64, 4)}, {"lora_adapter_metadata": "[1]"},
     "that is no JSON of settings"),
    ({f"{PEFT}.lora_A.weight": (4, 64), f"{PEFT}.lora_B.weight": (64, 4)},
     {"lora_adapter_metadata": '{"unet.r": 7, "unet.lora_alpha": 7, "unet.target_modules": ["to_k"]}'}, "contradict"),
    ({"conv_in.weight": (32, 4, 3, 3), "time_embedding.linear_1.weight": (8, 8), "down_blocks.0.x": (1,)}, {},
     "is not a LoRA, but a UNet alone"),
    ({"text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight": (4, 32),
      "text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight": (64, 4)}, {}, "does not change the UNet"),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_in_one_line(
    settings: dict[str, Any], tmp_path: Path, shapes: dict[str, Any], metadata: dict[str, str], message: str
) -> None:
    path = tmp_path / "given.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path, metadata)
    with pytest.raises(RecipeError, match=rf"--lora_weights {path} .*{message}") as error:
        build(settings, lora_weights=str(path))
    assert "\n" not in str(error.value)


def test_numbers_that_are_not_finite_are_the_files_fault(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    save_file(
        {f"{PEFT}.lora_A.weight": torch.full((4, 64), torch.nan), f"{PEFT}.lora_B.weight": torch.ones(64, 4)}, path
    )
    with pytest.raises(RecipeError, match="holds numbers that are not finite, in unet"):
        build(settings, lora_weights=str(path))


def test_a_given_rank_that_is_not_the_files_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "given.safetensors"
    save_file({f"{PEFT}.lora_A.weight": torch.ones(4, 64), f"{PEFT}.lora_B.weight": torch.ones(64, 4)}, path)
    with pytest.raises(RecipeError, match=r"--lora_rank 8 contradicts --lora_weights \S+, which has 4: drop it"):
        build(settings, lora_weights=str(path), lora_rank=8)
    with pytest.raises(RecipeError, match="does not change the text encoder: drop --lora_text_encoder"):
        build(settings, lora_weights=str(path), lora_text_encoder=True)


@pytest.mark.parametrize("changes", [{"lora_rank": 2}, {"lora_rank": 4, "lora_alpha": 1}, {}])
def test_another_lora_does_not_go_on_from_a_checkpoint(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    train(settings, lora_rank=4, max_train_steps=1)
    with pytest.raises(RecipeError, match=r"differs from that of|is of one that trains unet_lora"):
        train(settings, resume_from_checkpoint="latest", **changes)


def test_it_is_not_sharded(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    forget_accelerator()
    with pytest.raises(RecipeError, match=r"a LoRA is megabytes: train it with accelerate_configs/multi_gpu.yaml"):
        start_accelerator(Recipe(**settings, lora_rank=4))


# ------------------------------------------------------------------------------------------ whole runs


def test_a_command_line_of_diffusers_lora_script_leaves_what_that_leaves(
    settings: dict[str, Any], tiny_pipeline: Path
) -> None:
    out = Path(settings["output_dir"])
    flags = [str(flag) for flag in flags_of(settings | {
        "rank": 4, "train_batch_size": 1, "gradient_accumulation_steps": 1, "scale_lr": True, "center_crop": True,
        "random_flip": True, "checkpointing_steps": 2, "max_train_steps": 4, "device": "cpu",
    })]  # fmt: skip
    run_to_its_end(load_recipe([*flags, "--device", "cpu"]))
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-2", "checkpoint-4"]
    forget_accelerator()
    more = ["--max_train_steps", "8", "--resume_from_checkpoint", "checkpoint-4", "--checkpoints_total_limit", "2"]
    run_to_its_end(load_recipe([*flags, "--device", "cpu", *more]))
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-6", "checkpoint-8"]
    assert not (out / "model_index.json").exists()
    assert all("lora" in name and name.startswith("unet") for name in load_file(out / LORA_FILE))
    stock = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    stock.load_lora_weights(out)
    assert np.isfinite(draw(stock)).all()


def test_the_best_weights_are_exported_evaluated_and_published(
    settings: dict[str, Any], tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(settings["output_dir"])
    settings |= {**ALL, "use_ema": True, "validation_split": "2", "validation_steps": 2, "export": "best",
                 "mixed_precision": "no", "learning_rate": 5e-3}  # fmt: skip
    recipe = Recipe(**settings)
    run_to_its_end(recipe)
    (kept,) = (out / "best").glob("step-*")
    tensors = load_file(out / LORA_FILE)
    for name, each in load_file(kept / "unet_lora" / WEIGHTS).items():
        assert torch.equal(tensors[f"unet.{name}".replace(".default", "")], each)
    best = min(json.loads(line)["validation_loss"] for line in (out / "metrics.jsonl").read_text().splitlines()
               if "validation_loss" in line)  # fmt: skip
    results = tmp_path / "evaluation"
    for target in (str(out), str(kept)):
        forget_accelerator()
        evaluate(Evaluation(targets=[str(tiny_pipeline), target], num_pictures=0, output_dir=str(results),
                            given={"device": "cpu"}))  # fmt: skip
        base, lora = json.loads((results / "evaluation.json").read_text())["targets"]
        assert lora["figures"]["validation_loss"] == pytest.approx(best, rel=1e-6)
        assert base["figures"]["validation_loss"] > best

    pushed: list[Any] = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", lambda self, repo, files, **_: pushed.extend(files))
    publish(out, "tester/discs", recipe, StableDiffusion(), "epsilon")
    assert {each.path_in_repo for each in pushed} == {"README.md", LORA_FILE, "recipe.yaml"}
    card = (out / "README.md").read_text()
    assert "- lora" in card
    assert f'from_pretrained("{tiny_pipeline.name}")' in card
    assert 'pipeline.load_lora_weights("tester/discs")' in card


def test_buckets_and_kept_latents_train_it_like_a_whole_model(settings: dict[str, Any]) -> None:
    run = train(settings, lora_rank=4, aspect_ratio_buckets=True, bucket_step=8, center_crop=True,
                cache_latents="disk", max_train_steps=6)  # fmt: skip
    assert np.isfinite(losses(run)).all()
    assert any(each.any() for name, each in changes_of(run).items() if ".lora_B." in name)


@pytest.mark.slow
def test_two_processes_train_it_as_one_does(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"lora_rank": 4, "lora_text_encoder": True, "optimizer": "sgd", "learning_rate": 0.1}
    one = train(settings, output_dir=str(tmp_path / "one"))
    two = tmp_path / "two"
    finish(start(torchrun(2), *flags_of(settings | {"train_batch_size": 2, "output_dir": two})))
    for part in one.state.parts.values():
        saved = load_file(two / "checkpoint-4" / part.name / WEIGHTS)
        for name, value in part.tensors().items():
            torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6, msg=name)
