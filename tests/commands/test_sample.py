"""`sd-recipes sample`: stock diffusers' pictures of the same noise, with what drew them written into them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from single_files import single_file
from test_lora_files import written_by_peft
from tiny_models import build_image_folder, build_tiny_pipeline
from training_runs import forget_accelerator

from sd_recipes import __version__
from sd_recipes.commands.export import export
from sd_recipes.commands.export_settings import read_settings as read_export_settings
from sd_recipes.commands.sample import sample
from sd_recipes.commands.sample_settings import read_prompts, read_settings
from sd_recipes.commands.train import run
from sd_recipes.errors import RecipeError
from sd_recipes.model.samplers import drawing_sampler
from sd_recipes.recipe import Recipe

PROMPTS = ("disc number 1", "a disc", "disc number 3")
FEW_STEPS = ("--steps", 3, "--device", "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, its `model` and its `data`, of which it holds some out."""
    folder = tmp_path_factory.mktemp("sampled")
    build_tiny_pipeline(folder / "model")
    build_image_folder(folder / "data", 12)
    forget_accelerator()
    run(
        Recipe(
            pretrained_model_name_or_path=str(folder / "model"), train_data_dir=str(folder / "data"), resolution=32,
            train_batch_size=4, max_train_steps=2, checkpointing_steps=1, learning_rate=3e-3, lr_warmup_steps=0,
            device="cpu", seed=5, report_to="none", validation_split="0.4", validation_samples=8,
            validation_pictures=0, output_dir=str(folder / "run"),
        )
    )  # fmt: skip
    return folder


def sampled(output_dir: Path, model: object, *words: object) -> list[np.ndarray]:
    """The pictures by their numbers."""
    words = ("--output_dir", output_dir, *FEW_STEPS, *words)
    words = words if "--compare" in words else ("--pretrained_model_name_or_path", model, *words)
    sample(read_settings([str(word) for word in words]))
    return pictures_in(output_dir)


def pictures_in(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def refused(*words: object) -> str:
    with pytest.raises(RecipeError) as error:
        sample(read_settings([str(word) for word in words]))
    assert "\n" not in str(error.value)
    return str(error.value)


def drawn_by_diffusers(
    pipeline: StableDiffusionPipeline, prompts: tuple[str, ...] = PROMPTS, seed: int = 0, guidance_scale: float = 7.5
) -> list[np.ndarray]:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()
    pictures = pipeline(
        list(prompts), num_inference_steps=3, height=32, width=32, guidance_scale=guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(seed + number) for number in range(len(prompts))],
    ).images  # fmt: skip
    return [np.asarray(picture) for picture in pictures]


def assert_same(one: list[np.ndarray], other: list[np.ndarray], tolerance: int = 0) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert np.abs(mine.astype(int) - theirs.astype(int)).max() <= tolerance


def text_of(path: Path) -> str:
    with Image.open(path) as picture:
        return picture.text["parameters"]  # type: ignore[attr-defined, no-any-return]


def test_the_pixels_are_those_of_stock_diffusers(trained: Path, tmp_path: Path) -> None:
    """Of a pipeline and of a run, with its own sampler and another one; the resolution is the run's."""
    expected = drawn_by_diffusers(StableDiffusionPipeline.from_pretrained(trained / "run"))
    assert_same(sampled(tmp_path / "a", trained / "run", "--prompts", *PROMPTS), expected)
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "model")
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    found = sampled(
        tmp_path / "b", trained / "model", "--prompts", *PROMPTS, "--sampler", "euler", "--seed", 7,
        "--guidance_scale", 2, "--resolution", 32,
    )  # fmt: skip
    assert_same(found, drawn_by_diffusers(pipeline, seed=7, guidance_scale=2))
    with Image.open(tmp_path / "b" / "grid.png") as grid:
        assert grid.width > 3 * 128


