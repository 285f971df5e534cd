"""`sd-recipes export` and `sample` with SDXL: what they write is what is there, for stock diffusers and back."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single_files import WEIGHTS, part_of, single_file
from tiny_models import build_tiny_pipeline, build_tiny_xl_pipeline
from training_runs import assert_equal, forget_accelerator
from xl_loras import drawn_merged, drawn_with, load, picture, random_lora

from sd_recipes.commands.export import export
from sd_recipes.commands.export_settings import read_settings
from sd_recipes.commands.sample import sample
from sd_recipes.commands.sample_settings import read_settings as read_sample_settings
from sd_recipes.commands.train import run
from sd_recipes.errors import RecipeError
from sd_recipes.export.safetensors_file import hash_of_tensors
from sd_recipes.model.lora_files import diffusers_tensors, with_alpha_of_ranks
from sd_recipes.recipe import Recipe

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def model(tiny_xl_pipeline: Path) -> Path:
    return tiny_xl_pipeline


@pytest.fixture(scope="module")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A file in diffusers' keys that says who made it, and what is drawn with it."""
    file, layers = tmp_path_factory.mktemp("xl") / "lora.safetensors", random_lora(load(model))
    tensors = diffusers_tensors(with_alpha_of_ranks(layers))
    metadata = {"base_model": "someone/base", "recipe": "lora_rank: 2\n", "modelspec.author": "someone", "rank": "2"}
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata)
    return file, drawn_merged(model, layers)


def exported(*words: object) -> None:
    export(read_settings([str(word) for word in words]))


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        found: dict[str, str] = opened.metadata()
    return found


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_single_file_gives_every_tensor_back(model: Path, tmp_path: Path, dtype: str) -> None:
    """By stock diffusers, which then draws the same, and by ours; with the names of the tests' own writer."""
    file = tmp_path / "my file.safetensors"
    exported(model, "--to", "single_file", "--output", file, *(("--dtype", "fp32") if dtype == "fp32" else ()))
    stock = StableDiffusionXLPipeline.from_single_file(str(file), config=str(model), local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    exported(file, "--base", model, "--to", "pipeline", "--output", tmp_path / "back")
    for part in PARTS:
        wanted = part_of(model, part)
        if dtype == "fp16":
            wanted = {name: value.half().float() for name, value in wanted.items()}
        assert_equal(getattr(stock, part).state_dict(), wanted)
        assert_equal(part_of(tmp_path / "back", part), wanted)
    if dtype == "fp32":
        assert np.array_equal(picture(stock), picture(load(model)))
    else:
        assert {value.dtype for name, value in load_file(file).items() if "position_ids" not in name} == {torch.float16}
    expected = load_file(single_file(tmp_path / "expected.safetensors", model, generation="XL"))
    assert {name: value.shape for name, value in load_file(file).items()} == {
        name: value.shape for name, value in expected.items()
    }
    found = metadata_of(file)
    assert found.pop("modelspec.date")
    assert found == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "my file",
        "modelspec.resolution": "32x32",
        "modelspec.prediction_type": "epsilon",
        "modelspec.hash_sha256": f"0x{hash_of_tensors(file)}",
    }


@pytest.mark.parametrize("kind", ["lora", "kohya_lora"])
def test_a_lora_goes_through_both_kinds_of_keys_and_into_the_base(
    model: Path, lora: tuple[Path, np.ndarray], tmp_path: Path, kind: str
) -> None:
    (source, expected), file = lora, tmp_path / "out.safetensors"
    exported(source, "--base", model, "--to", kind, "--dtype", "fp32", "--output", file)
    np.testing.assert_allclose(drawn_with(model, file), expected, atol=2e-5)
    exported(model, "--lora", file, "--to", "pipeline", "--output", tmp_path / "merged")
    np.testing.assert_allclose(picture(load(tmp_path / "merged")), expected, atol=2e-5)
    found = metadata_of(file)
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert {name: found[name] for name in ("base_model", "recipe")} == {
        "base_model": "someone/base", "recipe": "lora_rank: 2\n"
    }  # fmt: skip
    assert found["modelspec.author"] == "someone"
    assert "rank" not in found
    assert (found.get("ss_base_model_version") == "sdxl_base_v1-0") == (kind == "kohya_lora")
    assert any("lora_unet_input_blocks_3_1" in name for name in load_file(file)) == (kind == "kohya_lora")


