"""Validation within a run: what it draws and measures, and that training goes on whatever it meets."""

from __future__ import annotations

import errno
import io
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from launching import finish, flags_of, start, torchrun
from PIL import Image
from test_script import environment
from training_runs import assert_equal, average, train, weights

from sd_recipes.errors import RecipeError
from sd_recipes.model.stable_diffusion import StableDiffusion
from sd_recipes.runtime.out_of_memory import AtOnce
from sd_recipes.runtime.trackers import read_metrics
from sd_recipes.training.run import Run

PROMPTS = ["a disc", "a red disc", "disc number 3", "two discs"]
VALIDATED = {"validation_prompts": PROMPTS, "validation_inference_steps": 2, "validation_steps": 2}
HELD_OUT = {"validation_split": "train"}


def figures(run: Run, name: str) -> list[float]:
    lines = read_metrics(Path(run.recipe.output_dir) / "metrics.jsonl")
    return [line[name] for line in lines if name in line]


def pixels(run: Run) -> np.ndarray:
    """The grids of all validations."""
    samples = sorted((Path(run.recipe.output_dir) / "samples").iterdir())
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in samples])


def test_a_picture_that_cannot_be_written_does_not_take_the_loss_with_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sd_recipes.evaluation.validation.save_whole", full)
    run = train(settings, **VALIDATED, **HELD_OUT)
    assert len(figures(run, "validation_loss")) == 3
    assert caplog.text.count("What a validation leaves cannot be written") == 2


# ------------------------------------------------------------------------------------------ memory

OUT_OF_MEMORY: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
                         "you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)"),
    lambda: RuntimeError("MPS backend out of memory (MPS allocated: 5.05 GB, other allocations: 1.00 GB)."),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    lambda: RuntimeError("could not create a primitive"),
    lambda: RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported at some other call"),
    lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError,
]  # fmt: skip


class Ended(RuntimeError):
    """No error that a smaller batch would cure."""


class Held:
    """What an attempt takes of memory."""


@pytest.mark.parametrize(
    "made", OUT_OF_MEMORY, ids=["cuda", "cpu", "mps", "cublas", "onednn", "driver", "system", "host"]
)
def test_defect_16_work_is_halved_until_it_fits_and_what_failed_is_let_go(made: Callable[[], Exception]) -> None:
    tried: list[int] = []
    left: list[weakref.ref] = []

    def work(number: int) -> int:
        assert all(reference() is None for reference in left), "what the attempt before held is still there"
        tried.append(number)
        held = Held()
        left.append(weakref.ref(held))
        if number > fits:
            raise made()
        return number

    at_once, fits = AtOnce(3, "pictures"), 1
    assert (at_once.attempt(work), tried) == (1, [3, 1])
    assert (at_once.attempt(work), tried) == (1, [3, 1, 1]), "what fitted is kept"
    fits = 0
    assert (at_once.attempt(work), tried) == (None, [3, 1, 1, 1])
    assert (at_once.attempt(work), tried) == (None, [3, 1, 1, 1]), "given up"