def test_the_noise_depends_on_seed_and_number_alone(trained: Path, tmp_path: Path) -> None:
    """Not on how many are drawn at a time, nor on what else is drawn."""
    together = sampled(tmp_path / "a", trained / "run", "--prompts", "a disc", "--num_images", 4, "--seed", 3)
    apart = sampled(
        tmp_path / "b", trained / "run", "--prompts", "a disc", "--num_images", 4, "--seed", 3, "--batch_size", 1
    )
    assert_same(together, apart, tolerance=1)
    assert len({picture.tobytes() for picture in together}) == 4
    alone = sampled(tmp_path / "c", trained / "run", "--prompts", "a disc", "--seed", 5)
    assert_same(alone, together[2:3], tolerance=1)
    assert [path.name for path in sorted((tmp_path / "c").iterdir())] == ["00000-5.png", "grid.png"]


def test_checkpoints_and_single_files_draw_as_the_models_they_are(trained: Path, tmp_path: Path) -> None:
    """A checkpoint has the UNet alone: the rest comes from the model that its run began with."""
    run_dir = trained / "run"
    expected = sampled(tmp_path / "a", run_dir, "--prompts", *PROMPTS)
    assert_same(sampled(tmp_path / "b", run_dir / "checkpoint-2", "--prompts", *PROMPTS), expected)
    file = single_file(tmp_path / "m.safetensors", run_dir)
    found = sampled(
        tmp_path / "c", file, "--base", trained / "model", "--prompts", *PROMPTS, "--width", 32, "--height", 32
    )
    assert_same(found, expected)
    earlier = sampled(tmp_path / "d", run_dir / "checkpoint-1", "--prompts", *PROMPTS)
    assert any(not np.array_equal(one, other) for one, other in zip(earlier, expected, strict=True))


def test_a_lora_is_drawn_as_diffusers_draws_it(trained: Path, tmp_path: Path) -> None:
    model = trained / "model"
    file, _ = written_by_peft(tmp_path, model, lora_alpha=2)
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.load_lora_weights(str(file), adapter_name="one")
    expected = drawn_by_diffusers(pipeline)
    words = ("--prompts", *PROMPTS, "--resolution", 32)
    assert_same(sampled(tmp_path / "a", model, *words, "--lora", file), expected, tolerance=1)
    kohya = tmp_path / "style.safetensors"
    export(read_export_settings(
        [str(word) for word in (file, "--base", model, "--to", "kohya_lora", "--dtype", "fp32", "--output", kohya)]
    ))  # fmt: skip
    assert_same(sampled(tmp_path / "b", model, *words, "--lora", kohya), expected, tolerance=1)
    pipeline.set_adapters(["one"], [0.3])
    weak = sampled(tmp_path / "c", model, *words, "--lora", f"{kohya}:0.3")
    assert_same(weak, drawn_by_diffusers(pipeline), tolerance=1)
    told = text_of(tmp_path / "c" / "00000-0.png")
    assert told.startswith("disc number 1 <lora:style:0.3>\n")
    assert re.search(r'Lora hashes: "style: [0-9a-f]{12}"', told)


def test_a_picture_says_how_it_was_drawn(trained: Path, tmp_path: Path) -> None:
    """By A1111's names and in its order; what has a comma or a colon is quoted; any language."""
    file = single_file(tmp_path / "my model.safetensors", trained / "run")
    sampled(
        tmp_path / "a", file, "--base", trained / "model", "--prompts", "a disc, blue", "--negative_prompt", "円盤",
        "--sampler", "euler_a", "--seed", 12, "--num_images", 2, "--width", 32, "--height", 40, "--guidance_scale", 5,
    )  # fmt: skip
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:10]
    assert text_of(tmp_path / "a" / "00001-13.png") == (
        "a disc, blue\nNegative prompt: 円盤\nSteps: 3, Sampler: Euler a, CFG scale: 5.0, Seed: 13, Size: 32x40, "
        f"Model hash: {digest}, Model: my model, RNG: CPU, Version: sd-recipes {__version__}"
    )
    first, second = (trained / "run" / "checkpoint-2", trained / "run")
    for name, model in (("b", first), ("c", second)):
        sampled(tmp_path / name, model, "--prompts", "a disc")
    hashes = [re.findall("Model hash: (.{10}),", text_of(tmp_path / name / "00000-0.png")) for name in "bc"]
    assert hashes[0] == hashes[1], "the same UNet"
    assert str(trained) not in text_of(tmp_path / "c" / "00000-0.png")


