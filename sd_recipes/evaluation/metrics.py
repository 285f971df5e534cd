"""How good pictures are: the image-text score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from sd_recipes import assets
from sd_recipes.errors import RecipeError, one_line


class ImageTextScore:
    """Cosine similarity x 100 of CLIP's image and text embeddings, mean over pairs (Hessel et al. 2021, eq. 1, w=100).

    Raises RecipeError if the model cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device, cache_dir: str | None = None) -> None:
        """The model waits in the host's memory, and scores on `device`."""
        self.device = device
        folder = assets.resolve(name)
        try:
            self.model = CLIPModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, cache_dir=cache_dir
            ).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, cache_dir=cache_dir)
            self.processor = CLIPImageProcessorPil.from_pretrained(folder, cache_dir=cache_dir)
        # As for the pipeline's parts: transformers has no common base for what a bad model raises.
        except Exception as error:
            raise RecipeError(f"--validation_clip_model {name}: {one_line(error)}") from error

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> float:
        """Score of images, each with the caption at the same position."""
        pixel_values = self.processor(images=list(images), return_tensors="pt").pixel_values.to(self.device)
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).to(self.device)
        self.model.to(self.device)
        try:
            image = F.normalize(self.model.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)
            text = F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)
            return 100 * (image * text).sum(dim=-1).mean().item()
        finally:
            self.model.to("cpu")
