"""Pictures as features of a pretrained network, for the scores that compare sets of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    CLIPVisionModelWithProjection,
    Dinov2Model,
    Dinov2WithRegistersModel,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from sd_recipes import assets
from sd_recipes.errors import RecipeError, one_line

Picture = Image.Image | Tensor

# By the model_type of config.json: what a table calls it, its class, and the output that its features are.
CLIP = ("CLIP", CLIPVisionModelWithProjection, "image_embeds")
NETWORKS: dict[str, tuple[str, type[PreTrainedModel], str]] = {
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "dinov2": ("DINOv2", Dinov2Model, "pooler_output"),
    "dinov2_with_registers": ("DINOv2", Dinov2WithRegistersModel, "pooler_output"),
}


@dataclass(frozen=True)
class Preprocessing:
    """What preprocessor_config.json says of a picture's way into a network; without torchvision.

    What it leaves out is as for CLIP and DINOv2 in transformers. Raises ValueError for what is unknown here.
    """

    shortest_edge: int | None  # scaled to it, or to `size`, or as it is
    size: tuple[int, int] | None  # (height, width), as are the others
    crop_size: tuple[int, int] | None
    resample: Image.Resampling
    scale: float
    mean: Tensor  # (3, 1, 1)
    std: Tensor

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        size, crop_size = config.get("size", 224), config.get("crop_size", 224)
        shortest_edge: int | None = None
        if isinstance(size, int):
            shortest_edge, size = size, None
        elif set(size) == {"shortest_edge"}:
            shortest_edge, size = size["shortest_edge"], None
        else:
            size = height_and_width("size", size)
        if not config.get("do_resize", True):
            shortest_edge = size = None
        crop_size = height_and_width("crop_size", crop_size) if config.get("do_center_crop", True) else None
        if not (size or crop_size):
            raise ValueError("it leaves pictures of different sizes: set do_center_crop to true, and a crop_size")
        normalize = config.get("do_normalize", True)
        mean = config.get("image_mean", OPENAI_CLIP_MEAN) if normalize else 0.0
        std = torch.tensor(config.get("image_std", OPENAI_CLIP_STD) if normalize else 1.0)
        if not (std > 0).all():
            raise ValueError(f"its image_std is {std.tolist()}: set it to numbers above 0")
        return cls(
            shortest_edge=shortest_edge,
            size=size,
            crop_size=crop_size,
            resample=Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)),
            scale=config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0,
            mean=torch.tensor(mean).expand(3).reshape(3, 1, 1),
            std=std.expand(3).reshape(3, 1, 1),
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB to float32 (3, H, W)."""
        if self.shortest_edge:
            width, height = (int(self.shortest_edge * side / min(image.size)) for side in image.size)
            image = image.resize((width, height), self.resample)
        elif self.size:
            image = image.resize(self.size[::-1], self.resample)
        if self.crop_size:
            height, width = self.crop_size
            left, top = (image.width - width) // 2, (image.height - height) // 2  # below 0: black around it
            image = image.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return (pixels * self.scale - self.mean) / self.std


def height_and_width(key: str, value: Any) -> tuple[int, int]:
    """From a number or a mapping. Raises ValueError."""
    if isinstance(value, int):
        return value, value
    if not isinstance(value, Mapping) or set(value) != {"height", "width"}:
        raise ValueError(f"its {key} is {value}: set it to a height and a width")
    return value["height"], value["width"]


