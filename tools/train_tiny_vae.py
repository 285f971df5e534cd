"""Train the VAE of the embedded base: 64x64 pictures to 8x8x4 latents and back.

    python tools/train_tiny_vae.py --dataset_dir sd_recipes/assets/emoji \
        --output_dir build/tiny_vae --num_steps 5000

The loss is an evidence lower bound (Kingma & Welling 2013, eq. 3) with a Laplace likelihood, whose
scale is set by `--kl_weight`, on the pixels and on their differences to their neighbours: without the
second term outlines come out soft. At the end the latents' standard deviation is measured and
written as the scaling factor (Rombach et al. 2021, appendix G), so that a UNet sees unit variance.
`--decoder_only` freezes the encoder, and with it the latents that a UNet was trained on.
"""

import argparse
import io
import json
import math
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 128],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
}


def load_pixels(dataset_dir: Path) -> torch.Tensor:
    """All pictures of all splits on white, as uint8 (N, 3, H, W)."""
    pictures = []
    for path in sorted(dataset_dir.glob("data/*.parquet")):
        split = datasets.Dataset.from_parquet(str(path)).cast_column("image", datasets.Image(decode=False))
        for row in split:
            picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGBA")
            background = Image.new("RGBA", picture.size, "white")
            flat = Image.alpha_composite(background, picture).convert("RGB")
            pictures.append(np.asarray(flat).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(pictures))


def reconstruction_error(pixel_values: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of (B, 3, H, W) pixels, plus that of horizontal and vertical differences."""
    error = (reconstruction - pixel_values).abs().mean()
    for axis in (2, 3):
        error = error + 0.5 * (reconstruction.diff(dim=axis) - pixel_values.diff(dim=axis)).abs().mean()
    return error


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[float, float]:
    """Standard deviation of sampled latents, and mean absolute reconstruction error in pixel values 0-255."""
    generator = torch.Generator().manual_seed(0)
    latents, errors = [], []
    for batch in pixels.split(64):
        pixel_values = batch.float() / 127.5 - 1
        posterior = vae.encode(pixel_values).latent_dist
        latents.append(posterior.sample(generator))
        reconstruction = vae.decode(posterior.mean).sample.clamp(-1, 1)
        errors.append((reconstruction - pixel_values).abs().mean(dim=(1, 2, 3)) * 127.5)
    return torch.cat(latents).std().item(), torch.cat(errors).mean().item()


@torch.no_grad()
def save_reconstructions(vae: AutoencoderKL, pixels: torch.Tensor, path: Path) -> None:
    """Rows of 16 pictures, each row followed by its reconstructions."""
    chosen = pixels[torch.linspace(0, len(pixels) - 1, 64).long()]
    pixel_values = chosen.float() / 127.5 - 1
    decoded = vae.decode(vae.encode(pixel_values).latent_dist.mode()).sample
    decoded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte()
    rows = []
    for original, reconstruction in zip(chosen.split(16), decoded.split(16), strict=True):
        rows += [torch.cat(list(original), dim=2), torch.cat(list(reconstruction), dim=2)]
    sheet = torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
    Image.fromarray(sheet).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--initial_vae", type=Path, help="continue from this VAE")
    parser.add_argument("--decoder_only", action="store_true", help="keep the latents, improve the decoder")
    parser.add_argument("--num_steps", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--kl_weight", type=float, default=5e-4, help="on the mean KL of a latent value, in nats")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    pixels = load_pixels(args.dataset_dir)
    vae = AutoencoderKL.from_pretrained(args.initial_vae) if args.initial_vae else AutoencoderKL.from_config(CONFIG)
    vae.to(memory_format=torch.channels_last)
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trainable = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    print(f"{sum(p.numel() for p in trainable) / 1e6:.2f} M trainable parameters, {len(pixels)} pictures")

    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.learning_rate, total_steps=args.num_steps, pct_start=0.03
    )
    ema = EMAModel(trainable, decay=0.998, use_ema_warmup=True, power=0.9, foreach=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    progress = tqdm(range(args.num_steps), mininterval=5)
    for step in progress:
        batch = pixels[torch.randint(len(pixels), (args.batch_size,))]
        pixel_values = (batch.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(not args.decoder_only):
            posterior = vae.encode(pixel_values).latent_dist
        error = reconstruction_error(pixel_values, vae.decode(posterior.sample()).sample)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error + args.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        ema.step(trainable)
        if step % 50 == 0:
            progress.set_postfix(error=f"{error.item():.4f}", kl=f"{kl.item():.2f}")
        if step % 500 == 499:
            save_reconstructions(vae, pixels, args.output_dir / "reconstructions.png")
    ema.copy_to(trainable)

    std, error = measure_latents(vae, pixels)
    if not args.decoder_only:
        vae.register_to_config(scaling_factor=1 / std)
    assert math.isfinite(std)
    vae.save_pretrained(args.output_dir)
    save_reconstructions(vae, pixels, args.output_dir / "reconstructions.png")
    figures = {
        "num_steps": args.num_steps,
        "batch_size": args.batch_size,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "latent_std": round(std, 4),
        "mean_absolute_error_of_255": round(error, 2),
    }
    (args.output_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(figures)


if __name__ == "__main__":
    main()
