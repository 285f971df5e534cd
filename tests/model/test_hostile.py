"""Model folders and archives made to run code: none of it is run. Hostile checkpoints are in test_checkpoint.py."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_format_and_saver import Marker

from sd_recipes.data.rows import load_rows, load_streams
from sd_recipes.errors import RecipeError
from sd_recipes.model.components import load_scheduler
from sd_recipes.model.families import family_of
from sd_recipes.recipe import ModelConfig, Recipe

EVIL_MODULE = "from pathlib import Path\nPath({marker!r}).touch()\nclass Evil: ...\n"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def model(tiny_pipeline: Path, tmp_path: Path, marker: Path) -> Path:
    """The tiny pipeline with a module in every folder that leaves the marker when it is imported."""
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        (place / "evil.py").write_text(EVIL_MODULE.format(marker=str(marker)))
    return folder


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(model: Path) -> None:
    config = ModelConfig(pretrained_model_name_or_path=str(model))
    family = family_of(config)
    family.load(config, load_scheduler(config), family.load_tokenizers(config))


AUTO_CLASSES = ("AutoModel", "AutoConfig", "AutoTokenizer", "CLIPTextModel", "UNet2DConditionModel")
AUTO_MAP = dict.fromkeys(AUTO_CLASSES, "evil.Evil")


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("model_index.json", {"_class_name": ["evil", "Evil"], "unet": ["evil", "Evil"], "vae": ["evil", "Evil"]}),
        ("unet/config.json", {"_class_name": "Evil", "auto_map": AUTO_MAP}),
        ("vae/config.json", {"_class_name": "evil.Evil", "auto_map": AUTO_MAP}),
        ("text_encoder/config.json", {"architectures": ["Evil"], "auto_map": AUTO_MAP, "trust_remote_code": True}),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": AUTO_MAP}),
        ("scheduler/scheduler_config.json", {"_class_name": ["evil", "Evil"], "auto_map": AUTO_MAP}),
    ],
)
def test_classes_that_a_model_names_are_not_taken(model: Path, marker: Path, file: str, values: dict[str, Any]) -> None:
    change(model / file, **values)
    with suppress(RecipeError):  # refused is as good
        load(model)
    assert not marker.exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("named_safetensors", [False, True])
def test_pickled_weights_are_refused(model: Path, marker: Path, part: str, named_safetensors: bool) -> None:
    (weights,) = (model / part).glob("*.safetensors")
    pickled = weights if named_safetensors else weights.with_suffix(".bin")
    weights.unlink()
    pickled.write_bytes(pickle.dumps(Marker(marker)))
    shutil.copy(pickled, model / part / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=part) as error:
        load(model)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def archive(path: Path, members: dict[str, bytes], **links: dict[str, Any]) -> Path:
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, attributes in links.items():
            member = tarfile.TarInfo(f"{name}.jpg")
            for attribute, value in attributes.items():
                setattr(member, attribute, value)
            tar.addfile(member)
    return path


def settings_of(path: Path, **changes: Any) -> Recipe:
    return Recipe(
        pretrained_model_name_or_path="-", dataset_name=str(path), image_column="jpg", caption_column="txt",
        max_train_steps=1, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
def test_an_archive_writes_and_runs_nothing(tmp_path: Path, marker: Path, streaming: bool) -> None:
    """Members with pickles under names that webdataset would unpickle, paths that lead out, links and devices."""
    picture, pickled = io.BytesIO(), pickle.dumps(Marker(marker))
    Image.new("RGB", (8, 8), "red").save(picture, "JPEG")
    members = {}
    for name in ("a", "../../b", "/tmp/sd-recipes-hostile"):
        members |= {f"{name}.jpg": picture.getvalue(), f"{name}.txt": b"a red square"}
        members |= {f"{name}.{suffix}": pickled for suffix in ("pyd", "pickle", "pkl")}
    links = {"d": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "e": {"type": tarfile.CHRTYPE}}
    recipe = settings_of(archive(tmp_path / "data" / "0.tar", members, **links), streaming=streaming)
    before = set(tmp_path.rglob("*"))
    rows = list(load_streams(recipe)[0].rows if streaming else load_rows(recipe, cache_dir=str(tmp_path / "cache")))
    assert [row["txt"] for row in rows] == ["a red square"] * 3
    assert all(row["jpg"]["bytes"] == picture.getvalue() for row in rows)
    assert not marker.exists()
    made = {path for path in set(tmp_path.rglob("*")) - before if not path.is_relative_to(tmp_path / "cache")}
    assert made == set()
    assert not Path("/tmp/sd-recipes-hostile.jpg").exists()


@pytest.mark.parametrize("suffix", ["pth", "npy", "npz"])
def test_an_archives_parts_that_are_pickles_are_not_read(tmp_path: Path, marker: Path, suffix: str) -> None:
    members = {"a.jpg": b"", "a.txt": b"a", f"a.{suffix}": pickle.dumps(Marker(marker), protocol=2)}
    path = archive(tmp_path / "data" / "0.tar", members)
    assert load_rows(settings_of(path), cache_dir=str(tmp_path / "cache"))["txt"][:] == ["a"]
    assert not marker.exists()
