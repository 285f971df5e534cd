"""Generate a model with random weights, and pictures, for the benchmarks; `emoji` takes both from the package.

python benchmarks/make_model.py --shape sd15 --work_dir /tmp/benchmark
"""

import argparse
import io
import json
import shutil
from pathlib import Path

import numpy as np
from make_xl_model import XL_SHAPES, build_xl_model
from PIL import Image

SHAPES = {
    # UNet widths, text width, VAE widths, heads, resolution, batch, steps, warm-up steps
    # In float32 only: its norms are of single values, and in bf16 on a CPU its gradients are infinite now and then.
    "micro": ([16, 16, 16, 16], 64, [16, 16, 16, 16], 2, 32, 4, 12, 4),
    "tiny": ([32, 64, 64, 64], 64, [16, 16, 32, 32], 8, 64, 4, 12, 4),
    "quarter": ([80, 160, 320, 320], 192, [32, 64, 128, 128], 8, 256, 4, 12, 4),
    "emoji": (None, None, None, None, 64, 32, 200, 20),  # the embedded base and its pictures
    "sd15": ([320, 640, 1280, 1280], 768, [128, 256, 512, 512], 8, 512, 16, 40, 10),
    "sd2": ([320, 640, 1280, 1280], 1024, [128, 256, 512, 512], [5, 10, 20, 20], 512, 16, 40, 10),
}


def build_model(shape: str, folder: Path) -> None:
    """A pipeline folder of that shape: random weights and a tokenizer of single characters, or the embedded base."""
    if shape == "emoji":
        from sd_recipes.assets import resolve

        shutil.copytree(resolve("sd-recipes/tiny-emoji"), folder, dirs_exist_ok=True)
        return
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    widths, text_width, vae_widths, heads, *_ = SHAPES[shape]
    torch.manual_seed(0)
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocab = ["<|startoftext|>", "<|endoftext|>", *characters, *(character + "</w>" for character in characters)]
    tokenizer = CLIPTokenizer(vocab={token: n for n, token in enumerate(vocab)}, merges=[], model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=23 if shape == "sd2" else 12,
        num_attention_heads=text_width // 64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=vae_widths,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=16,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=64,
            block_out_channels=widths,
            cross_attention_dim=text_width,
            attention_head_dim=heads,
            use_linear_projection=shape == "sd2",
            norm_num_groups=16,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def build_pictures(folder: Path, number: int, side: int) -> None:
    """JPEGs with smooth structure and some noise, a little larger than the training resolution."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for index in range(number):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        smooth = np.asarray(
            Image.fromarray(coarse).resize((side * 5 // 4, side), Image.Resampling.BICUBIC), dtype=np.int16
        )
        noisy = (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index}.jpg", quality=90)
        lines.append(json.dumps({"file_name": f"{index}.jpg", "text": f"picture number {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def copy_emoji(folder: Path, split: str = "train") -> None:
    """The embedded base, and the emoji of a split with captions, as diffusers' script reads them: it knows no alpha."""
    import pyarrow.parquet

    from sd_recipes.assets import resolve

    build_model("emoji", folder / "model")
    (folder / "pictures").mkdir()
    lines = []
    for path in sorted(Path(resolve("sd-recipes/emoji")).glob(f"data/{split}-*.parquet")):
        for row in pyarrow.parquet.read_table(path).to_pylist():
            name = f"{len(lines):04d}.png"
            picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            Image.alpha_composite(white, picture).convert("RGB").save(folder / "pictures" / name)
            lines.append(json.dumps({"file_name": name, "text": row["text"]}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def build(shape: str, folder: Path, resolution: int | None = None) -> None:
    """Write folder/model and folder/pictures."""
    if shape == "emoji":
        copy_emoji(folder)
        return
    if shape in XL_SHAPES:
        build_xl_model(shape, folder / "model")
        build_pictures(folder / "pictures", 64, resolution or 1024)
        return
    *_, usual_resolution, batch, _, _ = SHAPES[shape]
    build_model(shape, folder / "model")
    build_pictures(folder / "pictures", max(64, 16 * batch), resolution or usual_resolution)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, *XL_SHAPES], required=True)
    parser.add_argument("--work_dir", type=Path, required=True)
    arguments = parser.parse_args()
    build(arguments.shape, arguments.work_dir / arguments.shape)
