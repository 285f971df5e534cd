"""Settings of pictures and their masks."""

from typing import Any, Literal

from pydantic import model_validator

from sd_recipes.recipe.section import Number, Section, setting


class ImageConfig(Section):
    """Images: how pictures are brought to the training size."""

    resolution: int = setting(512, "warned", "Width and height of the training images, in pixels.", ge=8)
    center_crop: bool = setting(False, "warned", "Crop the center instead of a random part; same as --crop center.")
    crop: Literal["random", "center", "none"] | None = setting(
        None, "warned", "Where to crop; `none` squeezes the whole image in, changing its aspect ratio."
    )
    random_flip: bool = setting(False, "warned", "Flip images left to right at random.")
    image_interpolation_mode: Literal[
        "nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"
    ] = setting("lanczos", "warned", "Filter for resizing.")
    max_image_megapixels: Number = setting(
        100.0, "warned", "Larger images are bad rows: a small file can decode to more memory than there is.", gt=0
    )
    aspect_ratio_buckets: bool = setting(
        False, "warned", "Train on several shapes of about --resolution² pixels, each image in the nearest one."
    )
    bucket_step: int = setting(64, "warned", "The sides of buckets are multiples of this many pixels.", ge=8)
    max_upscale: Number = setting(
        2.0, "warned", "With buckets, enlarge no image by more than this; smaller images get smaller buckets.", ge=1
    )

    @property
    def cropping(self) -> str:
        """`random`, `center` or `none`."""
        return self.crop or ("center" if self.center_crop else "random")


class MaskConfig(Section):
    """Masks: which parts of a picture are learned."""

    masked_loss: bool = setting(
        False,
        "warned",
        "Learn what is white in a picture's mask: of --mask_column, or a-mask.png beside a.png; pictures without one "
        "count as a whole.",
    )
    mask_column: str = setting("mask", "warned", "Column with the mask, its path, or its bytes in base64.")
    mask_from_alpha: bool = setting(
        False,
        "warned",
        "A picture's mask is its opacity, unless it has one of its own; switches --masked_loss on.",
    )
    unmasked_weight: Number = setting(
        0.0, "warned", "How much of the loss counts where a mask is black; where it is white, all of it.", ge=0, lt=1
    )

    @model_validator(mode="before")
    @classmethod
    def masks_are_switched_on(cls, settings: Any) -> Any:
        """`--mask_from_alpha` asks for `--masked_loss`."""
        if isinstance(settings, dict) and settings.get("mask_from_alpha") is True:
            return {**settings, "masked_loss": True}
        return settings

    @model_validator(mode="after")
    def masks_agree(self) -> "MaskConfig":
        if not self.masked_loss:
            for name in ("mask_column", "unmasked_weight"):
                if getattr(self, name) != MaskConfig.model_fields[name].default:
                    raise ValueError(f"--{name} is not read without --masked_loss: add it, or drop --{name}")
        return self