class FeatureModel:
    """A CLIP (image embeddings) or DINOv2 (class token) of transformers: a folder, a Hub id, or sd-recipes/tiny-clip.

    In float32, from safetensors, by its class and without code of the repository. `name` says in a table which network
    features are of. Raises RecipeError for a model that is of neither kind, lacks weights or its preprocessing, or does
    not fit it.
    """

    def __init__(
        self,
        model: str = "sd-recipes/tiny-clip",
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
        cache_dir: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise RecipeError(f"batch size of the feature model is {batch_size}: give 1 or more")
        self.model, self.batch_size = model, batch_size
        folder = assets.resolve(model)
        if (folder.startswith((".", "/", "~")) or folder.count("/") > 1) and not Path(folder).is_dir():
            raise RecipeError(f"feature model {model}: no such folder")
        with one_line_of(f"feature model {model}: give a folder, a Hub id, or sd-recipes/tiny-clip"):
            config, _ = PreTrainedConfig.get_config_dict(folder, cache_dir=cache_dir)
            kind = config.get("model_type")
        if kind not in NETWORKS:
            found = f"of the type {kind}" if kind else "no model with a config.json that names its model_type"
            raise RecipeError(
                f"feature model {model} is {found}: give a CLIP or a DINOv2 of transformers, or sd-recipes/tiny-clip"
            )
        family, part, self.output = NETWORKS[kind]
        self.name = f"{family} {Path(model).resolve().name} (not Inception)"
        with one_line_of(f"feature model {model} cannot be loaded: give one with a whole model.safetensors"):
            network, loading = part.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, cache_dir=cache_dir, output_loading_info=True
            )
        if missing := sorted(loading["missing_keys"]):
            raise RecipeError(
                f"feature model {model} lacks {len(missing)} weights, such as {missing[0]}, and features would be "
                "random: give one that is whole"
            )
        with one_line_of(f"feature model {model} cannot be put on the device {device}: give cpu, or cuda with a GPU"):
            self.network = network.to(device).eval()
        with one_line_of(f"feature model {model} has no preprocessor_config.json: copy the one of the original"):
            settings, _ = ImageProcessingMixin.get_image_processor_dict(folder, cache_dir=cache_dir)
        with one_line_of(
            f"feature model {model} cannot take pictures as its preprocessor_config.json has them: mend it"
        ):
            self.preprocessing = Preprocessing.from_config(settings)
            self.dimensions = self._features([Image.new("RGB", (64, 64))]).shape[1]

    def __call__(self, pictures: Iterable[Picture]) -> np.ndarray:
        """Features (N, D) float64 of PIL images, or uint8 tensors (3, H, W), of any sizes; one batch is held at a time.

        Transparency is laid over white. Raises RecipeError if there are no pictures, if one is of another kind, or for
        features that are not finite.
        """
        total = len(pictures) if isinstance(pictures, Sized) else None
        batches = []
        with tqdm(total=total, desc=f"Features, {self.name}", unit="image", leave=False) as bar:
            for batch in batched(pictures, self.batch_size):
                features = self._features([as_rgb(picture, number) for number, picture in enumerate(batch, int(bar.n))])
                if not np.isfinite(features).all():
                    raise RecipeError(
                        f"feature model {self.model} gives features that are not finite: its weights are broken"
                    )
                batches.append(features)
                bar.update(len(batch))
        if not batches:
            raise RecipeError("there are no pictures to take features of: give 1 or more")
        return np.concatenate(batches)

    @torch.no_grad()
    def _features(self, images: Sequence[Image.Image]) -> np.ndarray:
        pixel_values = torch.stack([self.preprocessing(image) for image in images]).to(self.network.device)
        # Float64 on the host: Apple's GPUs lack it.
        return self.network(pixel_values=pixel_values)[self.output].cpu().double().numpy()


@contextmanager
def one_line_of(words: str) -> Iterator[None]:
    """Raise RecipeError with these words for any error: transformers has no common base for what a bad model raises."""
    try:
        yield
    except Exception as error:
        raise RecipeError(f"{words} ({one_line(error)})") from error


def batched(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    """Lists of `size` pictures; the last may be shorter."""
    remaining = iter(pictures)
    while batch := list(islice(remaining, size)):
        yield batch


def as_rgb(picture: Picture, number: int) -> Image.Image:
    """A picture with 8 bits per channel as an RGB image. Raises RecipeError."""
    if isinstance(picture, Tensor):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            raise RecipeError(
                f"picture {number} is a tensor {tuple(picture.shape)} of {picture.dtype}: give uint8 (3, H, W)"
            )
        picture = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
    if not isinstance(picture, Image.Image):
        raise RecipeError(f"picture {number} is a {type(picture).__name__}: give a PIL image or a tensor (3, H, W)")
    if picture.mode.startswith(("I", "F")):
        raise RecipeError(f"picture {number} has the mode {picture.mode}: give one with 8 bits per channel")
    if 0 in picture.size:
        raise RecipeError(f"picture {number} has no pixels: leave it out")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
