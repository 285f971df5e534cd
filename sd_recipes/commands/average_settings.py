"""The settings of `sd-recipes average`. Imports no torch, so that a mistake is reported at once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from sd_recipes.errors import RecipeError
from sd_recipes.flags import Command, build_parser, parse_flags
from sd_recipes.recipe import WIDEST_LENGTH, Section

AVERAGE = Command(
    "sd-recipes average",
    "Make averages of a run's weights after training, of any lengths, from those that --ema_snapshots kept;\n"
    "evaluate each by the held-out loss, if the run has a --validation_split, and write the best as a pipeline.",
    """
    sd-recipes average runs/boats --length 0.05,0.10,0.15
    sd-recipes average runs/boats --length 0.08 --step 4000 --output_dir boats-4000
""",
)
EXAMPLE = "give relative widths above 0 and below 0.2887, such as 0.05,0.10,0.15"


class AverageConfig(Section):
    """Averages: which are made, of what, and where they are written."""

    length: str | None = Field(
        None, description="Relative widths of the averages, with commas between them: 0.05,0.10,0.15."
    )
    step: int | None = Field(None, ge=1, description="A step with a checkpoint; if not given, the last one.")
    output_dir: str | None = Field(
        None, description="Where the pipeline and averages.json are written; if not given, RUN/averaged."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the averages are evaluated.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = Field(
        None, description="Autocast type of the evaluation; if not given, the run's."
    )


class Averaging(AverageConfig):
    """All settings of the command: the flags, and the folder of the run."""

    run: str
    length: str

    @field_validator("length")
    @classmethod
    def is_list_of_lengths(cls, text: str) -> str:
        for word in text.split(","):
            try:
                length = float(word)
            except ValueError:
                raise ValueError(f"{word.strip()!r} is not a number: {EXAMPLE}") from None
            if not 0 < length < WIDEST_LENGTH:
                raise ValueError(f"no average is of length {word.strip()}: {EXAMPLE}")
        return text

    @property
    def lengths(self) -> list[float]:
        """Each once, in the order given."""
        return list(dict.fromkeys(map(float, self.length.split(","))))


def read_settings(argv: list[str]) -> Averaging:
    """The settings in `argv`. Raises RecipeError."""
    parser = build_parser([AverageConfig], AVERAGE)
    parser.usage = "sd-recipes average RUN --length LENGTHS [--FLAG VALUE ...]"
    parser.add_argument("run", metavar="RUN", help="The --output_dir of a run with --ema_snapshots.")
    unknown = parser.parse_known_args(argv)[1]
    if unknown and not unknown[0].startswith("-"):
        raise RecipeError(f"{unknown[0]!r} is a word too many: give one RUN, and lengths with commas between them")
    settings = parse_flags(argv, parser)
    if "length" not in settings:
        raise RecipeError(f"--length is missing: {EXAMPLE}")
    try:
        return Averaging(**settings)
    except ValidationError as error:
        raise RecipeError("; ".join(map(_explain, error.errors()))) from None


def _explain(problem: Any) -> str:
    words = problem["msg"].removeprefix("Value error, ")
    return f"--{problem['loc'][0]}: {words[0].lower()}{words[1:]} (it is {problem['input']!r})"
