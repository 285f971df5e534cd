"""What a model's own VAE, tokenizer and scheduler say about a data set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm
from transformers import CLIPTokenizer

from sd_recipes.inspection.distribution import LatentDistribution
from sd_recipes.model.components import load_scheduler, load_vae
from sd_recipes.model.families import family_of
from sd_recipes.model.latents import encode_pixels, sample_latents, to_pixel_values
from sd_recipes.recipe import ModelConfig
from sd_recipes.runtime.accelerator import allow_tf32


@dataclass
class Model:
    """The parts of a pipeline that meet the data first; the UNet and the text encoder are not loaded."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    alphas_cumprod: np.ndarray  # (T,) float64, ᾱ_t for t = 1…T


def load_model(config: ModelConfig) -> Model:
    """The VAE, on the GPU if there is one, the tokenizer and the schedule. Raises RecipeError."""
    allow_tf32(False)  # the figures are those of float32
    vae = load_vae(config).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, *_ = family_of(config).load_tokenizers(config)
    return Model(vae, tokenizer, load_scheduler(config).alphas_cumprod.double().numpy())


def encode_picture(vae: AutoencoderKL, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 (3, H, W) to scaled latents (C, H/f, W/f), float64, drawn from the posterior as in training."""
    pixel_values = to_pixel_values(torch.from_numpy(pixels)[None].to(vae.device), torch.float32)
    moments = encode_pixels(vae, pixel_values)
    shape = (1, moments.shape[1] // 2, *moments.shape[2:])
    noise = torch.from_numpy(rng.standard_normal(shape)).to(moments)
    return sample_latents(vae, moments, noise)[0].double().cpu().numpy()


@torch.no_grad()
def decode_picture(vae: AutoencoderKL, latents: np.ndarray) -> np.ndarray:
    """Scaled latents (C, h, w) to uint8 (H, W, 3)."""
    z = torch.from_numpy(latents / vae.config.scaling_factor)[None].to(vae.device, torch.float32)
    pixel_values = vae.decode(z).sample[0].clamp(-1, 1)
    return ((pixel_values + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def latent_distribution(vae: AutoencoderKL, pictures: list[np.ndarray]) -> LatentDistribution:
    """Distribution of the scaled latents of `pictures`, uint8 (3, H, W) each."""
    seen, rng = LatentDistribution(), np.random.default_rng(0)
    for pixels in tqdm(pictures, desc="encoding", unit="image"):
        seen.update(encode_picture(vae, pixels, rng))
    return seen
