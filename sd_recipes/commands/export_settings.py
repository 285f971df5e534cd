"""The settings of `sd-recipes export`. Imports no torch, so that a mistake is reported at once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from sd_recipes.commands.model_flags import Dtype, ModelFlags, WeightsConfig, given_flags
from sd_recipes.errors import RecipeError
from sd_recipes.flags import Command, build_parser, explain, parse_flags
from sd_recipes.recipe import Section

EXPORT = Command(
    "sd-recipes export",
    "Write a run, a checkpoint, a pipeline, a single file or a LoRA in the form that another program reads.",
    """
    sd-recipes export runs/boats --to single_file --output boats.safetensors
    sd-recipes export runs/boats/checkpoint-500 --weights raw --to pipeline --dtype bf16 --output boats-500
    sd-recipes export runs/style_lora --to kohya_lora --output style.safetensors
    sd-recipes export my_model.safetensors --lora style.safetensors:0.8 --to single_file --output both.safetensors
    sd-recipes export runs/boats --to kohya_lora --rank 16 --output boats_lora.safetensors
""",
)
KINDS = ("pipeline", "single_file", "lora", "kohya_lora")
SUFFIXES = (".safetensors", ".sft")


class ExportConfig(Section):
    """Export: what is written, and where."""

    to: Literal["pipeline", "single_file", "lora", "kohya_lora"] | None = Field(
        None,
        description="A folder for diffusers, a .safetensors file in Stable Diffusion's own layout (A1111, ComfyUI), or "
        "a LoRA in diffusers' or kohya's keys.",
    )
    output: str | None = Field(None, description="The folder or the .safetensors file to write.")
    dtype: Dtype | None = Field(None, description="Type of the weights; if not given, fp32 for a pipeline, else fp16.")
    rank: int | None = Field(
        None, ge=1, description="Extract a LoRA of this rank from a model that was trained whole, by SVD."
    )
    tuned_from: str | None = Field(
        None, description="The model that it was trained from, to extract a LoRA; if not given, the run's own."
    )
    title: str | None = Field(None, description="Title in a file's metadata; if not given, the file's name.")
    overwrite: bool = Field(False, description="Write over what is there.")


class Export(ExportConfig, WeightsConfig):
    """All settings of the command: its flags, those of a model that were given, and what is exported."""

    source: str
    to: Literal["pipeline", "single_file", "lora", "kohya_lora"]
    output: str
    model: dict[str, Any]

    @property
    def is_lora(self) -> bool:
        return self.to in ("lora", "kohya_lora")


def read_settings(argv: list[str]) -> Export:
    """The settings in `argv`. Raises RecipeError."""
    parser = build_parser([ExportConfig, WeightsConfig, ModelFlags], EXPORT)
    parser.usage = f"sd-recipes export RUN|CHECKPOINT|MODEL --to {'|'.join(KINDS)} --output FILE [--FLAG VALUE ...]"
    parser.add_argument("source", metavar="SOURCE", help="A run, a checkpoint, a pipeline, a file or a Hub id.")
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        words = argv[0] if argv else "--to single_file"
        raise RecipeError(f"name first what is exported, as in `sd-recipes export runs/boats {words} ...`")
    settings = parse_flags(argv, parser)
    if "to" not in settings:
        raise RecipeError(f"--to is missing: say what to write, {', '.join(KINDS)}")
    if "output" not in settings:
        example = "boats-pipeline" if settings["to"] == "pipeline" else "boats.safetensors"
        raise RecipeError(f"--output is missing: name what to write, as in --output {example}")
    try:
        config = Export(model=given_flags(settings), **settings)
    except ValidationError as error:
        raise RecipeError("; ".join(explain(problem, {}) for problem in error.errors())) from None
    _check(config)
    return config


def _check(config: Export) -> None:
    if config.to != "pipeline" and not config.output.endswith(SUFFIXES):
        raise RecipeError(f"--output {config.output} is to be one file: end its name in .safetensors")
    if config.to == "pipeline" and config.output.endswith(SUFFIXES):
        raise RecipeError(f"--output {config.output} is to be a folder: drop the suffix, or use --to single_file")
    for name in ("rank", "tuned_from"):
        if getattr(config, name) is not None and not config.is_lora:
            raise RecipeError(f"--{name} is about extracting a LoRA, and --to {config.to} writes none: drop it")
    if config.lora and config.is_lora and config.rank is None:
        raise RecipeError(f"--lora is merged into a model, and --to {config.to} writes no model: name the file first")
    if config.tuned_from is not None and config.rank is None:
        raise RecipeError("--tuned_from is read to extract a LoRA: add --rank 16, or drop it")
    config.loras  # noqa: B018 - a mistake in it is told now
