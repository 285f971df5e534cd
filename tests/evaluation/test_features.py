"""Pictures to features: by transformers' own models and preprocessing; and what is no feature model, in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import tiny_tokenizer
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from sd_recipes import assets
from sd_recipes.errors import RecipeError
from sd_recipes.evaluation.features import FeatureModel, Preprocessing

TINY_CLIP = Path(assets.resolve("sd-recipes/tiny-clip"))
SIZES = [(64, 64), (40, 100), (131, 33), (224, 225), (1, 7), (300, 60)]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
NETWORKS: dict[str, Callable[[], Any]] = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SMALL)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL)),
    "clip_vision_model": lambda: CLIPVisionModelWithProjection(
        CLIPVisionConfig(**SMALL, intermediate_size=16, projection_dim=8)
    ),
}
PROCESSORS = {
    "CLIP's": CLIPImageProcessorPil(),
    "DINOv2's": BitImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}),
    "numbers": CLIPImageProcessorPil(size=96, crop_size=80, image_mean=[0.5] * 3, image_std=[0.25] * 3),
    "a crop that is larger": CLIPImageProcessorPil(size=31, crop_size={"height": 64, "width": 33}),
    "no cropping": CLIPImageProcessorPil(size={"height": 48, "width": 32}, do_center_crop=False),
    "no scaling": CLIPImageProcessorPil(do_resize=False, crop_size=50),
    "another filter": CLIPImageProcessorPil(resample=Image.Resampling.BILINEAR, size=64, crop_size=64),
    "no normalising": CLIPImageProcessorPil(do_normalize=False, do_rescale=False),
    "another range": CLIPImageProcessorPil(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3),
}


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def saved(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    NETWORKS[kind]().save_pretrained(folder)
    (CLIPImageProcessorPil if "clip" in kind else BitImageProcessorPil)(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_pictures_are_prepared_as_transformers_does(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    ours = Preprocessing.from_config(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    for picture in pictures():
        expected = processor(images=picture, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(ours(picture), expected, atol=1e-4, rtol=1e-6, check_dtype=False)


def test_what_the_file_leaves_out_is_as_transformers_has_it() -> None:
    for processor in (CLIPImageProcessorPil(), BitImageProcessorPil()):
        for picture in pictures():
            expected = processor(images=picture, return_tensors="pt").pixel_values[0]
            torch.testing.assert_close(Preprocessing.from_config({})(picture), expected, atol=1e-4, rtol=1e-6)


def test_features_of_the_tiny_clip_are_its_image_embeddings() -> None:
    model = FeatureModel()
    assert (model.name, model.dimensions) == ("CLIP tiny-clip (not Inception)", 128)
    features = model(pictures())
    assert (features.shape, features.dtype) == ((6, 128), np.float64)
    clip = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32).eval()
    prepared = CLIPImageProcessorPil.from_pretrained(TINY_CLIP)(images=pictures(), return_tensors="pt")
    with torch.no_grad():
        expected = clip.get_image_features(**prepared).pooler_output.double().numpy()
    np.testing.assert_allclose(features, expected, atol=1e-4)


@pytest.mark.parametrize("kind", NETWORKS)
def test_features_of_other_networks(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "small", kind)
    model = FeatureModel(str(folder), batch_size=4)
    assert model.name == f"{'CLIP' if 'clip' in kind else 'DINOv2'} small (not Inception)"
    processor = CLIPImageProcessorPil if "clip" in kind else BitImageProcessorPil
    prepared = processor.from_pretrained(folder)(images=pictures(), return_tensors="pt")
    network = NETWORKS[kind]().from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = network(**prepared)
    expected = outputs.image_embeds if "clip" in kind else outputs.last_hidden_state[:, 0]
    np.testing.assert_allclose(model(pictures()), expected.double().numpy(), atol=1e-5)


def test_a_clip_of_transformers_with_its_processor(tmp_path: Path) -> None:
    """CLIPProcessor keeps the settings within processor_config.json."""
    CLIPModel.from_pretrained(TINY_CLIP).save_pretrained(tmp_path)
    CLIPProcessor(CLIPImageProcessorPil.from_pretrained(TINY_CLIP), tiny_tokenizer()).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    np.testing.assert_array_equal(FeatureModel(str(tmp_path))(pictures()), FeatureModel()(pictures()))


def test_kinds_of_pictures_and_batches_have_the_same_features() -> None:
    model = FeatureModel()
    expected = model(pictures())
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures()]
    np.testing.assert_array_equal(model(tensors), expected)

    def one_by_one() -> Iterator[Image.Image]:
        yield from pictures()

    for batch_size in (1, 4):
        model.batch_size = batch_size
        np.testing.assert_allclose(model(one_by_one()), expected, atol=1e-4)
    same = torch.stack([tensors[0]] * 3)
    np.testing.assert_allclose(model(same), np.stack([expected[0]] * 3), atol=1e-4)


def test_transparency_is_laid_over_white_and_grey_is_grey() -> None:
    model = FeatureModel()
    (picture, *_) = pictures()
    alpha = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64), dtype=np.uint8))
    clear = picture.copy()
    clear.putalpha(alpha)
    white = Image.composite(picture, Image.new("RGB", picture.size, "white"), alpha)
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.info["transparency"] = 1
    blank = Image.new("RGB", (64, 64), "white")
    grey = picture.convert("L")
    for one, other in ((clear, white), (palette, blank), (grey, Image.merge("RGB", [grey] * 3))):
        np.testing.assert_allclose(model([one]), model([other]), atol=0.05)
    assert np.abs(model([clear]) - model([picture])).max() > 0.5


def changed(folder: Path, name: str, **settings: Any) -> None:
    content = json.loads((folder / name).read_text())
    content.update(settings)
    (folder / name).write_text(json.dumps(content))


def text_encoder(folder: Path) -> None:
    shutil.rmtree(folder)
    small = {key: value for key, value in SMALL.items() if key not in ("image_size", "patch_size")}
    CLIPTextModel(CLIPTextConfig(**small, vocab_size=9, intermediate_size=16)).save_pretrained(folder)


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def infinite_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"][:] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such folder": (shutil.rmtree, ": no such folder"),
    "an empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "is no model with a config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "give one with a whole model.safetensors ("),
    "pickled weights": (pickled, "cannot be loaded: give one with a whole model.safetensors ("),
    "half of the file": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-999]),
        "cannot be loaded: give one with a whole model.safetensors (",
    ),
    "a weight is missing": (without_a_weight, "lacks 1 weights, such as visual_projection.weight, and features would"),
    "not finite": (infinite_weight, "features that are not finite: its weights are broken"),
    "another kind": (text_encoder, "is of the type clip_text_model: give a CLIP or a DINOv2 of transformers, or"),
    "no kind": (lambda folder: (folder / "config.json").write_text("{}"), "that names its model_type: give a CLIP"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "/clip: give a folder, a Hub id, or"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "/clip: give a folder, a Hub id, or"),
    "no preprocessing": (
        lambda folder: (folder / "preprocessor_config.json").unlink(), "has no preprocessor_config.json: copy the"
    ),
    "of another size": (
        lambda folder: changed(folder, "preprocessor_config.json", crop_size=224), "cannot take pictures as its"
    ),
    "an unknown size": (
        lambda folder: changed(folder, "preprocessor_config.json", size={"longest_edge": 64}),
        "its size is {'longest_edge': 64}: set it to a height and a width",
    ),
    "no spread": (
        lambda folder: changed(folder, "preprocessor_config.json", image_std=[0, 1, 1]),
        "its image_std is [0, 1, 1]: set it to numbers above 0",
    ),
    "sizes that differ": (
        lambda folder: changed(folder, "preprocessor_config.json", do_center_crop=False),
        "it leaves pictures of different sizes: set do_center_crop to true",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_what_is_no_feature_model_is_answered_in_one_line(
    change: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(TINY_CLIP, tmp_path / "clip"))
    change(folder)
    with pytest.raises(RecipeError, match=re.escape(said)) as caught:
        FeatureModel(str(folder))(pictures())
    assert str(caught.value).startswith(f"feature model {folder}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


BAD_PICTURES = {
    "none": ([], "there are no pictures to take features of: give 1 or more"),
    "a path": (["a.png"], "picture 0 is a str: give a PIL image or a tensor (3, H, W)"),
    "floats": ([torch.zeros(3, 8, 8)], "picture 0 is a tensor (3, 8, 8) of torch.float32: give uint8 (3, H, W)"),
    "channels last": (
        [*pictures(), torch.zeros(8, 8, 3, dtype=torch.uint8)], "picture 6 is a tensor (8, 8, 3) of torch.uint8: give"
    ),
    "no pixels": ([Image.new("RGB", (0, 5))], "picture 0 has no pixels: leave it out"),
    "16 bits": ([*pictures()[:1], Image.new("I;16", (8, 8))], "picture 1 has the mode I;16: give one with 8 bits"),
}  # fmt: skip


@pytest.mark.parametrize(("some", "said"), BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_what_is_no_picture_is_answered_in_one_line(some: list[Any], said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)) as caught:
        FeatureModel(batch_size=4)(some)
    assert "\n" not in str(caught.value)


def test_bad_settings() -> None:
    with pytest.raises(RecipeError, match="batch size of the feature model is 0: give 1 or more"):
        FeatureModel(batch_size=0)
    with pytest.raises(RecipeError, match="cannot be put on the device gpu: give cpu, or cuda"):
        FeatureModel(device="gpu")


def test_the_example_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scores.md").read_text(), re.DOTALL)
    exec(example.replace("num_resamples=200", "num_resamples=2"), {})
    name, *lines = capsys.readouterr().out.splitlines()
    assert name == "CLIP tiny-clip (not Inception)"
    frechet, kid, of_cmmd, precision, recall, authentic = (
        dict(zip(("copies", "held out", "flags"), map(float, column), strict=True))
        for column in zip(*(re.findall(r" (-?[\d.]+) \(", line) for line in lines), strict=True)
    )
    for distance in (frechet, kid, of_cmmd):
        assert distance["copies"] < distance["held out"] < distance["flags"]
    assert precision["held out"] > 0.85 > 0.65 > precision["flags"]
    assert recall["held out"] > 0.85 > 0.65 > recall["flags"]
    assert authentic["copies"] == 0
    assert 40 < authentic["held out"] < 65
