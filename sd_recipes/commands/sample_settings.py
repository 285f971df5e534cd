"""The settings of `sd-recipes sample`. Imports no torch, so that a mistake is reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from sd_recipes.commands.model_flags import Dtype, ModelFlags, WeightsConfig, given_flags
from sd_recipes.data.text_files import TextError, decode
from sd_recipes.errors import RecipeError
from sd_recipes.flags import Command, build_parser, explain, parse_flags
from sd_recipes.recipe import Number, Section, sampler_class_name

SAMPLE = Command(
    "sd-recipes sample",
    "Draw pictures with a run, a checkpoint, a pipeline, a single file or a Hub model, and LoRAs. The PNGs carry\n"
    "their parameters as A1111 and ComfyUI users know them.",
    """
    sd-recipes sample --pretrained_model_name_or_path runs/boats --prompts "a red boat" "a boat at night"
    sd-recipes sample --pretrained_model_name_or_path my_model.safetensors --lora style.safetensors:0.8 \\
        --prompt_file prompts.txt --sampler dpmsolver++ --steps 25 --guidance_scale 7 --seed 42 --num_images 4
    sd-recipes sample --compare runs/boats/checkpoint-500 runs/boats --captions held_out
""",
)
SIZE = "pictures have sides that are multiples of 8 pixels: use {0} or {1}"


class SampleConfig(Section):
    """Sample: what is drawn with, and of what."""

    pretrained_model_name_or_path: str | None = Field(
        None, description="A run, a checkpoint, a pipeline's folder, a single file, a Hub id, or sd-recipes/tiny-emoji."
    )
    compare: list[str] | None = Field(
        None, description="Draw the same noise with several of them, and a grid of the pictures side by side."
    )
    prompts: list[str] | None = Field(None, description="Draw these.")
    prompt_file: str | None = Field(None, description="Draw what the lines of this file say.")
    text_encoding: str | None = Field(
        None, description="Encoding of --prompt_file if it is neither UTF-8 nor marked, such as cp1252."
    )
    captions: Literal["held_out", "training"] | None = Field(
        None, description="Draw captions of the run's held-out or training rows; its data have to be where they were."
    )
    num_captions: int = Field(16, ge=1, description="So many captions at most, spread over the rows.")
    negative_prompt: str | None = Field(None, description="What the pictures are guided away from.")


class DrawingConfig(Section):
    """Drawing: how it is drawn, and where the pictures go."""

    sampler: str | None = Field(
        None, description="Sampler, such as euler_a, dpmsolver++ or unipc; if not given, the model's own."
    )
    steps: int = Field(30, ge=1, description="Steps of the sampler.")
    clip_skip: int | None = Field(
        None,
        ge=1,
        description="Leave out so many of the text encoder's last layers, as diffusers counts: 1 is A1111's 2, but for "
        "SDXL; if not given, as the run was trained.",
    )
    guidance_scale: Number = Field(7.5, ge=0, allow_inf_nan=False, description="How far to follow the prompt; 1: off.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the first picture; each further one has the next.")
    num_images: int = Field(1, ge=1, description="Pictures of each prompt.")
    resolution: int | None = Field(
        None, ge=8, description="Width and height in pixels; if not given, what the run or the model was trained at."
    )
    width: int | None = Field(None, ge=8, description="Width in pixels.")
    height: int | None = Field(None, ge=8, description="Height in pixels.")
    batch_size: int = Field(4, ge=1, description="Pictures at once; it does not change them, but for rounding.")
    dtype: Dtype | None = Field(None, description="Type to draw in; if not given, fp16 on a GPU and fp32 on the CPU.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to draw.")
    output_dir: str = Field("pictures", description="Where the pictures and grid.png are written.")
    overwrite: bool = Field(False, description="Write over pictures that are there.")

    @field_validator("sampler")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        if name is not None:
            sampler_class_name(name)
        return name

    @field_validator("resolution", "width", "height")
    @classmethod
    def _is_multiple_of_8(cls, size: int | None) -> int | None:
        if size is not None and size % 8:
            raise ValueError(SIZE.format(size - size % 8, size - size % 8 + 8))
        return size


class Sampling(SampleConfig, DrawingConfig, WeightsConfig):
    """All settings of the command: its flags, and those of a model that were given."""

    model: dict[str, Any]

    @property
    def models(self) -> list[str]:
        return self.compare or [self.pretrained_model_name_or_path or ""]


def read_settings(argv: list[str]) -> Sampling:
    """The settings in `argv`. Raises RecipeError."""
    parser = build_parser([SampleConfig, DrawingConfig, WeightsConfig, ModelFlags], SAMPLE)
    parser.usage = "sd-recipes sample --pretrained_model_name_or_path MODEL --prompts TEXT ... [--FLAG VALUE ...]"
    settings = parse_flags(argv, parser)
    try:
        config = Sampling(model=given_flags(settings), **settings)
    except ValidationError as error:
        raise RecipeError("; ".join(explain(problem, {}) for problem in error.errors())) from None
    _check(config)
    return config


def _check(config: Sampling) -> None:
    if (config.pretrained_model_name_or_path is None) == (config.compare is None):
        raise RecipeError("name what to draw with: --pretrained_model_name_or_path MODEL, or --compare A B ...")
    given = [name for name in ("prompts", "prompt_file", "captions") if getattr(config, name) is not None]
    if len(given) != 1:
        names = " and ".join(f"--{name}" for name in given)
        raise RecipeError(
            f"{names} both say what to draw: keep one" if given else
            'nothing to draw: give --prompts "a red boat", --prompt_file FILE, or --captions held_out'
        )  # fmt: skip
    if config.resolution is not None and (config.width is not None or config.height is not None):
        raise RecipeError("--resolution is width and height: drop it, or drop --width and --height")
    config.loras  # noqa: B018 - a mistake in it is told now


def read_prompts(name: str, encoding: str | None) -> list[str]:
    """The lines of a text file that are not blank. Raises RecipeError."""
    try:
        text = decode(Path(name).expanduser().read_bytes(), encoding)
    except TextError as error:
        raise RecipeError(f"--prompt_file {name} {error}") from None
    except OSError as error:
        raise RecipeError(
            f"--prompt_file {name} cannot be read ({error.strerror}): name a text file with a prompt on each line"
        ) from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise RecipeError(f"--prompt_file {name} is empty: write a prompt on each line")
    return prompts