def test_models_are_compared_on_the_same_noise(trained: Path, tmp_path: Path) -> None:
    run_dir, out = trained / "run", tmp_path / "out"
    sampled(out, None, "--compare", trained / "model", run_dir, run_dir, "--prompts", *PROMPTS, "--resolution", 32)
    columns = [pictures_in(out / f"model-{number}") for number in (1, 2, 3)]
    assert_same(columns[0], drawn_by_diffusers(StableDiffusionPipeline.from_pretrained(trained / "model")))
    assert_same(columns[1], columns[2])
    with Image.open(out / "grid.png") as picture:
        grid = np.asarray(picture)
    assert grid.shape[0] > 3 * 128
    assert grid.shape[1] == 3 * (128 + 6)
    assert (grid[:40] == 0).any(), "the models' names are above the columns"


@pytest.mark.parametrize("kind", ["held_out", "training"])
def test_captions_of_a_runs_rows(trained: Path, tmp_path: Path, kind: str) -> None:
    sampled(tmp_path / "a", trained / "run", "--captions", kind, "--num_captions", 3)
    prompts = {text_of(path).splitlines()[0] for path in (tmp_path / "a").glob("0*.png")}
    assert len(prompts) == 3
    assert all(re.fullmatch(r"disc number \d+", prompt) for prompt in prompts)
    other = "training" if kind == "held_out" else "held_out"
    sampled(tmp_path / "b", trained / "run", "--captions", other, "--num_captions", 12)
    assert prompts.isdisjoint({text_of(path).splitlines()[0] for path in (tmp_path / "b").glob("0*.png")})


def test_a_file_of_prompts(trained: Path, tmp_path: Path) -> None:
    """With the marks and the line ends that Windows gives it."""
    file = tmp_path / "prompts.txt"
    for encoding in ("utf-8", "utf-16"):
        mark = "\ufeff" if encoding == "utf-8" else ""
        file.write_bytes(f"{mark}disc number 1\r\n\r\n  a disc  \r\ndisc number 3".encode(encoding))
        assert read_prompts(str(file), None) == list(PROMPTS)
    file.write_bytes("café".encode("cp1252"))
    assert read_prompts(str(file), "cp1252") == ["café"]
    assert "as cp1252 it would read 'café': save it as UTF-8, or name its encoding, as in --text_encoding cp1252" in (
        refused("--pretrained_model_name_or_path", trained / "run", "--prompt_file", file)
    )


def test_a_model_of_scores_draws(tmp_path: Path) -> None:
    """Which diffusers refuses to."""
    model = build_tiny_pipeline(tmp_path / "model", prediction_type="score")
    found = sampled(tmp_path / "a", model, "--prompts", *PROMPTS, "--resolution", 32, "--guidance_scale", 1)
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.scheduler = drawing_sampler(pipeline.scheduler)
    assert_same(found, drawn_by_diffusers(pipeline, guidance_scale=1))


def test_bf16_draws_nearly_the_same(trained: Path, tmp_path: Path) -> None:
    whole, half = (
        sampled(tmp_path / dtype, trained / "run", "--prompts", "a disc", "--dtype", dtype)
        for dtype in ("fp32", "bf16")
    )
    assert 0 < np.abs(whole[0].astype(int) - half[0].astype(int)).mean() < 4


