"""The parts of a pipeline: what is loaded, and what a person is told when a part does not fit."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from tiny_models import UNET_CONFIG

from sd_recipes.data.rows import load_rows
from sd_recipes.errors import RecipeError
from sd_recipes.model.components import Components, load_scheduler
from sd_recipes.model.families import family_of
from sd_recipes.recipe import ModelConfig, Recipe


def load(pipeline: Path, unet_config: Path | None = None) -> Components:
    config = ModelConfig(
        pretrained_model_name_or_path=str(pipeline),
        train_from_scratch=unet_config is not None,
        unet_config=unet_config and str(unet_config),
    )
    family = family_of(config)
    return family.load(config, load_scheduler(config), family.load_tokenizers(config))


def one_line(error: pytest.ExceptionInfo[RecipeError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[32, 64]", "not a JSON object"),
        ("null", "not a JSON object"),
        ("{'in_channels': 4}", "not a JSON file: Expecting property name .* line 1 column 2"),
        (json.dumps(UNET_CONFIG | {"down_block_types": ["DownBlock2D", "DownBlok2D"]}), "DownBlok2D does not exist"),
        (json.dumps(UNET_CONFIG | {"up_block_types": ["UpBlock2D", "UpBlok2D"]}), "UpBlok2D does not exist"),
        (json.dumps(UNET_CONFIG | {"block_out_channels": [32, 64, 64]}), "same number of `block_out_channels`"),
        (
            json.dumps(UNET_CONFIG | {"norm_num_groups": 7}),
            r"num_channels \(32\) must be divisible by num_groups \(7\)",
        ),
    ],
)
def test_a_bad_unet_config_is_named(tiny_pipeline: Path, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "unet.json"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load(tiny_pipeline, path)
    assert re.match(f"--unet_config {re.escape(str(path))}[: ].*{words}", one_line(error))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 5}, "takes 5 and gives 4 channels, the VAE's latents have 4"),
        ({"out_channels": 8}, "takes 4 and gives 8 channels, the VAE's latents have 4"),
        ({"in_channels": 8, "out_channels": 8}, "takes 8 and gives 8 channels, the VAE's latents have 4"),
        ({"num_class_embeds": 3}, "num_class_embeds asks for a condition besides the caption"),
        ({"cross_attention_dim": 64}, "cross_attention_dim is 64, the text encoder's states have 32 values"),
    ],
)
def test_a_unet_that_does_not_fit_the_other_parts_is_refused(
    tiny_pipeline: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = tmp_path / "unet.json"
    path.write_text(json.dumps(UNET_CONFIG | changes))
    with pytest.raises(RecipeError) as error:
        load(tiny_pipeline, path)
    assert words in one_line(error)


def test_a_unet_that_does_not_fit_is_named_by_its_flag(tiny_pipeline: Path, tmp_path: Path) -> None:
    path = tmp_path / "unet.json"
    path.write_text(json.dumps(UNET_CONFIG | {"cross_attention_dim": 64}))
    with pytest.raises(RecipeError, match=f"--unet_config {re.escape(str(path))}"):
        load(tiny_pipeline, path)


def test_a_misspelt_key_of_a_unet_config_is_named(tiny_pipeline: Path, tmp_path: Path) -> None:
    path = tmp_path / "unet.json"
    path.write_text(json.dumps(UNET_CONFIG | {"block_out_chanels": [16, 32]}))
    with pytest.raises(RecipeError, match=f"--unet_config {re.escape(str(path))}.*block_out_chanels"):
        load(tiny_pipeline, path)


def test_a_pretrained_unet_that_does_not_fit_is_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    pipeline = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    path = tmp_path / "pipeline" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 64}))
    with pytest.raises(RecipeError) as error:
        load(pipeline)
    words = r"cannot load unet: unet/diff.* does not fit .*attn2\.to_k\.weight has the shape 64 x 32, and 64 x 64 is"
    assert re.match(f"--pretrained_model_name_or_path {re.escape(str(pipeline))}: {words}", one_line(error))


def test_the_parts_are_frozen_but_the_unet(tiny_pipeline: Path) -> None:
    components = load(tiny_pipeline)
    assert all(parameter.requires_grad for parameter in components.unet.parameters())
    for part in (components.vae, components.text_encoder):
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not part.training
    assert components.vae_scale_factor == 4


@pytest.mark.parametrize(
    ("name", "loaded", "warned"),
    [
        ("EulerDiscreteScheduler", EulerDiscreteScheduler, []),
        ("HeunDiscreteScheduler", DDIMScheduler, ["HeunDiscreteScheduler"]),
        ("../planted.Scheduler", DDIMScheduler, ["../planted.Scheduler"]),
    ],
)
def test_only_known_samplers_are_taken_from_a_model(
    tiny_pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, loaded: type, warned: list[str]
) -> None:
    pipeline = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    path = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name}))
    with caplog.at_level(logging.WARNING, logger="sd_recipes"):
        components = load(pipeline)
    assert type(components.sampler) is loaded
    assert [record.args[0] for record in caplog.records if record.name.startswith("sd_recipes")] == warned
    assert components.sampler.config.beta_schedule == "scaled_linear"


def test_defect_a_replaced_sampler_does_not_clip_latents(tiny_pipeline: Path, tmp_path: Path) -> None:
    """DDIM, which takes the place of an unknown one, clips to [-1, 1] where the model's file does not speak of it."""
    pipeline = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    path = pipeline / "scheduler" / "scheduler_config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != "clip_sample"}
    path.write_text(json.dumps(config | {"_class_name": "HeunDiscreteScheduler"}))
    sampler = load(pipeline).sampler
    assert (type(sampler), sampler.config.clip_sample) == (DDIMScheduler, False)


def test_a_sampler_samples_what_was_trained(tiny_pipeline: Path) -> None:
    components = load(tiny_pipeline)
    components.sampler = PNDMScheduler.from_config(components.sampler.config)
    components.set_prediction_type("v_prediction")
    assert type(components.sampler) is PNDMScheduler
    assert components.sampler.config.prediction_type == components.scheduler.config.prediction_type == "v_prediction"
    components.set_prediction_type("sample")  # which PNDM cannot sample from
    assert type(components.sampler) is DDIMScheduler
    assert components.sampler.config.prediction_type == "sample"


@pytest.mark.parametrize(
    ("flag", "column", "words"),
    [
        ("--caption_column", "number", "neither strings nor lists of strings: choose another column"),
        ("--image_column", "path", "names no picture: .*0.png: no such file; choose another of "),
    ],
)
def test_columns_of_a_wrong_type_are_named(
    tmp_path: Path, image_folder: Path, flag: str, column: str, words: str
) -> None:
    images = [path.read_bytes() for path in sorted(image_folder.glob("*.png"))]
    columns = {
        "image": images,
        "text": ["a disc"] * 8,
        "number": list(range(8)),
        "path": [f"{n}.png" for n in range(8)],
    }
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
    settings = {"pretrained_model_name_or_path": "model", "dataset_name": str(tmp_path / "rows.parquet")}
    assert len(load_rows(Recipe(**settings))) == 8
    with pytest.raises(RecipeError) as error:
        load_rows(Recipe(**settings, **{flag.removeprefix("--"): column}))
    assert re.match(f"{flag} {column} of --dataset_name .*{words}", one_line(error))
