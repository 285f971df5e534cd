"""Flags by which commands name a model and choose among a run's weights. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, create_model

from sd_recipes.errors import RecipeError
from sd_recipes.recipe import ModelConfig, Section

Dtype = Literal["fp32", "fp16", "bf16"]
OF_A_MODEL = ("vae", "base", "revision", "variant", "cache_dir", "allow_pickle_weights")
ModelFlags = create_model(  # type: ignore[call-overload]
    "ModelFlags",
    __base__=Section,
    __doc__="Model: where its parts come from, as in training.",
    **{name: (ModelConfig.model_fields[name].annotation, ModelConfig.model_fields[name]) for name in OF_A_MODEL},
)


class WeightsConfig(Section):
    """Weights: which of a run's, and what is added to them."""

    weights: Literal["raw", "averaged", "best", "ema05", "ema10"] | None = Field(
        None,
        description="Of a run or a checkpoint: as trained, averaged, those of the best step, or an average that "
        "--ema_snapshots kept; if not given, those that are evaluated.",
    )
    lora: list[str] | None = Field(
        None, description="LoRAs to merge, in diffusers' or kohya's keys: FILE, or FILE:WEIGHT such as style.st:0.8."
    )

    @property
    def loras(self) -> list[tuple[str, float]]:
        """Files with their weights. Raises RecipeError for a weight that is no number."""
        return list(map(_file_and_weight, self.lora or []))


def _file_and_weight(text: str) -> tuple[str, float]:
    file, colon, weight = text.rpartition(":")
    if not colon or "/" in weight or "\\" in weight or weight.endswith((".safetensors", ".sft")):
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):  # nor nan
        raise RecipeError(f"--lora {text}: {weight!r} is no weight: write a number after the colon, as in {file}:0.8")
    return file, number


def given_flags(settings: dict[str, Any]) -> dict[str, Any]:
    """Of the flags that were given, those of a model, which are taken out."""
    return {name: settings.pop(name) for name in OF_A_MODEL if name in settings}
