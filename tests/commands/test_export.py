"""`sd-recipes export`: what it writes is what was trained, and stock diffusers loads it and draws the same."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single_files import WEIGHTS, part_of, single_file
from tiny_models import UNET_CONFIG, build_image_folder, build_tiny_pipeline
from training_runs import assert_equal, assert_leaves_as_it_came, forget_accelerator

from sd_recipes.checkpoints.best import list_best
from sd_recipes.checkpoints.snapshots import list_snapshots
from sd_recipes.commands.export import export
from sd_recipes.commands.export_settings import EXPORT, read_settings
from sd_recipes.commands.sample_settings import SAMPLE
from sd_recipes.commands.sample_settings import read_settings as read_sample_settings
from sd_recipes.commands.train import run
from sd_recipes.errors import RecipeError
from sd_recipes.export.safetensors_file import hash_of_tensors
from sd_recipes.flags import RESOLVED
from sd_recipes.model.families import check_trainable
from sd_recipes.recipe import ModelConfig, Recipe

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, which has raw, averaged, best and kept weights, and its `model`; its data are gone."""
    folder = tmp_path_factory.mktemp("exported")
    build_tiny_pipeline(folder / "model")
    build_image_folder(folder / "data", 8)
    forget_accelerator()
    run(
        Recipe(
            pretrained_model_name_or_path=str(folder / "model"), train_data_dir=str(folder / "data"), resolution=32,
            train_batch_size=4, max_train_steps=4, checkpointing_steps=2, learning_rate=3e-3, lr_warmup_steps=0,
            device="cpu", seed=5, report_to="none", validation_split="0.3", validation_samples=8, validation_steps=2,
            validation_pictures=0, use_ema=True, ema_snapshots=True, output_dir=str(folder / "run"),
        )
    )  # fmt: skip
    shutil.rmtree(folder / "data")
    return folder


def exported(*words: object) -> None:
    export(read_settings([str(word) for word in words]))


def refused(*words: object) -> str:
    with pytest.raises(RecipeError) as error:
        exported(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


def unet_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS["unet"])


def from_single_file(file: Path, config: Path, **options: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_single_file(
        str(file), config=str(config), local_files_only=True, safety_checker=None, feature_extractor=None, **options
    )


def picture(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    pixels: np.ndarray = pipeline(
        "disc number 2", num_inference_steps=3, height=32, width=32, output_type="np",
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]  # fmt: skip
    return pixels


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


# ------------------------------------------------------------------------------------------- which weights


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ((), "unet"),
        (("--weights", "raw"), "checkpoint-4/unet"),
        (("--weights", "averaged"), "checkpoint-4/unet_ema"),
        (("--weights", "best"), "best"),
        (("--weights", "ema05"), "checkpoint-4/unet_ema05"),
    ],
)
def test_a_run_has_several_kinds_of_weights(trained: Path, tmp_path: Path, words: tuple[str, ...], place: str) -> None:
    out = tmp_path / "out"
    exported(trained / "run", "--to", "pipeline", "--output", out, *words)
    folder = list_best(trained / "run")[-1] / "unet" if place == "best" else trained / "run" / place
    assert_equal(part_of(out, "unet"), unet_in(folder))
    for part in ("vae", "text_encoder"):
        assert_equal(part_of(out, part), part_of(trained / "model", part))
    if not words:
        assert_leaves_as_it_came(out, trained / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "nothing is left beside it"


def test_checkpoints_and_snapshots_are_exported_by_their_names(trained: Path, tmp_path: Path) -> None:
    checkpoint, (snapshot, _) = trained / "run" / "checkpoint-2", list_snapshots(trained / "run")
    exported(checkpoint, "--to", "pipeline", "--output", tmp_path / "two")
    assert_equal(part_of(tmp_path / "two", "unet"), unet_in(checkpoint / "unet_ema"))
    exported(snapshot, "--weights", "ema10", "--to", "pipeline", "--output", tmp_path / "kept")
    assert_equal(part_of(tmp_path / "kept", "unet"), unet_in(checkpoint / "unet_ema10"))
    assert "give --weights ema05 or ema10, which it has" in refused(snapshot, "--to", "pipeline", "--output", "x")
    best = list_best(trained / "run")[-1]
    assert f"name {trained / 'run'}" in refused(checkpoint, "--weights", "best", "--to", "pipeline", "--output", "x")
    assert "another kind: drop --weights" in refused(best, "--weights", "raw", "--to", "pipeline", "--output", "x")
    assert "is a model" in refused(trained / "model", "--weights", "raw", "--to", "pipeline", "--output", "x")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_pipeline_in_half_precision(trained: Path, tmp_path: Path, dtype: str) -> None:
    exported(trained / "run", "--to", "pipeline", "--dtype", dtype, "--output", tmp_path / "out")
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for part in PARTS:
        assert_equal(part_of(tmp_path / "out", part), rounded(part_of(trained / "run", part), wanted))
    StableDiffusionPipeline.from_pretrained(tmp_path / "out", dtype=wanted)


def rounded(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) for name, value in tensors.items()}