def test_defect_16_other_errors_are_not_taken_for_it() -> None:
    def work(number: int) -> None:
        raise Ended("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(Ended):
        AtOnce(4, "pictures").attempt(work)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the UNet of a validation, whose weights are never trained while it is drawn from, take so many samples."""
    forward = UNet2DConditionModel.forward

    def set_limit(samples: int) -> None:
        def limited(self: UNet2DConditionModel, sample: torch.Tensor, *rest: Any, **options: Any) -> Any:
            if not self.training and len(sample) > samples:
                raise OUT_OF_MEMORY[0]()
            return forward(self, sample, *rest, **options)

        monkeypatch.setattr(UNet2DConditionModel, "forward", limited)

    return set_limit


def test_defect_16_a_validation_without_memory_draws_fewer_at_once_and_trains_on(
    settings: dict[str, Any], tmp_path: Path, limit: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    """The reference is a run whose validations had room: equal weights, and pictures and loss equal to rounding."""
    settings |= {**VALIDATED, **HELD_OUT}
    roomy = train(settings)
    assert pixels(roomy).std() > 5, "pictures that could differ"
    limit(2)  # one picture with its guidance, half of a held-out batch
    narrow = train(settings, output_dir=str(tmp_path / "narrow"))
    assert_equal(weights(roomy), weights(narrow))
    assert np.abs(pixels(roomy) - pixels(narrow)).max() <= 1
    np.testing.assert_allclose(figures(roomy, "validation_loss"), figures(narrow, "validation_loss"), rtol=1e-5)
    assert caplog.text.count("validation pictures: no memory for") == 2, "4 and 2, once each"
    assert caplog.text.count("the held-out loss: no memory for 4 at once (CUDA out of memory") == 1

    caplog.clear()
    limit(0)
    none = train(settings, output_dir=str(tmp_path / "none"))
    assert_equal(weights(roomy), weights(none))
    assert not (tmp_path / "none" / "samples").exists()
    assert figures(none, "validation_loss") == []
    assert caplog.text.count("validation pictures: no memory for 1 at once") == 1
    assert caplog.text.count("left out from now on") == 2, "pictures and loss, said once each"


def test_a_process_that_is_not_the_first_says_that_its_memory_has_ended() -> None:
    """Each validates a share, and what one leaves out is missing in the figures of all."""
    code = (
        "from sd_recipes.runtime.console import set_up_console; set_up_console()\n"
        "from sd_recipes.runtime.out_of_memory import AtOnce, tell_out_of_memory\n"
        "def work(number): raise MemoryError\n"
        "AtOnce(1, 'validation pictures').attempt(work)\n"
        "tell_out_of_memory('this validation', MemoryError())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(RANK="1"), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "validation pictures: no memory for 1 at once (MemoryError): left out from now on" in done.stderr
    assert "No memory for this validation: training continues" in done.stderr


def test_defect_16_memory_that_ends_beside_the_drawing_ends_no_run(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sd_recipes.evaluation.validation.picture_grid", lambda *_: bytearray(2**62))
    run = train(settings | VALIDATED)
    assert len(figures(run, "train_loss")) == 4
    assert "No memory for this validation" in caplog.text


def test_defect_16_pictures_are_decoded_one_by_one_and_training_is_left_alone(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(settings, output_dir=str(tmp_path / "plain"))
    decoded: list[int] = []
    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, z, *rest: (decoded.append(len(z)), forward(self, z, *rest))[1])
    run = train(settings | VALIDATED | {"validate_before_training": True})
    assert decoded == [1] * 3 * len(PROMPTS)
    assert_equal(weights(plain), weights(run))


# ------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    "sizes",
    [
        {"resolution": 38, "aspect_ratio_buckets": True, "bucket_step": 8, "max_upscale": 4.0},
        {"resolution": 42, "aspect_ratio_buckets": True, "bucket_step": 12, "max_upscale": 4.0},  # square: 36
        {"resolution": 36},  # a multiple of the VAE's 4, and not of the 8 that the pipeline asks for
    ],
    ids=["buckets", "odd-step", "no-buckets"],
)
def test_defect_25_validation_is_of_a_size_that_can_be_drawn(settings: dict[str, Any], sizes: dict[str, Any]) -> None:
    run = train(settings | VALIDATED | HELD_OUT | sizes)
    with torch.no_grad():
        share = run.validator._share(run.state)
    assert share
    assert {picture.size for picture in share.pictures.values()} == {(32, 32)}
    assert len(pixels(run)) == 2
    assert np.isfinite(figures(run, "validation_loss")).all()
    assert len(figures(run, "validation_loss")) == 3
    square = {38: 32, 42: 36, 36: 36}[sizes["resolution"]]
    assert run.validator.samples["held_out"].size == (square, square)


# ------------------------------------------------------------------------------------------ held-out rows


@pytest.fixture
def split(settings: dict[str, Any], tmp_path: Path) -> Callable[[list[str | None]], dict[str, Any]]:
    """Settings for a data set with a split `test`, whose captions are given."""
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(picture, "PNG")
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})

    def write(captions: list[str | None]) -> dict[str, Any]:
        folder = tmp_path / "splits"
        folder.mkdir()
        for name, texts in (("train", ["a disc"] * 8), ("test", captions)):
            rows = [{"image": {"bytes": picture.getvalue(), "path": None}, "text": text} for text in texts]
            datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{name}.parquet")
        return settings | {"train_data_dir": None, "dataset_name": str(folder), "validation_split": "test"}

    return write


@pytest.mark.parametrize("changes", [{}, {"check_data": "full"}, {"blank_captions": "error"}, {"streaming": True}])
def test_defect_26_a_held_out_split_of_unusable_rows_is_told_before_a_model_is_loaded(
    split: Callable, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(StableDiffusion, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(RecipeError, match="of --validation_split test") as error:
        train(split([None, " ", ""]), **changes)
    assert "blank or missing in text" in str(error.value)
    assert "\n" not in str(error.value)


def test_defect_26_some_bad_held_out_rows_are_counted_and_named(
    split: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(split(["a disc", None, "two discs", " "]), validation_steps=2)
    assert "2 of 4 rows of --validation_split test cannot be used and will be skipped: row 1: no caption" in caplog.text
    assert len(figures(run, "validation_loss")) == 3


def test_defect_26_unchecked_rows_leave_the_held_out_loss_out(
    split: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(split([None, None]), validation_steps=2, check_data="off")
    assert len(figures(run, "train_loss")) == 4
    assert figures(run, "validation_loss") == []
    assert caplog.text.count("No row of --validation_split can be used") == 1


# ------------------------------------------------------------------------------------------ several processes


@pytest.mark.slow
def test_a_validation_that_two_processes_share_is_that_of_one(split: Callable, tmp_path: Path) -> None:
    """Of the same averaged weights: the two go on from the checkpoint of the one, which its validation came after.

    One sample at a time, so that nothing but the sharing differs. Seven rows, one of which cannot be used, are 259
    samples, and neither these nor the prompts divide by two.
    """
    settings = split(["a disc", "a red disc", None, "two discs", "three discs", "a ring", "a blue ring"])
    settings |= {
        "train_batch_size": 1, "gradient_accumulation_steps": 4, "max_train_steps": 2, "checkpointing_steps": 2,
        "use_ema": True, "validation_clip_model": "sd-recipes/tiny-clip", "validation_inference_steps": 2,
        "output_dir": str(tmp_path / "one"), "validation_samples": 256,
    }  # fmt: skip
    one = train(settings, validation_prompts=PROMPTS[:3])
    several = tmp_path / "several"
    shutil.copytree(tmp_path / "one" / "checkpoint-2", several / "checkpoint-2")
    (several / "validation").mkdir()
    shutil.copy(tmp_path / "one" / "validation" / "step-000000.parquet", several / "validation")
    del settings["train_data_dir"]
    flags = flags_of(settings | {"gradient_accumulation_steps": 2, "output_dir": several})
    output = finish(start(torchrun(2), *flags, "--validation_prompts", *PROMPTS[:3]))
    assert output.count("Nothing left to train: 2 of 2 steps are done") == 1
    assert output.count("1 of 7 held-out rows cannot be used") == 1, "by the two together"

    of_one, of_several = ([line for line in read_metrics(run / "metrics.jsonl") if "validation_loss" in line][-1]
                          for run in (tmp_path / "one", several))  # fmt: skip
    assert of_one.keys() == of_several.keys() > {"step", "validation_loss", "image_text_score", "raw_validation_gap"}
    assert of_several == pytest.approx(of_one, rel=1e-6, abs=0)
    (grid,) = (tmp_path / "one" / "samples").iterdir()
    assert (several / "samples" / grid.name).read_bytes() == grid.read_bytes()
    assert pixels(one).std() > 5, "pictures that could differ"
    moved = average(one).named_tensors()
    assert any(not torch.equal(value, moved[name]) for name, value in weights(one).items()), "which are not the weights"
