"""`sd-recipes convert`: pickled weights to safetensors, for what `train` says to paste."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from single_files import part_of, single_file
from test_single_file import assert_parts_of, load
from test_weights import pickled
from tiny_models import build_tiny_pipeline
from training_runs import assert_equal

from sd_recipes.commands.convert import main
from sd_recipes.errors import RecipeError


def refused(*arguments: object) -> str:
    with pytest.raises(RecipeError) as error:
        main([str(argument) for argument in arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


def paste(model: Path, **flags: object) -> None:
    """Run the command that a refusal names."""
    with pytest.raises(RecipeError) as error:
        load(model, **flags)
    (command,) = re.findall("`sd-recipes convert (.*?)`", str(error.value))
    main(shlex.split(command))


def test_the_command_in_the_message_converts_a_checkpoint(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = load_file(single_file(tmp_path / "m.safetensors", tiny_pipeline, dtype=torch.float16))
    torch.save({"state_dict": weights, "global_step": 875000}, tmp_path / "my model.ckpt")
    paste(Path("my model.ckpt"))
    converted = load_file("my model.safetensors")
    assert converted.pop("global_step").item() == 875000, "it tells what Stable Diffusion 2 predicts"
    assert_equal(converted, weights)
    load(Path("my model.safetensors"), base=tiny_pipeline)
    assert "exists already" in refused("my model.ckpt", "my model.safetensors")


def test_the_command_in_the_message_converts_a_pipeline(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = pickled(build_tiny_pipeline(tmp_path / "my model"))
    (model / "unet" / "optimizer.bin").write_bytes(b"\x80")
    paste(model)
    assert_parts_of(load(tmp_path / "my model-safetensors"), tiny_pipeline)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.suffix in (".bin", ".partial")) == sorted(
        path.name for path in model.rglob("*.bin")
    )


def test_shards_in_pickles_stay_shards(tiny_pipeline: Path, tmp_path: Path) -> None:
    model = pickled(build_tiny_pipeline(tmp_path / "model"))
    folder, whole = model / "text_encoder", part_of(tiny_pipeline, "text_encoder")
    (folder / "pytorch_model.bin").unlink()
    files = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    holder = {name: files[place % 2] for place, name in enumerate(sorted(whole))}
    for file in files:
        torch.save({name: whole[name] for name in whole if holder[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": holder}))
    assert_parts_of(load(model, allow_pickle_weights=True), tiny_pipeline)
    main([str(model), str(tmp_path / "converted")])
    assert (tmp_path / "converted" / "text_encoder" / "model-00002-of-00002.safetensors").is_file()
    assert_parts_of(load(tmp_path / "converted"), tiny_pipeline)


def test_what_cannot_be_converted(tiny_pipeline: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1), "b": pytest.raises}, tmp_path / "code.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04")
    torch.save({"lr": 1.0}, tmp_path / "none.ckpt")
    out = tmp_path / "out.safetensors"
    assert "holds more than weights, " in refused(tmp_path / "code.ckpt", out)
    assert "broken.ckpt cannot be read" in refused(tmp_path / "broken.ckpt", out)
    assert "holds no tensors" in refused(tmp_path / "none.ckpt", out)
    assert "end its name in .safetensors" in refused(tmp_path / "none.ckpt", tmp_path / "out")
    assert "no such file or folder" in refused(tmp_path / "absent.ckpt", out)
    assert "there is nothing to convert" in refused(tiny_pipeline, tmp_path / "out")
    assert "sd-recipes convert IN OUT" in refused("a")
    assert not out.exists()
    assert not list(tmp_path.glob("*.partial"))