@pytest.mark.parametrize("other", [".git/config", "notes.txt", "runs/boats/recipe.yaml", "unet/notes.md"])
def test_what_is_no_pipeline_is_not_lost(trained: Path, tmp_path: Path, other: str) -> None:
    out = shutil.copytree(trained / "model", tmp_path / "out")
    (out / other).parent.mkdir(parents=True, exist_ok=True)
    (out / other).write_text("mine")
    named = other if other.startswith("unet") else other.split("/")[0]
    words = (trained / "model", "--to", "pipeline", "--output", out, "--overwrite")
    assert f"holds something else than a pipeline ({named}), which would be lost" in refused(*words)
    assert (out / other).read_text() == "mine"
    (out / other).unlink()


def test_a_pipeline_takes_the_place_of_another_or_leaves_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(trained / "model", tmp_path / "out")
    words = (trained / "run", "--to", "pipeline", "--overwrite", "--output")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise OSError("no such luck")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        assert "cannot be written (no such luck)" in refused(*words, out)
    assert_equal(part_of(out, "unet"), part_of(trained / "model", "unet"))
    out.rename(tmp_path / ".out.removed")  # as a kill between the two renames leaves it
    assert "is there already" in refused(*(word for word in words if word != "--overwrite"), out)
    assert_equal(part_of(out, "unet"), part_of(trained / "model", "unet"))
    monkeypatch.chdir(out)
    exported(*words, ".")
    assert_equal(part_of(out, "unet"), part_of(trained / "run", "unet"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------------------------------- single files


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_single_file_gives_every_tensor_back(tmp_path: Path, generation: int, dtype: str) -> None:
    """By stock diffusers, which then draws the same, and by ours; against the layout that the readers' tests write."""
    model, file = tiny_of_generation(tmp_path / "model", generation), tmp_path / "out" / "my file.safetensors"
    exported(model, "--to", "single_file", "--dtype", dtype, "--output", file)
    stock = from_single_file(file, model)
    for part in PARTS:
        wanted = rounded(part_of(model, part), torch.float16 if dtype == "fp16" else torch.float32)
        assert_equal(getattr(stock, part).state_dict(), rounded(wanted, torch.float32))
    if dtype == "fp32":
        assert np.array_equal(picture(stock), picture(StableDiffusionPipeline.from_pretrained(model)))
    expected = load_file(single_file(tmp_path / "expected.safetensors", model, generation=generation))
    found = load_file(file)
    left_out = {name for name in expected.keys() - found.keys() if ".resblocks.2." not in name}  # a layer of OpenCLIP's
    assert found.keys() - expected.keys() == left_out == set()
    assert {name: value.shape for name, value in found.items()}.items() <= {
        name: value.shape for name, value in expected.items()
    }.items()
    exported(file, "--base", model, "--to", "pipeline", "--output", tmp_path / "back")
    for part in PARTS:
        assert_equal(part_of(tmp_path / "back", part), getattr(stock, part).state_dict())


def tiny_of_generation(folder: Path, generation: int) -> Path:
    """Stable Diffusion 2 differs in its text encoder's activation, which tells it."""
    build_tiny_pipeline(folder)
    config = folder / "text_encoder" / "config.json"
    if generation == 2:
        config.write_text(config.read_text().replace('"quick_gelu"', '"gelu"'))
    return folder


def test_the_metadata_say_what_the_file_is(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "boats.safetensors"
    exported(trained / "run", "--to", "single_file", "--output", file)
    found = metadata_of(file)
    date = found.pop("modelspec.date")
    assert date.startswith("20")
    assert date.endswith("Z")
    assert found.pop("recipe").startswith(RESOLVED)  # by which it is known as a run's
    assert found == {
        "format": "pt",
        "base_model": "model",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "boats",
        "modelspec.resolution": "32x32",
        "modelspec.prediction_type": "epsilon",
        "modelspec.hash_sha256": f"0x{hash_of_tensors(file)}",
    }
    assert {value.dtype for name, value in load_file(file).items() if "position_ids" not in name} == {torch.float16}
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    assert str(trained).encode() not in content[:length]
    with pytest.raises(RecipeError, match=r"is there already: choose another name, or add --overwrite"):
        exported(trained / "run", "--to", "single_file", "--output", file)
    assert file.read_bytes() == content
    exported(trained / "run", "--to", "single_file", "--title", "Boat Turbo", "--output", file, "--overwrite")
    assert metadata_of(file)["modelspec.title"] == "Boat Turbo"
    check_trainable(ModelConfig(pretrained_model_name_or_path=str(file)))


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr", "generation", "architecture", "stated"),
    [
        ("v_prediction", False, 1, "stable-diffusion-v1", "v"),
        ("v_prediction", True, 2, "stable-diffusion-v2-768-v", "v"),
        ("epsilon", False, 2, "stable-diffusion-v2-512", "epsilon"),
        ("sample", True, 1, "stable-diffusion-v1", "sample"),
    ],
)
def test_what_a_model_predicts_comes_back(
    tiny_pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    prediction_type: str, zero_snr: bool, generation: int, architecture: str, stated: str,
) -> None:  # fmt: skip
    model = tiny_of_generation(tmp_path / "model", generation)
    settings = model / "scheduler" / "scheduler_config.json"
    changed = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | changed))
    file = tmp_path / "m.safetensors"
    with caplog.at_level("WARNING", logger="sd_recipes"):
        exported(model, "--to", "single_file", "--output", file)
    names = load_file(file).keys()
    assert ("v_pred" in names, "ztsnr" in names) == (stated == "v", zero_snr)
    found = metadata_of(file)
    assert (found["modelspec.architecture"], found["modelspec.prediction_type"]) == (architecture, stated)
    assert "The UNet is not that of Stable Diffusion" in caplog.text
    assert ("predicts x_0" in caplog.text) == (stated == "sample")
    assert ("m.yaml" in caplog.text) == (stated == "v" and generation == 1)
    exported(file, "--base", tiny_pipeline, "--to", "pipeline", "--output", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "scheduler" / "scheduler_config.json").read_text())
    assert (back["prediction_type"], back["rescale_betas_zero_snr"]) == (prediction_type, zero_snr)
    from_single_file(file, model)


