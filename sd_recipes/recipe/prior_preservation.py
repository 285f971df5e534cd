"""Settings of prior preservation."""

from typing import Literal

from pydantic import model_validator

from sd_recipes.recipe.section import Number, Section, setting


class PriorConfig(Section):
    """Prior preservation: pictures of a class beside the trained ones, so that it is kept."""

    class_data_dir: str | None = setting(
        None, "compared", "Folder of class pictures: one of them is trained beside every picture of the data."
    )
    class_prompt: str | None = setting(None, "warned", "Caption of the class pictures that have none of their own.")
    num_class_images: int | None = setting(
        None,
        "free",
        "Let the model draw class pictures by --class_prompt before the run, until --class_data_dir has so many.",
        ge=1,
    )
    prior_loss_weight: Number = setting(
        1.0, "warned", "Weight of a class picture's loss, where that of a trained one is 1.", gt=0, allow_inf_nan=False
    )
    prior_preservation: Literal["pictures", "model"] = setting(
        "pictures",
        "warned",
        "What class pictures teach: themselves, or what the model predicted of them before it was trained.",
    )

    @model_validator(mode="after")
    def class_pictures_agree(self) -> "PriorConfig":
        if self.class_data_dir is None:
            for name in ("class_prompt", "num_class_images"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name} is of class pictures, and there is no folder for them: add --class_data_dir"
                    )
        if self.num_class_images is not None and self.class_prompt is None:
            raise ValueError(
                f"--num_class_images {self.num_class_images} are drawn by a caption: add --class_prompt, such as "
                "'a photo of a dog'"
            )
        return self