def test_pictures_are_not_written_over(trained: Path, tmp_path: Path) -> None:
    (before,) = sampled(tmp_path / "a", trained / "run", "--prompts", "a disc")
    words = ("--pretrained_model_name_or_path", trained / "model", "--prompts", "a disc", *FEW_STEPS)
    told = refused(*words, "--output_dir", tmp_path / "a")
    assert "has pictures already: choose another, or add --overwrite" in told
    assert_same(pictures_in(tmp_path / "a"), [before])
    assert "drop --weights" in refused(*words, "--output_dir", tmp_path / "a", "--overwrite", "--weights", "raw")
    assert_same(pictures_in(tmp_path / "a"), [before])  # before something takes its place
    (after,) = sampled(tmp_path / "a", trained / "model", "--prompts", "a disc", "--resolution", 32, "--overwrite")
    assert not np.array_equal(before, after)
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(*words, "--output_dir", tmp_path / "file")


def test_what_cannot_be_drawn(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    model = ("--pretrained_model_name_or_path", trained / "model")
    drawn = (*model, "--prompts", "a disc", *FEW_STEPS)
    for words, told in (
        ((), "name what to draw with: --pretrained_model_name_or_path MODEL, or --compare A B"),
        ((*model, "--compare", "a", "b", "--prompts", "x"), "name what to draw with"),
        (model, 'nothing to draw: give --prompts "a red boat"'),
        ((*drawn, "--captions", "held_out"), "--prompts and --captions both say what to draw: keep one"),
        ((*model, "--prompt_file", "absent.txt"), "--prompt_file absent.txt cannot be read (No such file"),
        ((*model, "--prompt_file", "empty.txt"), "--prompt_file empty.txt is empty: write a prompt on each line"),
        ((*model, "--prompt_file", "binary.txt"), "--prompt_file binary.txt is not utf-16 ("),
        ((*model, "--prompt_file", "."), "--prompt_file . cannot be read (Is a directory)"),
        ((*model, "--prompts", "a disc", " "), "--prompts holds an empty prompt"),
        ((*model, "--captions", "held_out"), "is no run, which has data: give --prompts"),
        ((*drawn, "--resolution", 30), "--resolution: pictures have sides that are multiples of 8 pixels: use 24"),
        ((*drawn, "--width", 33, "--height", 32), "--width: pictures have sides that are multiples of 8 pixels"),
        ((*drawn, "--resolution", 32, "--width", 32), "--resolution is width and height: drop it"),
        ((*drawn, "--steps", 0), "--steps: input should be greater than or equal to 1"),
        ((*drawn, "--steps", 2000, "--resolution", 32), "cannot draw from predictions of epsilon in 2000 steps"),
        ((*drawn, "--sampler", "eular"), "--sampler: there is no such sampler for Stable Diffusion's noise schedule"),
        ((*drawn, "--lora", "a.safetensors:x"), "'x' is no weight: write a number after the colon"),
        ((*drawn, "--lora", "a.safetensors"), "--lora a.safetensors: there is no such LoRA: give a"),
        ((*drawn, "--dtype", "fp16"), "--dtype fp16 needs a GPU: use bf16 or fp32 on the CPU"),
        ((*drawn, "--weights", "best"), "is a model, with one kind of weights: drop --weights"),
        ((*drawn, "--promt", "x"), "unknown flag --promt (nearest: --prompt"),
        (("--compare", trained / "model", "./absent", "--prompts", "x", *FEW_STEPS, "--resolution", 32,
          "--overwrite"), "./absent: no such file or folder"),
    ):  # fmt: skip
        assert told in refused(*words), words
    if not torch.cuda.is_available():
        assert "--device cuda: torch sees no GPU" in refused(*drawn, "--device", "cuda")
    (trained / "run" / "checkpoint-1" / "state.json").rename(tmp_path / "state.json")
    words = ("--pretrained_model_name_or_path", trained / "run" / "checkpoint-1", "--prompts", "x", *FEW_STEPS)
    assert "checkpoint-1 cannot be used (it has no checkpoint-1/state.json): name another" in refused(*words)
    (tmp_path / "state.json").rename(trained / "run" / "checkpoint-1" / "state.json")