@pytest.mark.slow
def test_a_lora_is_extracted_from_all_three_models(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """But for what files have no names for: embeddings."""
    tuned = build_tiny_xl_pipeline(tmp_path / "tuned")
    torch.manual_seed(3)
    for part in PARTS:
        weights = {name: value + 0.02 * torch.randn_like(value) for name, value in part_of(model, part).items()}
        if part == "text_encoder_2":  # whose projection is smaller here than its layers; see the next test
            weights["text_projection.weight"] = part_of(model, part)["text_projection.weight"]
        save_file(weights, tuned / part / WEIGHTS[part], {"format": "pt"})
    expected = load(model)
    with torch.no_grad():
        for part in ("unet", "text_encoder", "text_encoder_2"):
            layers = {
                name for name, module in getattr(expected, part).named_modules()
                if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name != "text_projection"
            }  # fmt: skip
            for name, value in part_of(tuned, part).items():
                if name.removesuffix(".weight") in layers and name.endswith(".weight"):
                    getattr(expected, part).get_parameter(name).copy_(value)
    for kind in ("lora", "kohya_lora"):
        words = ("--rank", 999, "--tuned_from", model, "--to", kind, "--dtype", "fp32")
        with pytest.raises(RecipeError, match="give at most 128"):
            exported(tuned, *words, "--output", tmp_path / "x.safetensors")
        file = tmp_path / f"{kind}.safetensors"
        exported(tuned, "--rank", 128, *words[2:], "--output", file)
        np.testing.assert_allclose(drawn_with(model, file), picture(expected), atol=1e-3)
    assert "The VAE differs too" in caplog.text
    (explained, _) = re.findall(r"explained +([\d.]+)%", capsys.readouterr().out)
    assert 80 < float(explained) < 99


def test_the_second_text_encoders_projection_is_extracted_for_diffusers(model: Path, tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(model, tmp_path / "tuned"))
    weights = part_of(model, "text_encoder_2")
    torch.manual_seed(3)
    query = next(name for name in weights if name.endswith("layers.0.self_attn.q_proj.weight"))
    for name in ("text_projection.weight", query):
        rows, columns = weights[name].shape
        weights[name] = weights[name] + 0.1 * torch.randn(rows, 4) @ torch.randn(4, columns)
    save_file(weights, tuned / "text_encoder_2" / WEIGHTS["text_encoder_2"], {"format": "pt"})
    names = {}
    for kind in ("lora", "kohya_lora"):
        file = tmp_path / f"{kind}.safetensors"
        words = ("--rank", 4, "--tuned_from", model, "--to", kind, "--dtype", "fp32", "--output", file)
        exported(tuned, *words)
        names[kind] = [name for name in load_file(file) if "text_projection" in name]
    assert names["lora"] == [f"text_encoder_2.text_projection.lora_{each}.weight" for each in "AB"]
    assert names["kohya_lora"] == []
    np.testing.assert_allclose(drawn_with(model, tmp_path / "lora.safetensors"), picture(load(tuned)), atol=1e-4)


def test_a_run_of_a_lora_is_exported_as_one_or_merged(xl_settings: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """Of both text encoders too, from the file that it leaves, and from its checkpoint."""
    changes = {"lora_rank": 2, "lora_alpha": 4, "lora_text_encoder": True, "learning_rate": 0.1, "max_train_steps": 2}
    forget_accelerator()
    run(Recipe(**{**xl_settings, **changes}))
    run_dir = Path(xl_settings["output_dir"])
    expected = drawn_with(model, run_dir)
    assert np.abs(expected - picture(load(model))).max() > 0.01
    for source, kind in ((run_dir, "kohya_lora"), (run_dir / "checkpoint-2", "lora")):
        file = tmp_path / f"{kind}.safetensors"
        exported(source, "--to", kind, "--dtype", "fp32", "--output", file)
        np.testing.assert_allclose(drawn_with(model, file), expected, atol=2e-4)
        assert metadata_of(file)["base_model"] == model.name
    exported(run_dir, "--to", "single_file", "--dtype", "fp32", "--output", tmp_path / "merged.safetensors")
    stock = StableDiffusionXLPipeline.from_single_file(
        str(tmp_path / "merged.safetensors"), config=str(model), local_files_only=True
    )
    stock.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(picture(stock), expected, atol=2e-4)
    (drawn,) = sampled(tmp_path / "a", "--pretrained_model_name_or_path", run_dir)
    (merged,) = sampled(
        tmp_path / "b", "--pretrained_model_name_or_path", tmp_path / "merged.safetensors", "--base", model
    )
    assert np.abs(drawn.astype(int) - merged.astype(int)).max() <= 1


def test_what_diffusers_cannot_read_of_kohyas_keys_is_said(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, file = "text_encoder_2.text_projection", tmp_path / "x.safetensors"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(20, 2)}, file)
    exported(file, "--base", model, "--to", "kohya_lora", "--output", tmp_path / "kohya.safetensors")
    assert "lora_te2_text_projection.alpha" in load_file(tmp_path / "kohya.safetensors")
    assert "diffusers refuses such a file: use --to lora there" in caplog.text
    with pytest.raises(ValueError, match="Could not automatically infer state dict type"):
        load(model).load_lora_weights(str(tmp_path / "kohya.safetensors"))


def test_what_predicts_v_says_so(tmp_path: Path) -> None:
    model = build_tiny_xl_pipeline(tmp_path / "model")
    settings = model / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text().replace('"epsilon"', '"v_prediction"'))
    exported(model, "--to", "single_file", "--output", tmp_path / "v.safetensors")
    assert "v_pred" in load_file(tmp_path / "v.safetensors")
    assert metadata_of(tmp_path / "v.safetensors")["modelspec.prediction_type"] == "v"


