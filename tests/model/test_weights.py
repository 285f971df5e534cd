"""Weight files in a pipeline's folder: which are taken, and that none trains on weights that were not loaded."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from single_files import WEIGHTS, part_of, single_file
from test_single_file import assert_parts_of, config_for, load
from training_runs import assert_equal
from transformers import BertConfig, BertModel, CLIPTokenizer

from sd_recipes.commands.convert import convert
from sd_recipes.errors import RecipeError
from sd_recipes.model.components import load_vae
from sd_recipes.model.families import family_of


@pytest.fixture
def model(tiny_pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))


def rename(model: Path, part: str, change: Callable[[str], str | None], **more: torch.Tensor) -> None:
    """Rename the tensors of a part, or leave those out that `change` gives no name."""
    path = model / part / WEIGHTS[part]
    renamed = {new: value for name, value in load_file(path).items() if (new := change(name)) is not None}
    save_file({**renamed, **more}, path)


def refused(model: Path, **flags: Any) -> str:
    with pytest.raises(RecipeError) as error:
        load(model, **flags)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("--pretrained_model_name_or_path ")
    return str(error.value)


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("part", "change", "prefix"),
    [
        ("unet", lambda name: f"unet.{name}", "unet."),
        ("vae", lambda name: f"module.{name}", "module."),
        ("text_encoder", lambda name: f"module.text_model.{name}", "module."),
        ("text_encoder", lambda name: f"_fsdp_wrapped_module.{name}", "_fsdp_wrapped_module."),
    ],
)
def test_wrappers_in_names_are_stripped_and_said(
    model: Path, tiny_pipeline: Path, caplog: pytest.LogCaptureFixture, part: str, change: Any, prefix: str
) -> None:
    rename(model, part, change)
    with caplog.at_level(logging.INFO, logger="sd_recipes"):
        assert_parts_of(load(model), tiny_pipeline)
    (said,) = [record.getMessage() for record in caplog.records if "wrapper" in record.getMessage()]
    assert part in said
    assert prefix in said


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("mid_block.", "mid_block._orig_mod."),
    ],
)
def test_a_compiled_models_names_are_refused_with_the_command_that_mends_them(
    model: Path, tiny_pipeline: Path, tmp_path: Path, change: Callable[[str], str]
) -> None:
    rename(model, "unet", change)
    assert re.search(r"cannot load unet: .* names \d+ of its \d+ tensors as a compiled model does", refused(model))
    convert(str(model), str(tmp_path / "plain"))
    assert_parts_of(load(tmp_path / "plain"), tiny_pipeline)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("text_encoder", lambda name: f"text_model.{name}"),
        ("vae", lambda name: name.replace(".to_q.", ".query.").replace(".to_out.0.", ".proj_attn.")),
    ],
)
def test_names_of_earlier_versions_are_known(
    model: Path, tiny_pipeline: Path, caplog: pytest.LogCaptureFixture, part: str, change: Any
) -> None:
    rename(model, part, change)
    assert part_of(model, part).keys() != part_of(tiny_pipeline, part).keys()
    with caplog.at_level(logging.INFO, logger="sd_recipes"):
        assert_parts_of(load(model), tiny_pipeline)
    assert caplog.records == []


def test_what_belongs_to_clips_other_half_is_left_alone(model: Path, tiny_pipeline: Path) -> None:
    more = {"text_projection.weight": torch.zeros(2), "text_model.embeddings.position_ids": torch.zeros(16)}
    more["vision_model.x"] = torch.zeros(2)
    for wrapper in ("", "module."):  # the second time around the first
        wrapped = {f"{wrapper}{name}": value for name, value in more.items()}
        names = part_of(tiny_pipeline, "text_encoder")
        rename(model, "text_encoder", lambda name: None, **wrapped,
               **{f"{wrapper}text_model.{name}": value for name, value in names.items()})  # fmt: skip
        assert_parts_of(load(model), tiny_pipeline)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        (
            lambda name: None if name.endswith("bias") else name,
            {},
            r"\d+ of its \d+ tensors are missing \(such as .*bias",
        ),
        (lambda name: None, {}, r"(\d+) of its \1 tensors are missing \(such as"),
        (
            lambda name: f"foreign.{name}",
            {},
            r"(\d+) of its \1 tensors are missing .* and \1 of the file's \1 are left",
        ),
        (lambda name: name, {"adapter.weight": torch.zeros(3)}, r"1 of the file's \d+ are left over \(such as adapter"),
    ],
)
def test_missing_and_foreign_tensors_are_counted(
    model: Path, part: str, change: Any, more: dict[str, torch.Tensor], words: str
) -> None:
    rename(model, part, change, **more)
    said = refused(model)
    assert f"cannot load {part}: {part}/{WEIGHTS[part]} does not hold this {part}: " in said
    assert re.search(words, said), said


def test_quantised_weights_are_named(model: Path) -> None:
    rename(model, "unet", lambda name: name, **{"conv_in.weight.absmax": torch.zeros(3)})
    assert "quantised weights (such as conv_in.weight.absmax), which cannot be trained" in refused(model)
    path = model / "unet" / WEIGHTS["unet"]
    tensors = {name: value for name, value in load_file(path).items() if "absmax" not in name}
    save_file({**tensors, "conv_in.weight": tensors["conv_in.weight"].to(torch.int8)}, path)
    assert "conv_in.weight is int8" in refused(model)


def test_another_text_encoder_than_clip_is_refused(model: Path) -> None:
    shutil.rmtree(model / "text_encoder")
    BertModel(
        BertConfig(vocab_size=80, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(model / "text_encoder")
    assert "cannot load text_encoder: it is a bert, and a CLIPTextModel is needed" in refused(model)


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_configuration_that_describes_nothing(model: Path, part: str) -> None:
    path = model / part / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"hidden_size": "wide", "block_out_channels": "many"}))
    assert f"cannot load {part}: its configuration does not describe one" in refused(model)
    path.unlink()
    os.mkfifo(path)  # which is not waited for
    assert f"{part}/config.json is no JSON file (is not a regular file)" in refused(model)


def test_parts_of_different_models_are_refused(model: Path) -> None:
    """The advice is not to edit the configuration of pretrained weights."""
    tokens = {f"<{number}>": 80 + number for number in range(9)}
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(model / "tokenizer")
    with pytest.raises(RecipeError, match="the tokenizer has 89 tokens, and the text encoder knows 80"):
        load(model)


@pytest.mark.parametrize("left", [[], ["vocab.json"]])
def test_a_tokenizer_without_its_vocabulary_is_refused(model: Path, left: list[str]) -> None:
    (model / "tokenizer" / "tokenizer.json").unlink()
    for name in left:
        (model / "tokenizer" / name).write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    assert "cannot load tokenizer: there is neither tokenizer/tokenizer.json nor " in refused(model)


@pytest.mark.parametrize("length", [None, 77])
def test_a_tokenizer_takes_the_length_of_the_text_encoder(
    model: Path, caplog: pytest.LogCaptureFixture, length: int | None
) -> None:
    path = model / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"model_max_length": length}
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    config = config_for(model)
    with caplog.at_level(logging.INFO, logger="sd_recipes"):
        assert family_of(config).load_tokenizers(config)[0].model_max_length == 16
    assert "length is the text encoder's: 16 tokens" in caplog.text


# -------------------------------------------------------------------------------- which file is taken


def test_the_only_variant_is_taken_and_said(
    tiny_pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "fp16", variant="fp16")
    with caplog.at_level(logging.INFO, logger="sd_recipes"):
        components = load(tmp_path / "fp16")
    half = {name: value.half().float() for name, value in part_of(tiny_pipeline, "unet").items()}
    assert_equal(components.unet.state_dict(), half)
    assert [part in caplog.text for part in ("unet", "vae", "text_encoder")] == [True] * 3
    assert caplog.text.count("--variant fp16") == 3
    caplog.clear()
    load(tmp_path / "fp16", variant="fp16")
    assert caplog.records == []


def test_a_variant_that_only_the_unet_has(model: Path, tiny_pipeline: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = model / "unet" / WEIGHTS["unet"]
    ones = {name: torch.ones_like(value) for name, value in load_file(path).items()}
    save_file(ones, path.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with caplog.at_level(logging.INFO, logger="sd_recipes"):
        components = load(model, variant="non_ema")
    assert_equal(components.unet.state_dict(), ones)
    assert_parts_of(components, tiny_pipeline, "vae", "text_encoder")
    assert caplog.text.count("there is no --variant non_ema: the plain weights") == 2
    assert "cannot load unet: it has no --variant non_em: " in refused(model, variant="non_em")


def shard(model: Path) -> list[Path]:
    path = model / "unet" / WEIGHTS["unet"]
    tensors = load_file(path)
    path.unlink()
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    holder = {name: names[place % 2] for place, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name in tensors if holder[name] == file}, path.with_name(file))
    index = {"metadata": {}, "weight_map": holder}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    return [path.with_name(file) for file in names]


def test_shards_are_joined_and_a_missing_one_is_named(model: Path, tiny_pipeline: Path) -> None:
    first, second = shard(model)
    assert_parts_of(load(model), tiny_pipeline)
    second.unlink()
    assert f"the shard {second.name}, which unet/diffusion_pytorch_model.safetensors.index.json names" in refused(model)
    index = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": f"../{first.name}"}}))
    assert "names a file outside its folder" in refused(model)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "is a web page in the place of the weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "is a Git LFS pointer"),
        (b"GGUF\x03\x00\x00\x00\x01\x00\x00\x00", "is a GGUF file"),
        (b'{"error":"Unauthorized"}', 'begins with \'{"error":"Unauthorized"}\''),
        (lambda whole: whole[: len(whole) // 2], r"is cut short, at [\d,]+ of [\d,]+ bytes"),
        (lambda whole: whole[:40], "is cut short"),
        (lambda whole: whole[:8] + b"{" + b"x" * (len(whole) - 9), "is a damaged safetensors file"),
        (lambda whole: b"\x10" + bytes(7) + b'{"a":{"dtype":1}}', "is a damaged safetensors file"),
    ],
)
@pytest.mark.parametrize("single", [False, True])
def test_a_file_that_is_something_else_is_called_what_it_is(
    model: Path, tmp_path: Path, content: Any, words: str, single: bool
) -> None:
    file = single_file(tmp_path / "m.safetensors", model) if single else model / "unet" / WEIGHTS["unet"]
    file.write_bytes(content(file.read_bytes()) if callable(content) else content)
    said = refused(file if single else model)
    assert re.search(words, said), said
    assert file.name in said


# ------------------------------------------------------------------------------------------ pickles


def pickled(model: Path) -> Path:
    for part in ("unet", "vae", "text_encoder"):
        path = model / part / WEIGHTS[part]
        torch.save(
            load_file(path), path.with_name("pytorch_model.bin" if part == "text_encoder" else f"{path.stem}.bin")
        )
        path.unlink()
    return model


def test_pickles_are_read_only_when_asked_for(model: Path, tiny_pipeline: Path) -> None:
    pickled(model)
    said = refused(model)
    assert f"`sd-recipes convert {model} model-safetensors` and name model-safetensors, or add --allow_pickle" in said
    assert_parts_of(load(model, allow_pickle_weights=True), tiny_pipeline)


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_in_a_pickle(tiny_pipeline: Path, tmp_path: Path, legacy: bool) -> None:
    """As Lightning writes them: the weights under state_dict, among the trainer's own things."""
    weights = load_file(single_file(tmp_path / "m.safetensors", tiny_pipeline))
    file = tmp_path / "my model.ckpt"
    content = {"state_dict": weights, "global_step": 470000, "epoch": 1, "callbacks": {"x": {"best": None}}}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    assert f"`sd-recipes convert '{file}' 'my model.safetensors'`" in refused(file)
    assert_parts_of(load(file, base=tiny_pipeline, allow_pickle_weights=True), tiny_pipeline)