# ------------------------------------------------------------------------------------------- LoRAs


def test_a_lora_of_full_rank_is_all_that_was_trained(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In both kinds of keys, by stock diffusers over the base, and merged into it; but for biases and norms."""
    model, expected = trained / "model", StableDiffusionPipeline.from_pretrained(trained / "model")
    weights, trained_unet = expected.unet.state_dict(), part_of(trained / "run", "unet")
    with torch.no_grad():
        for name, value in weights.items():
            if value.ndim >= 2:
                value.copy_(trained_unet[name])
    for kind in ("lora", "kohya_lora"):
        file = tmp_path / f"{kind}.safetensors"
        exported(trained / "run", "--to", kind, "--rank", 128, "--dtype", "fp32", "--output", file)
        pipeline = StableDiffusionPipeline.from_pretrained(model)
        pipeline.load_lora_weights(str(file))
        assert np.abs(picture(pipeline) - picture(expected)).max() < 1e-3
        exported(model, "--lora", file, "--to", "pipeline", "--output", tmp_path / f"merged-{kind}")
        merged = part_of(tmp_path / f"merged-{kind}", "unet")
        for name, value in weights.items():
            torch.testing.assert_close(merged[name], value, rtol=0, atol=2e-6)
    explained = [float(word.rstrip("%")) for word in capsys.readouterr().out.split() if word.endswith("%")]
    assert len(explained) == 2
    assert 90 < explained[0] < 100
    assert metadata_of(tmp_path / "kohya_lora.safetensors").items() >= {
        "modelspec.architecture": "stable-diffusion-v1/lora", "ss_network_module": "networks.lora",
        "ss_network_dim": "128", "ss_network_alpha": "128", "ss_v2": "False",
    }.items()  # fmt: skip


def test_a_low_rank_keeps_less_and_is_the_same_each_time(trained: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for file in files:
        exported(trained / "run", "--to", "lora", "--rank", 2, "--output", file)
    one, other = map(load_file, files)
    assert_equal(one, other)
    assert {value.shape[0] for name, value in one.items() if "lora_A" in name} == {2}


def test_a_lora_file_goes_from_one_kind_of_keys_to_the_other_and_back(trained: Path, tmp_path: Path) -> None:
    model, files = trained / "model", [tmp_path / f"{name}.safetensors" for name in ("first", "kohya", "back")]
    exported(trained / "run", "--to", "lora", "--rank", 4, "--dtype", "fp32", "--output", files[0])
    exported(files[0], "--base", model, "--to", "kohya_lora", "--dtype", "fp32", "--output", files[1])
    exported(files[1], "--base", model, "--to", "lora", "--dtype", "fp32", "--output", files[2])
    first, back = load_file(files[0]), load_file(files[2])
    assert first.keys() == back.keys()
    for name, value in first.items():
        torch.testing.assert_close(back[name], value)
    assert "name the model that it was trained on with --base" in refused(
        files[1], "--to", "lora", "--output", tmp_path / "x.safetensors"
    ), "the model of full size has other shapes"


def test_a_weight_halves_a_lora(trained: Path, tmp_path: Path) -> None:
    file, model = tmp_path / "lora.safetensors", trained / "model"
    exported(trained / "run", "--to", "lora", "--rank", 128, "--dtype", "fp32", "--output", file)
    out = tmp_path / "half.safetensors"
    exported(model, "--lora", f"{file}:0.5", "--to", "single_file", "--dtype", "fp32", "--output", out)
    half = from_single_file(out, model).unet.state_dict()
    before, after = part_of(model, "unet"), part_of(trained / "run", "unet")
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert not torch.equal(before[name], after[name])
    torch.testing.assert_close(half[name], (before[name] + after[name]) / 2, rtol=0, atol=2e-6)
    assert metadata_of(out)["modelspec.merged_from"] == "model, lora:0.5"


def test_a_run_of_a_lora_is_exported_as_one_or_merged(trained: Path, tmp_path: Path) -> None:
    """From the file that it leaves, and from its checkpoint, which draw the same in stock diffusers."""
    model, run_dir = trained / "model", tmp_path / "run"
    build_image_folder(tmp_path / "data", 4)
    forget_accelerator()
    run(
        Recipe(
            pretrained_model_name_or_path=str(model), train_data_dir=str(tmp_path / "data"), resolution=32,
            lora_rank=2, lora_alpha=4, lora_text_encoder=True, learning_rate=0.1, lr_warmup_steps=0,
            train_batch_size=4, max_train_steps=3, device="cpu", seed=5, report_to="none", validation_pictures=0,
            output_dir=str(run_dir),
        )
    )  # fmt: skip
    with_lora = StableDiffusionPipeline.from_pretrained(model)
    with_lora.load_lora_weights(str(run_dir))
    expected = picture(with_lora)
    assert np.abs(expected - picture(StableDiffusionPipeline.from_pretrained(model))).max() > 0.01
    for source in (run_dir, run_dir / "checkpoint-3"):
        for kind in ("lora", "kohya_lora"):
            exported(source, "--to", kind, "--dtype", "fp32", "--output", tmp_path / "x.safetensors", "--overwrite")
            pipeline = StableDiffusionPipeline.from_pretrained(model)
            pipeline.load_lora_weights(str(tmp_path / "x.safetensors"))
            np.testing.assert_allclose(picture(pipeline), expected, atol=2e-4)
            found = metadata_of(tmp_path / "x.safetensors")
            assert found["base_model"] == "model"
            assert "lora_rank: 2" in found["recipe"]
            assert str(tmp_path) not in found["recipe"]
        exported(source, "--to", "pipeline", "--output", tmp_path / "merged", "--overwrite")
        merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
        np.testing.assert_allclose(picture(merged), expected, atol=2e-4)
    # Of the run's file too, and further on, what it says of its origin is kept, but not what is no longer true.
    before = {"alpha": "4", "rank": "2"}.items()
    assert metadata_of(run_dir / "pytorch_lora_weights.safetensors").items() >= before
    sources = [run_dir / "pytorch_lora_weights.safetensors", tmp_path / "kohya.safetensors"]
    for source, kind in zip(sources, ("kohya_lora", "lora"), strict=True):
        exported(source, "--base", model, "--to", kind, "--output", tmp_path / f"{kind.partition('_')[0]}.safetensors")
    found = metadata_of(tmp_path / "lora.safetensors")
    assert found["base_model"] == "model"
    assert "lora_rank: 2" in found["recipe"]
    assert not {"alpha", "rank", "lora_adapter_metadata", "ss_network_dim"} & found.keys()
    assert metadata_of(tmp_path / "kohya.safetensors")["ss_base_model_version"] == "sd_v1"
    part = run_dir / "checkpoint-3" / "unet_lora" / "model.safetensors"
    told = refused(part, "--to", "lora", "--output", tmp_path / "y.safetensors")
    assert f"{part} is the LoRA of one model in a checkpoint: name the checkpoint, {run_dir / 'checkpoint-3'}" in told
    assert "name the checkpoint" in refused(model, "--lora", part, "--to", "pipeline", "--output", tmp_path / "y")


@pytest.mark.slow
def test_a_run_from_scratch_needs_no_unet_but_its_own(trained: Path, tmp_path: Path) -> None:
    config = tmp_path / "unet.json"
    config.write_text(json.dumps({**UNET_CONFIG, "block_out_channels": [32, 32]}))
    build_image_folder(tmp_path / "data", 4)
    forget_accelerator()
    run(
        Recipe(
            pretrained_model_name_or_path=str(trained / "model"), train_data_dir=str(tmp_path / "data"), resolution=32,
            train_from_scratch=True, unet_config=str(config), train_batch_size=4, max_train_steps=1, device="cpu",
            prediction_type="v_prediction", seed=5, report_to="none", validation_pictures=0,
            output_dir=str(tmp_path / "run"),
        )
    )  # fmt: skip
    config.unlink()
    exported(tmp_path / "run" / "checkpoint-1", "--to", "pipeline", "--output", tmp_path / "out")
    assert_equal(part_of(tmp_path / "out", "unet"), part_of(tmp_path / "run", "unet"))
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    told = refused(tmp_path / "run", "--to", "lora", "--rank", 2, "--output", tmp_path / "x.safetensors")
    assert "name the model that" in told


@pytest.mark.parametrize("page", ["export", "sample"])
def test_the_commands_in_the_documentation_are_accepted(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text() + EXPORT.examples + SAMPLE.examples
    commands = re.findall(r"sd-recipes (export|sample) +([^\n]*)", re.sub(r"\\\n\s*", " ", text))
    assert len(commands) > 8
    for command, words in commands:
        if "--" in words:
            (read_settings if command == "export" else read_sample_settings)(shlex.split(words))


# ------------------------------------------------------------------------------------------- bad input


def test_half_a_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(trained / "run", tmp_path / "run")
    weights = run_dir / "checkpoint-4" / "unet" / WEIGHTS["unet"]
    weights.write_bytes(weights.read_bytes()[:5000])
    told = refused(run_dir / "checkpoint-4", "--to", "single_file", "--output", tmp_path / "x.safetensors")
    assert "checkpoint-4 cannot be used (unet/diffusion_pytorch_model.safetensors has 5000 bytes and had" in told
    assert "cannot be used" in refused(run_dir, "--weights", "raw", "--to", "pipeline", "--output", tmp_path / "x")
    shutil.rmtree(trained.parent / "absent", ignore_errors=True)
    assert not list(tmp_path.glob("*x*"))


def test_what_cannot_be_exported(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, run_dir, out = trained / "model", trained / "run", ("--output", tmp_path / "x.safetensors")
    save_file({"net.weight": torch.zeros(3, 3), "net.bias": torch.zeros(3)}, tmp_path / "other.safetensors")
    for words, told in (
        ((), "name first what is exported, as in `sd-recipes export runs/boats --to single_file ...`"),
        (("--to", "pipeline"), "name first what is exported"),
        ((run_dir, *out), "--to is missing: say what to write, pipeline, single_file"),
        ((run_dir, "--to", "lora"), "--output is missing: name what to write, as in --output boats.safetensors"),
        ((run_dir, "--to", "single_file", "--output", "x"), "is to be one file: end its name in .safetensors"),
        ((run_dir, "--to", "pipeline", *out), "is to be a folder: drop the suffix"),
        ((run_dir, "--to", "ckpt", *out), "--to: invalid choice: 'ckpt'"),
        ((run_dir, "--to", "lora", *out), "was trained whole, and is no LoRA: add --rank 16"),
        ((run_dir, "--to", "lora", "--rank", 0, *out), "--rank: input should be greater than or equal to 1"),
        ((run_dir, "--to", "lora", "--rank", 999, *out), "--rank 999 is over the size of every layer"),
        ((run_dir, "--to", "single_file", "--rank", 4, *out), "--rank is about extracting a LoRA"),
        ((run_dir, "--to", "lora", "--tuned_from", model, *out), "--tuned_from is read to extract a LoRA: add --rank"),
        ((model, "--to", "lora", "--rank", 4, *out), "was made from with --tuned_from"),
        ((model, "--to", "lora", "--rank", 4, "--tuned_from", model, *out), "no layer differs between the two models"),
        ((model, "--to", "single_file", "--lora", "a.safetensors:high", *out), "'high' is no weight: write a number"),
        ((model, "--to", "single_file", "--lora", "a.safetensors:nan", *out), "'nan' is no weight"),
        (
            (model, "--to", "single_file", "--lora", "a.safetensors", *out),
            "--lora a.safetensors: there is no such",
        ),
        (
            (model, "--to", "single_file", "--lora", "other.safetensors", *out),
            "is not a LoRA, but no model that is known here",
        ),
        (("other.safetensors", "--to", "pipeline", "--output", "x"), "is no model that is known here"),
        (("./absent", "--to", "pipeline", "--output", "x"), "./absent: no such file or folder"),
    ):
        assert told in refused(*words), words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.safetensors"]


def test_a_lora_of_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    wide = build_tiny_pipeline(tmp_path / "wide", unet_config={**UNET_CONFIG, "block_out_channels": [32, 96]})
    file, out = tmp_path / "lora.safetensors", ("--output", tmp_path / "x.safetensors")
    for kind in ("lora", "kohya_lora"):
        exported(trained / "run", "--to", kind, "--rank", 4, "--output", file, "--overwrite")
        told = refused(wide, "--lora", file, "--to", "single_file", *out)
        assert "is a LoRA of another model: it changes " in told
        assert "name the model that it was trained on, or another LoRA" in told
    sdxl = tmp_path / "sdxl.safetensors"
    save_file({"lora_te2_text_model_x.lora_down.weight": torch.zeros(4, 8)}, sdxl)
    assert "is a LoRA of another model: of Stable Diffusion XL, and this one is not: name the model" in refused(
        trained / "model", "--lora", sdxl, "--to", "pipeline", "--output", tmp_path / "x"
    )
    told = refused(wide, "--tuned_from", trained / "model", "--rank", 4, "--to", "lora", *out)
    assert "the two models' unet are of different shapes" in told


def test_scores_and_wide_values_are_refused(tmp_path: Path) -> None:
    """A file cannot say the first, and fp16 not hold the second."""
    model, out = build_tiny_pipeline(tmp_path / "model", prediction_type="score"), tmp_path / "x.safetensors"
    told = refused(model, "--to", "single_file", "--output", out)
    assert "predicts scores, which no program that reads such files can sample from: use --to pipeline" in told
    weights = part_of(model, "vae")
    weights["quant_conv.bias"][0] = 1e5
    save_file(weights, model / "vae" / WEIGHTS["vae"], {"format": "pt"})
    settings = model / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text().replace("score", "epsilon"))
    told = refused(model, "--to", "single_file", "--output", out)
    assert "fp16 holds values up to 65504, and first_stage_model.quant_conv.bias has 1e+05: use --dtype bf16" in told
    exported(model, "--to", "single_file", "--dtype", "bf16", "--output", out)


def test_only_pipelines_are_written_over(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, out = trained / "run", tmp_path / "out"
    told = refused(trained / "model", "--to", "pipeline", "--output", run_dir, "--overwrite")
    assert "holds something else than a pipeline" in told
    exported(run_dir, "--to", "pipeline", "--output", out)
    before = unet_in(out / "unet")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sd_recipes.commands.export.export_pipeline", full)
        told = refused(run_dir, "--weights", "raw", "--to", "pipeline", "--output", out, "--overwrite")
    assert "cannot be written ([Errno 28] No space left on device): make room" in told
    assert_equal(unet_in(out / "unet"), before)
    exported(run_dir, "--weights", "raw", "--to", "pipeline", "--output", out, "--overwrite")
    assert_equal(unet_in(out / "unet"), unet_in(run_dir / "checkpoint-4" / "unet"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
