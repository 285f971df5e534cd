"""The settings of `sd-recipes evaluate`. Imports no torch, so that a mistake is reported at once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, create_model, field_validator

from sd_recipes.errors import RecipeError
from sd_recipes.flags import Command, build_parser, explain, parse_flags, read_files
from sd_recipes.recipe import CaptionConfig, DataConfig, ImageConfig, Recipe, Section

EVALUATE = Command(
    "sd-recipes evaluate",
    "Measure what runs, checkpoints and pipelines have learned: errors on held-out and training rows under the same\n"
    "noise, and scores of the pictures that they draw of held-out captions. Writes evaluation.json and a page.",
    """
    sd-recipes evaluate runs/boats
    sd-recipes evaluate runs/boats/checkpoint-500 runs/boats/checkpoint-1000 runs/boats/best
    sd-recipes evaluate stable-diffusion-v1-5/stable-diffusion-v1-5 runs/boats \\
        --feature_model facebook/dinov2-small --clip_model openai/clip-vit-base-patch32
""",
)
# Settings of a run that an evaluation has under the same names.
OF_VALIDATION = (
    "validation_split", "validation_rows", "validation_samples", "validation_inference_steps", "validation_sampler",
    "validation_guidance_scale", "seed", "mixed_precision", "device", "allow_pickle_weights", "variant", "vae", "base",
    "clip_skip",
)  # fmt: skip


class EvaluateConfig(Section):
    """Evaluation: what is drawn and compared, and where the results are written."""

    config: str | None = Field(
        None, description="A recipe to take data and validation settings from; if not given, the first run's own."
    )
    weights: Literal["evaluated", "raw"] = Field(
        "evaluated",
        description="Of checkpoints: averaged weights, where there are some, or those that are trained.",
    )
    num_pictures: int = Field(64, ge=0, description="Draw so many pictures of held-out captions; 0 for none.")
    feature_model: str | None = Field(
        None,
        description="A CLIP or DINOv2 of transformers, of whose features the scores are; if not given, "
        "sd-recipes/tiny-clip for pictures of up to 64 pixels, and none for others.",
    )
    clip_model: str | None = Field(
        None, description="A CLIP for the image-text score; if not given, the feature model, where that is a CLIP."
    )
    num_training_pictures: int = Field(
        2000, ge=2, description="Look for copies among so many training pictures at most."
    )
    batch_size: int = Field(16, ge=1, description="Samples and pictures at once, per device.")
    output_dir: str | None = Field(
        None, description="Where the results are written; if not given, RUN/evaluation, or ./evaluation."
    )


class BoundConfig(Section):
    """The variational bound: how many bits the model needs for the latents of pictures (docs/bound.md)."""

    bound: bool = Field(False, description="Measure it on held-out and training rows, with captions and without.")
    bound_rows: int = Field(32, ge=1, description="Look at so many rows of each set at most.")
    bound_timesteps: str = Field(
        "64",
        description="Evaluate so many timesteps of each row, chosen by what they add; or `all`, for the exact sum.",
    )
    bound_variance: Literal["fitted", "fixed_large", "fixed_small"] = Field(
        "fitted", description="Variance of the reverse process in the figures that are quoted; totals are given of all."
    )

    @field_validator("bound_timesteps")
    @classmethod
    def _a_number_or_all(cls, value: str) -> str:
        if value != "all" and not (value.isdecimal() and int(value) > 0):
            raise ValueError("give a number of timesteps, such as 64, or all")
        return value

    @property
    def timesteps_of_bound(self) -> int | None:
        """How many; None for all."""
        return None if self.bound_timesteps == "all" else int(self.bound_timesteps)


ValidationFlags = create_model(  # type: ignore[call-overload]
    "ValidationFlags",
    __base__=Section,
    __doc__="Validation: what is measured, as in training.",
    **{name: (Recipe.model_fields[name].annotation, Recipe.model_fields[name]) for name in OF_VALIDATION},
)
SECTIONS: tuple[type[Section], ...] = (
    EvaluateConfig,
    BoundConfig,
    ValidationFlags,
    DataConfig,
    ImageConfig,
    CaptionConfig,
)


class Evaluation(EvaluateConfig, BoundConfig):
    """All settings of the command: its own flags, those of a recipe that were given, and what is evaluated."""

    targets: list[str]
    given: dict[str, Any]  # settings of a recipe, from --config and from the flags


def read_settings(argv: list[str]) -> Evaluation:
    """The settings in `argv`. Raises RecipeError."""
    parser = build_parser(SECTIONS, EVALUATE)
    parser.usage = "sd-recipes evaluate RUN|CHECKPOINT|PIPELINE ... [--FLAG VALUE ...]"
    parser.add_argument("targets", metavar="RUN", nargs="+", help="Runs, checkpoints or pipelines.")
    if argv[:1] and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        raise RecipeError(f"name first what is evaluated, as in `sd-recipes evaluate runs/boats {argv[0]} ...`")
    settings = parse_flags(argv, parser)
    targets = settings.pop("targets")
    recipe, _ = read_files(dict(settings))
    own = {name: value for name, value in settings.items() if name in Evaluation.model_fields}
    given = {name: value for name, value in settings.items() if name not in own}
    try:
        return Evaluation(**own, targets=targets, given={**recipe, **given})
    except ValidationError as error:
        raise RecipeError("; ".join(explain(problem, {}) for problem in error.errors())) from None