def test_what_lightning_leaves_in_old_checkpoints_is_passed_over(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stable Diffusion 1.4's names a class, which need not be installed."""
    weights = load_file(single_file(tmp_path / "m.safetensors", tiny_pipeline))
    packages = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": packages[-1]})
    with monkeypatch.context() as patch:
        for package in packages:
            patch.setitem(sys.modules, package, types.ModuleType(package))
        sys.modules[packages[-1]].ModelCheckpoint = callback  # type: ignore[attr-defined]
        torch.save({"state_dict": weights, "callbacks": {callback: {"monitor": "loss"}}}, tmp_path / "m.ckpt")
    assert_parts_of(load(tmp_path / "m.ckpt", base=tiny_pipeline, allow_pickle_weights=True), tiny_pipeline)


def test_a_pickle_that_holds_code_is_never_run(tiny_pipeline: Path, tmp_path: Path) -> None:
    file, marker = tmp_path / "m.ckpt", tmp_path / "marker"
    for write in (
        lambda value: torch.save(value, file),
        lambda value: file.write_bytes(pickle.dumps(value, protocol=2)),
    ):
        write({"state_dict": {"a": torch.zeros(1)}, "x": Runs(marker)})
        said = refused(file, allow_pickle_weights=True)
        assert re.search(r"holds more than weights, \S+, which could be code and is not run", said), said
    assert not marker.exists()
    file.rename(tmp_path / "m.safetensors")
    assert "is in PyTorch's pickle format" in refused(tmp_path / "m.safetensors")


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"", b"\x80\x02"])
def test_a_broken_pickle(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "m.ckpt"
    file.write_bytes(content)
    assert "`sd-recipes convert" in refused(file)
    assert "cannot be read" in refused(file, allow_pickle_weights=True)


# ---------------------------------------------------------------------------------------------- Hub


@pytest.fixture
def cached(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with `someone/model`, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_pipeline, repository / "snapshots" / ("0" * 40))
    return tmp_path / "hub"


def test_a_hub_model_is_loaded_from_the_cache(cached: Path, tiny_pipeline: Path) -> None:
    assert_parts_of(load(Path("someone/model"), cache_dir=cached), tiny_pipeline)
    vae = load_vae(config_for(tiny_pipeline, vae="someone/model", cache_dir=cached))
    assert_equal(vae.state_dict(), part_of(tiny_pipeline, "vae"))


def test_without_model_index_in_the_cache_the_parts_are_found(cached: Path, tiny_pipeline: Path) -> None:
    """Earlier versions did not download it."""
    next(cached.rglob("model_index.json")).unlink()
    assert_parts_of(load(Path("someone/model"), cache_dir=cached), tiny_pipeline)


def test_what_is_not_in_the_cache_may_still_be_on_the_hub(cached: Path) -> None:
    next(cached.rglob("unet/*.safetensors")).unlink()
    said = refused(Path("someone/model"), cache_dir=cached)
    assert "cannot load unet: unet/ has neither" in said
    assert "in the cache, and the Hub was not reached" in said
    assert "someone/absent: cannot load" in refused(Path("someone/absent"), cache_dir=cached)
