"""Masked loss: masks go through what their pictures go through, and what they hide leaves no trace."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_models import build_image_folder, training_scheduler
from training_runs import assert_equal, build, train, weights

from sd_recipes.data.bad_rows import BadRow
from sd_recipes.data.captions import DEFECT
from sd_recipes.data.columns import MASK
from sd_recipes.data.images import fit_image
from sd_recipes.data.masks import COUNTED, fit_mask, mask_of, masks_in_words, own_mask, weights_of_masks
from sd_recipes.data.rows import load_rows, load_streams
from sd_recipes.errors import RecipeError
from sd_recipes.evaluation.figures import LOSS
from sd_recipes.recipe import DataSettings, ObjectiveConfig
from sd_recipes.training.objective import DenoisingLoss
from sd_recipes.training.run import Run

MASKED = {"masked_loss": True}


def half(size: tuple[int, int] = (40, 32), white: str = "left") -> Image.Image:
    """A mask of a size (width, height), white on one side."""
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[:, : size[0] // 2] = 255
    return Image.fromarray(mask if white == "left" else mask[:, ::-1])


@pytest.fixture
def masked_folder(tmp_path: Path) -> Path:
    """Eight pictures, of which all but the last have a mask beside them."""
    folder = build_image_folder(tmp_path / "pictures")
    for number in range(7):
        half(white=("left", "right")[number % 2]).save(folder / f"{number}-mask.png")
    return folder


@pytest.fixture
def masked(settings: dict[str, Any], masked_folder: Path) -> dict[str, Any]:
    return {**settings, "train_data_dir": str(masked_folder), "max_train_steps": 1, **MASKED}


def config_of(folder: Path, **changes: Any) -> DataSettings:
    return DataSettings(train_data_dir=str(folder), **{**MASKED, **changes})


def first_batch(run: Run) -> Any:
    return next(iter(run.batches(0, 1)))[0]


def test_files_beside_pictures_are_their_masks(masked_folder: Path) -> None:
    half().save(masked_folder / "7-masklabel.png")  # OneTrainer's name
    rows = load_rows(config_of(masked_folder))
    assert [Path(mask["path"]).name for mask in rows[MASK]] == [
        *(f"{number}-mask.png" for number in range(7)), "7-masklabel.png",
    ]  # fmt: skip
    assert len(rows) == 8
    for caption_from in ("file", None):  # never a picture of its own
        named = load_rows(config_of(masked_folder, caption_from=caption_from))
        assert not any("mask" in Path(image["path"]).name for image in named["image"])
    assert MASK not in load_rows(config_of(masked_folder, masked_loss=False)).column_names


def test_a_column_names_the_masks(masked_folder: Path, tmp_path: Path) -> None:
    """Of a table, by name or in base64; of a data set, as images. One that is named wins over one that lies there."""
    other = tmp_path / "masks"
    other.mkdir()
    half(white="right").save(other / "m.png")
    lines = [{"image": f"{n}.png", "text": "a", "matte": str(other / "m.png") if n < 2 else None} for n in range(8)]
    table = masked_folder / "table.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataSettings(dataset_name=str(table), **MASKED, mask_column="matte")
    assert [mask and Path(mask["path"]).name for mask in load_rows(config)[MASK]] == [
        "m.png", "m.png", *(f"{n}-mask.png" for n in range(2, 7)), None,
    ]  # fmt: skip
    wrong = DataSettings(dataset_name=str(table), **MASKED, mask_column="mate")
    with pytest.raises(RecipeError, match=r"--mask_column mate: .*table.jsonl has the columns .*nearest: matte"):
        load_rows(wrong)

    features = datasets.Features(image=datasets.Image(), mask=datasets.Image(), text=datasets.Value("string"))
    rows = {"image": [half()] * 2, "mask": [half(white="right"), None], "text": ["a", "b"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    found = load_rows(DataSettings(dataset_name=str(tmp_path / "saved"), **MASKED))
    assert found[1][MASK] is None
    mask = mask_of(found[0], (32, 40), config)
    assert mask is not None
    assert mask.tobytes() == half(white="right").tobytes()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "bytes", "images"])
def test_an_empty_value_is_no_mask(masked_folder: Path, tmp_path: Path, kind: str) -> None:
    """Of any kind of data; the file beside the picture is one then."""
    empty = {"bytes": b"", "images": {"bytes": None, "path": ""}}.get(kind, "")
    images = [str(masked_folder / f"{n}.png") for n in (6, 7)]
    columns = {"image": images, "text": ["a", "b"], "mask": [empty, empty]}
    path = tmp_path / f"rows.{kind if kind in ('csv', 'jsonl') else 'parquet'}"
    if kind == "csv":
        path.write_text("image,text,mask\n" + "".join(f"{image},a,\n" for image in images))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"image": image, "text": "a", "mask": " "}) + "\n" for image in images))
    else:
        pq.write_table(pa.table(columns), path)
    config = DataSettings(dataset_name=str(path), **MASKED)
    rows = load_rows(config)
    assert rows["image"][1]["path"] == images[1]
    assert own_mask(rows[1]) is None
    assert mask_of(rows[1], (32, 40), config) is None
    assert mask_of(rows[0], (32, 40), config) is not None
    assert masks_in_words(rows, config) == "masks: 1 of 2 rows have one; the others count as a whole"
    streamed = next(iter(load_streams(DataSettings(dataset_name=str(path), **MASKED, streaming=True))[0].rows))
    assert own_mask(streamed) == rows[0][MASK]
    assert DEFECT not in rows.column_names or rows[DEFECT] == [None, None]


def test_names_of_masks_are_of_any_case(masked_folder: Path) -> None:
    """And none of several masks of a picture is a picture."""
    (masked_folder / "0-mask.png").rename(masked_folder / "0-Mask.PNG")
    half().save(masked_folder / "1-MASKLABEL.png")
    rows = load_rows(config_of(masked_folder, caption_from="file"))
    assert [Path(image["path"]).name for image in rows["image"]] == [f"{number}.png" for number in range(8)]
    assert Path(rows[MASK][0]["path"]).name == "0-Mask.PNG"


def test_a_tar_has_masks_as_parts(tmp_path: Path) -> None:
    def png(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    parts = {"a.mask.png": png(half()), "a.png": png(half(white="right")), "a.txt": b"one", "b.png": png(half())}
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, content in (parts | {"b.txt": b"two"}).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    rows = load_rows(DataSettings(dataset_name=str(tmp_path / "shard.tar"), **MASKED))
    assert rows[0][MASK]["bytes"] == parts["a.mask.png"]
    assert rows[0]["image"]["bytes"] == parts["a.png"]
    assert rows[1][MASK] is None


@pytest.mark.parametrize("crop_u", [(0.0, 0.0), (0.99, 0.3), (0.5, 0.5), None])
@pytest.mark.parametrize("scale", [1, 2])
def test_a_mask_goes_where_its_picture_goes(crop_u: tuple[float, float] | None, scale: int) -> None:
    """Drawn into the picture itself, and averaged over each latent's area, it is the same but for the filter."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 2, (6, 10), dtype=np.uint8) * 255)
    drawn = coarse.resize((160, 96), Image.Resampling.NEAREST)
    size = (64, 64)
    pixels = fit_image(drawn.convert("RGB"), size, interpolation="box", crop_u=crop_u, flip=False)
    expected = pixels[0].reshape(16, 4, 16, 4).mean(axis=(1, 3))
    mask = drawn.resize((160 // scale, 96 // scale), Image.Resampling.NEAREST)
    found = fit_mask(mask, (96, 160), size, (16, 16), crop_u)
    assert np.abs(found - expected).mean() < 8


def test_weights_are_one_on_average() -> None:
    mask = np.array([[255, 0], [255, 51]], dtype=np.uint8)
    plain, none = weights_of_masks([mask, None], (4, 2, 2), config_of(Path("x")))
    np.testing.assert_allclose(plain[0], np.array([[1, 0], [1, 0.2]]) / 0.55, rtol=1e-6)
    assert (none == 1).all()
    (softer,) = weights_of_masks([mask], (4, 2, 2), config_of(Path("x"), unmasked_weight=0.5))
    np.testing.assert_allclose(softer[0], np.array([[1, 0.5], [1, 0.6]]) / 0.775, rtol=1e-6)
    (white,) = weights_of_masks([np.full((2, 2), 255, np.uint8)], (4, 2, 2), config_of(Path("x"), unmasked_weight=0.3))
    assert (white == 1).all()  # to the bit as without a mask


def test_a_sliver_weighs_little() -> None:
    """Where less than a hundredth of a latent shows what is learned, its errors weigh as if a hundredth did."""
    mask = np.zeros((2, 64, 64), dtype=np.uint8)
    mask[0, 0, 0] = 255
    mask[1, :4, :32] = 255  # a thirty-second
    sliver, small = weights_of_masks(list(mask), (4, 64, 64), config_of(Path("x")))
    assert sliver.max() == pytest.approx(100)
    assert sliver.mean() == pytest.approx(100 / 64**2)
    assert (small.max(), small.mean()) == (32, 1)


def test_an_all_black_mask_counts_as_a_whole_with_an_unmasked_weight(masked: dict[str, Any]) -> None:
    """m' = w everywhere: so does a crop beside the white."""
    for number in range(7):
        Image.new("L", (40, 32)).save(Path(masked["train_data_dir"]) / f"{number}-mask.png")
    for crop in ({}, {"center_crop": True}):
        batch = first_batch(build(masked, unmasked_weight=0.1, train_batch_size=8, **crop))
        assert batch.bad == ()
        assert batch.weights.tolist() == [1] * 8
        assert (batch.latent_weights == 1).all()


def test_what_a_mask_hides_leaves_no_trace(tiny_pipeline: Path) -> None:
    """Loss and gradients, to the bit, whatever is to be predicted there; with --unmasked_weight they are others."""
    unet = torch.nn.Conv2d(4, 4, 3, padding=1)

    def step(noise: torch.Tensor, unmasked_weight: float) -> tuple[torch.Tensor, ...]:
        def predict(noisy: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
            return (unet(noisy),)

        unet.zero_grad()
        config = config_of(Path("x"), unmasked_weight=unmasked_weight)
        given = weights_of_masks([mask.numpy(), None], (4, 8, 8), config)
        loss = DenoisingLoss(training_scheduler(tiny_pipeline), ObjectiveConfig(), torch.device("cpu"))
        losses = loss(predict, latents, {}, torch.tensor([3, 700]), noise, seen, given)
        losses.sum().backward()
        return losses.detach(), *(each.grad.clone() for each in unet.parameters() if each.grad is not None)

    generator = torch.Generator().manual_seed(0)
    latents, noise, seen, other = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(4))
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[2:5, 1:4] = 255
    changed = torch.where(mask.bool() | (torch.arange(2) == 1)[:, None, None, None], noise, 100 * other)
    assert all(map(torch.equal, step(noise, 0.0), step(changed, 0.0)))
    assert not any(map(torch.equal, step(noise, 0.1), step(changed, 0.1)))


def test_a_batch_has_the_mask_of_each_crop(masked: dict[str, Any]) -> None:
    """Flipped with its picture; a white half, cropped in its middle, stays half."""
    batch = first_batch(build(masked, random_flip=True, center_crop=True))
    assert batch.latent_weights.shape == (4, 1, 8, 8)
    torch.testing.assert_close(batch.latent_weights.mean(dim=(1, 2, 3)), torch.ones(4))
    for row, own in zip(batch.plan.rows, batch.latent_weights, strict=True):
        assert own[0].tolist() in ([[2.0] * 4 + [0.0] * 4] * 8, [[0.0] * 4 + [2.0] * 4] * 8) or row == 7
    parts = batch.split(2)
    assert torch.equal(torch.cat([part.latent_weights for part in parts]), batch.latent_weights)


def test_a_mask_counts_and_the_rest_is_as_before(masked: dict[str, Any], tmp_path: Path) -> None:
    """A run with masks differs from one without; white masks, and pictures without, leave it as it is to the bit."""
    plain = weights(train(masked, masked_loss=False))
    other = weights(train(masked, output_dir=str(tmp_path / "other")))
    assert any(not torch.equal(plain[name], other[name]) for name in plain)
    for path in Path(masked["train_data_dir"]).glob("*-mask.png"):
        Image.new("L", (40, 32), "white").save(path)
    assert_equal(weights(train(masked, output_dir=str(tmp_path / "white"))), plain)


def test_splitting_resuming_and_caching_change_nothing(masked: dict[str, Any], tmp_path: Path) -> None:
    """Killed and gone on, and from the cache, where the mask is kept with the moments: equal to the bit."""
    masked |= {"center_crop": True, "max_train_steps": 3, "random_flip": True, "cache_latents": "disk"}
    whole = weights(train(masked, output_dir=str(tmp_path / "whole")))
    train(masked, max_train_steps=1, checkpointing_steps=1)
    assert_equal(weights(train(masked, resume_from_checkpoint="latest")), whole)
    filled = {**masked, "latent_cache_dir": str(tmp_path / "whole" / "latents")}
    assert_equal(weights(train(filled, output_dir=str(tmp_path / "filled"))), whole)


def test_the_caches_identity_includes_the_mask(masked: dict[str, Any], tmp_path: Path) -> None:
    """A changed mask is a miss, and so is a run without masks; as a data set of its own it keeps the masks."""
    cache = {"center_crop": True, "cache_latents": "disk", "latent_cache_dir": str(tmp_path / "cache")}
    masked |= cache | {"max_train_steps": 2}
    train(masked)
    batch = first_batch(build(masked, output_dir=str(tmp_path / "second")))
    assert len(batch.to_encode) == 0
    row = next(int(row) for row in batch.plan.rows if row != 7)
    half(white="left" if row % 2 else "right").save(Path(masked["train_data_dir"]) / f"{row}-mask.png")
    assert len(first_batch(build(masked, output_dir=str(tmp_path / "third"))).to_encode) == 1
    assert len(first_batch(build(masked, output_dir=str(tmp_path / "fourth"), masked_loss=False)).to_encode) == 4

    (folder,) = (path for path in (tmp_path / "cache").iterdir() if len(list(path.glob("*.arrow"))) > 0)
    as_data = {**masked, "train_data_dir": None, "dataset_name": str(folder), "cache_latents": "off"}
    batch = first_batch(build(as_data, output_dir=str(tmp_path / "fifth")))
    assert (batch.latent_weights == 0).any()
    with pytest.raises(RecipeError, match="made with masks of --masked_loss, and this run wants them with masks, also"):
        build(as_data, output_dir=str(tmp_path / "sixth"), mask_from_alpha=True)


def test_opacity_is_a_mask(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The hidden part is laid over white as ever, and not learned; a picture's own mask wins."""
    folder = build_image_folder(tmp_path / "alpha")
    for number in range(6):
        picture = Image.open(folder / f"{number}.png").convert("RGBA")
        picture.putalpha(half())
        picture.save(folder / f"{number}.png")
    half(white="right").save(folder / "0-mask.png")
    opaque = Image.open(folder / "6.png").convert("RGBA")
    opaque.save(folder / "6.png")
    settings |= {"train_data_dir": str(folder), "mask_from_alpha": True, "center_crop": True, "train_batch_size": 8}
    run = build(settings)
    assert "masks: 6 of 8 rows have one" in capsys.readouterr().out
    assert run.recipe.masked_loss
    batch = first_batch(run)
    left = {int(row): float(own[0, 0, 0]) for row, own in zip(batch.plan.rows, batch.latent_weights, strict=True)}
    assert left == {0: 0, **dict.fromkeys(range(1, 6), 2), 6: 1, 7: 1}


def test_how_many_have_one_is_said(masked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    build(masked)
    told = capsys.readouterr().out
    assert "masks: 7 of 8 rows have one; the others count as a whole" in told
    assert "7 pictures are masks of others: 0-mask.png" in told
    build(masked, masked_loss=False)
    told = capsys.readouterr().out
    assert "7 pictures are named like masks of others (--masked_loss takes them for that)" in told
    for path in Path(masked["train_data_dir"]).glob("*-mask.png"):
        path.unlink()
    with pytest.raises(RecipeError, match=r"--masked_loss, and none of the 8 rows has a mask: put it .*a-mask.png"):
        build(masked)


def test_masks_are_counted_among_the_first_rows(masked_folder: Path) -> None:
    """By names and sizes alone: none is opened, and a file that is not there counts."""
    config = config_of(masked_folder)
    masks = [None, {"bytes": b"x", "path": None}, {"bytes": None, "path": "gone.png"}, {"bytes": None, "path": ""}]
    features = datasets.Features({MASK: datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({MASK: masks * COUNTED}, features=features)
    assert masks_in_words(rows, config) == "masks: 500 of the first 1,000 rows have one; the others count as a whole"
    late = rows.select([0] * COUNTED + [1])
    assert masks_in_words(late, config) == "masks: 0 of the first 1,000 rows have one; the others count as a whole"
    with pytest.raises(RecipeError, match="none of the 2,000 rows has a mask"):
        masks_in_words(rows.select([0, 3] * COUNTED), config)


def test_bad_masks_are_bad_rows(masked: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """With a reason that names the file; a scaled mask of the picture's shape is none."""
    folder = Path(masked["train_data_dir"])
    Image.new("L", (40, 32)).save(folder / "0-mask.png")
    half((32, 40)).save(folder / "1-mask.png")
    (folder / "2-mask.png").write_bytes(b"not a picture")
    half((81, 65)).save(folder / "3-mask.png")
    Image.new("L", (1, 1), "white").save(folder / "5-mask.png")
    white_edge = np.zeros((32, 40), dtype=np.uint8)
    white_edge[:, :2] = 255  # which a crop of the middle does not show
    Image.fromarray(white_edge).save(folder / "4-mask.png")
    batch = first_batch(build(masked, center_crop=True, max_bad_rows=8, train_batch_size=8))
    assert dict(batch.bad) == {
        f"row 0 ({folder}/0.png)": f"its mask {folder}/0-mask.png is all black, so that nothing of the picture would "
        "be learned",
        f"row 1 ({folder}/1.png)": f"its mask {folder}/1-mask.png has 32 x 40 pixels, another shape than the "
        "picture's 40 x 32",
        f"row 2 ({folder}/2.png)": f"its mask cannot be read: {folder}/2-mask.png: not a picture, but a text "
        "file; delete it, or take it out of the data",
        f"row 5 ({folder}/5.png)": f"its mask {folder}/5-mask.png has 1 x 1 pixels, another shape than the "
        "picture's 40 x 32",
        f"row 4 ({folder}/4.png)": "its crop shows nothing of what is white in its mask: choose another --crop, or "
        "crop the picture",
    }
    assert batch.weights.count_nonzero() == 3
    assert "4 of 8 rows cannot be used and will be skipped" in caplog.text  # the crop is not looked at there


def test_a_random_crop_beside_the_white_part_counts_nothing(masked: dict[str, Any]) -> None:
    """That sample has weight 0, and the row is good: its next crop shows something."""
    folder = Path(masked["train_data_dir"])
    white_edge = np.zeros((32, 40), dtype=np.uint8)
    white_edge[:, :1] = 255
    for number in range(7):
        Image.fromarray(white_edge).save(folder / f"{number}-mask.png")
    run = build(masked, train_batch_size=8)
    batch = first_batch(run)
    assert batch.bad == ()
    assert 0 < batch.weights.count_nonzero() < 8
    corners = {float(weight): set() for weight in batch.weights}
    for weight, corner, row in zip(batch.weights, batch.crop_corner, batch.plan.rows, strict=True):
        if row != 7:
            corners[float(weight)].add(int(corner[1]))
    assert corners.get(1.0, set()) <= {0}
    assert 0 not in corners[0.0]
    assert batch.latent_weights.isfinite().all()


def test_a_held_out_loss_is_masked_too(masked: dict[str, Any], tmp_path: Path) -> None:
    def held_out_loss(name: str, **changes: Any) -> float:
        run = train(masked, output_dir=str(tmp_path / name), max_train_steps=1, learning_rate=0.0,
                    validation_split="4", validation_samples=4, train_batch_size=2, **changes)  # fmt: skip
        lines = map(json.loads, (Path(run.recipe.output_dir) / "metrics.jsonl").read_text().splitlines())
        return next(line[LOSS] for line in lines if LOSS in line)

    assert held_out_loss("masked") != held_out_loss("plain", masked_loss=False)


def test_the_mistakes_of_flags() -> None:
    with pytest.raises(ValueError, match=r"--unmasked_weight is not read without --masked_loss"):
        DataSettings(train_data_dir="x", unmasked_weight=0.1)
    with pytest.raises(ValueError, match=r"--mask_column is not read without --masked_loss"):
        DataSettings(train_data_dir="x", mask_column="matte")
    with pytest.raises(ValueError, match="unmasked_weight"):
        DataSettings(train_data_dir="x", **MASKED, unmasked_weight=1)


def test_a_mask_is_not_looked_for_outside_of_the_folder(masked_folder: Path, tmp_path: Path) -> None:
    half().save(tmp_path / "secret.png")
    lines = [{"file_name": f"{n}.png", "text": "a", "mask": "../secret.png"} for n in range(8)]
    (masked_folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = load_rows(config_of(masked_folder))[0]
    with pytest.raises(BadRow, match=r"its mask cannot be read: .*secret.png"):
        mask_of(row, (32, 40), config_of(masked_folder))


def test_a_stream_has_masks_too(masked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    batch = first_batch(build(masked, streaming=True, center_crop=True, train_batch_size=8))
    assert sorted(float(own.amax()) for own in batch.latent_weights) == [1.0] + [2.0] * 7
    assert "masks: 7 of its first 8 rows have one" in capsys.readouterr().out