def test_a_lora_of_full_size_is_known_by_its_names(tmp_path: Path) -> None:
    """It needs no base to go from kohya's keys to diffusers' and back: of the ten blocks deep in the UNet."""
    tensors = {}
    for place in ("input_blocks_7_1", "middle_block_1", "output_blocks_0_1"):
        for depth in range(10):
            name = f"lora_unet_{place}_transformer_blocks_{depth}_attn2_to_k"
            tensors[f"{name}.lora_down.weight"] = torch.full((1, 2048), 0.5)
            tensors[f"{name}.lora_up.weight"] = torch.ones(1280, 1)
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
    first, second, third = (tmp_path / f"{number}.safetensors" for number in range(3))
    save_file(tensors, first)
    exported(first, "--to", "lora", "--output", second)
    names = {name.partition(".lora_")[0] for name in load_file(second)}
    assert len(names) == 30
    assert "unet.down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_k" in names
    assert "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k" in names
    exported(second, "--to", "kohya_lora", "--dtype", "fp32", "--output", third)
    assert_equal(load_file(third), tensors)
    assert metadata_of(third)["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_loras_of_the_other_family_are_refused(model: Path, lora: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    sd, out = build_tiny_pipeline(tmp_path / "sd"), tmp_path / "x.safetensors"
    for words in (
        (sd, "--lora", lora[0], "--to", "single_file"), (lora[0], "--base", sd, "--to", "lora"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match="of Stable Diffusion XL, and this one is not: name"):
            exported(*words, "--output", out)
    with pytest.raises(RecipeError, match="name the model that it was trained on with --base"):
        exported(lora[0], "--to", "kohya_lora", "--output", out)  # full size has other shapes
    assert not out.exists()


# ------------------------------------------------------------------------------------------------ sample


def sampled(folder: Path, *words: object) -> list[np.ndarray]:
    settings = ("--output_dir", folder, "--steps", 2, "--device", "cpu", "--prompts", "disc number 2", *words)
    sample(read_sample_settings([str(word) for word in settings]))
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("**/0*.png"))]


def drawn_by_diffusers(pipeline: Any, **options: Any) -> np.ndarray:
    generator = [torch.Generator("cpu").manual_seed(0)]
    options = {"guidance_scale": 7.5, **options}
    drawn = pipeline(
        ["disc number 2"], num_inference_steps=2, height=32, width=32, generator=generator, **options
    ).images  # fmt: skip
    return np.asarray(drawn[0])


def test_samples_are_those_of_stock_diffusers(model: Path, lora: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """Of a folder, of a single file, and with a LoRA: without a negative prompt the model's own zeros count."""
    expected = drawn_by_diffusers(load(model))
    file = single_file(tmp_path / "m.safetensors", model, generation="XL")
    single = ("--pretrained_model_name_or_path", file, "--base", model)
    columns = sampled(tmp_path / "a", "--compare", model, file, "--base", model)
    assert np.array_equal(columns[0], expected)
    assert np.array_equal(columns[1], expected)
    (negative,) = sampled(tmp_path / "b", *single, "--negative_prompt", "blue")
    assert np.array_equal(negative, drawn_by_diffusers(load(model), negative_prompt=["blue"]))
    assert not np.array_equal(negative, expected)
    with_lora = load(model)
    with_lora.load_lora_weights(str(lora[0]), adapter_name="one")
    with_lora.set_adapters(["one"], [0.5])
    (weak,) = sampled(tmp_path / "c", *single, "--lora", f"{lora[0]}:0.5")
    assert np.abs(weak.astype(int) - drawn_by_diffusers(with_lora).astype(int)).max() <= 1
    assert not np.array_equal(weak, expected)
