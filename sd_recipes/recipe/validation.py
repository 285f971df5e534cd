"""Settings of validation and tracking."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_validator, model_validator

from sd_recipes.recipe.samplers import sampler_class_name
from sd_recipes.recipe.section import Number, Section, setting

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def _text_from_number(value: Any) -> Any:
    """YAML reads `0.05` and `100` as numbers, which this setting takes as words."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


class ValidationConfig(Section):
    """Validation and tracking: what is drawn and measured during training, and where the numbers go."""

    validation_prompts: list[str] | None = setting(None, "free", "Prompts to draw pictures of at every validation.")
    validation_epochs: int = setting(5, "free", "Epochs between validations.", ge=1)
    validation_steps: int | None = setting(None, "free", "Steps between validations, instead of epochs.", ge=1)
    validation_split: Annotated[str | None, BeforeValidator(_text_from_number)] = setting(
        None,
        "compared",
        "What is held out of training: a split, a folder or file of other rows, a share of the rows (0.05), or a "
        "number of first rows (100).",
    )
    validation_rows: int = setting(
        256, "warned", "Look at no more held-out rows than this, and at as many training rows.", ge=1
    )
    validation_samples: int = setting(
        256, "warned", "Measure at least so many errors of each: few rows are looked at under several noises.", ge=1
    )
    validation_pictures: int = setting(
        4, "free", "Without --validation_prompts, draw the captions of this many held-out rows.", ge=0
    )
    keep_best: bool = setting(
        True, "free", "Keep the weights with the lowest held-out loss so far, one copy, in OUTPUT_DIR/best."
    )
    early_stopping: int | None = setting(
        None, "free", "Stop after this many validations without a lower held-out loss.", ge=1
    )
    export: Literal["end", "best"] = setting(
        "end",
        "free",
        "Which weights the pipeline gets: those of the last step, or those with the lowest held-out loss.",
    )
    validate_before_training: bool = setting(False, "free", "Validate at step 0 too, and write before_after.png.")
    validation_inference_steps: int = setting(20, "free", "Denoising steps of a validation picture.", ge=1)
    validation_sampler: str | None = setting(
        None,
        "free",
        "Sampler of validation pictures: ddim, euler_a, dpmsolver++, … or diffusers' class; if not given, "
        "the pipeline's own.",
    )
    validation_guidance_scale: Number = setting(7.5, "free", "Guidance scale of a validation picture.", ge=0)
    validation_clip_model: str | None = setting(
        None,
        "free",
        "CLIP model for the image-text score of validation pictures (folder, Hub id, or sd-recipes/tiny-clip).",
    )
    logging_dir: str = setting("logs", "free", "TensorBoard folder, inside --output_dir.")
    logging_steps: int = setting(10, "free", "Steps between logs.", ge=1)
    report_to: str = setting("tensorboard", "free", "tensorboard, wandb, comet_ml, all or none.")
    tracker_project_name: str = setting("text2image-fine-tune", "free", "Name of the run in the trackers.")

    @field_validator("validation_sampler")
    @classmethod
    def sampler_is_known(cls, name: str | None) -> str | None:
        if name is not None:
            sampler_class_name(name)
        return name

    @property
    def held_out_share(self) -> float | None:
        """The share of the rows that is held out, if --validation_split says one."""
        text = self.validation_split or ""
        return float(text) if NUMBER.fullmatch(text) and not text.isdigit() else None

    @property
    def held_out_first(self) -> int | None:
        """The number of first rows that are held out, if --validation_split says one."""
        text = self.validation_split or ""
        return int(text) if text.isdigit() else None

    @property
    def draws_pictures(self) -> bool:
        """Whether validations draw pictures, of prompts or of captions."""
        return bool(self.validation_prompts or (self.validation_split and self.validation_pictures))

    @property
    def divides_rows(self) -> bool:
        """Whether what is held out is a part of the rows that would otherwise be trained on."""
        return self.held_out_share is not None or self.held_out_first is not None

    @model_validator(mode="after")
    def validation_agrees(self) -> "ValidationConfig":
        share, first = self.held_out_share, self.held_out_first
        if found := re.fullmatch(r"([\d.]+) ?%", self.validation_split or ""):
            raise ValueError(
                f"--validation_split {self.validation_split} is a share in percent: write {float(found[1]) / 100:g}"
            )
        if (share is not None and not 0 < share < 1) or first == 0:
            raise ValueError(
                f"--validation_split {self.validation_split} leaves nothing on one side: give a share between 0 and 1, "
                "such as 0.05, a number of first rows, a split, or a folder"
            )
        if self.validation_split is None:
            for name in ("early_stopping", "export"):
                if (value := getattr(self, name)) not in (None, "end"):
                    raise ValueError(
                        f"--{name} {value} goes by the held-out loss: give --validation_split, such as 0.05, or drop it"
                    )
        if self.export == "best" and not self.keep_best:
            raise ValueError("--export best needs the weights that --keep_best keeps: drop --no-keep_best")
        return self
