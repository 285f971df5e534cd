"""Copy the trained tiny base and its CLIP into the package's assets, in float16, with a card.

    python tools/install_tiny_base.py --run runs/tiny_from_scratch --clip build/tiny_clip \
        --vae_figures build/tiny_vae/figures.json

The figures on the card are read from what the training scripts left; none is typed in.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
import yaml
from datasets import load_dataset
from diffusers import StableDiffusionPipeline

ASSETS = Path(__file__).parent.parent / "sd_recipes" / "assets"

CARD = Path(__file__).with_name("tiny_base_card.md").read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--vae_figures", type=Path, required=True)
    args = parser.parse_args()

    base = ASSETS / "tiny-emoji"
    pipeline = StableDiffusionPipeline.from_pretrained(args.run, dtype=torch.float16, safety_checker=None)
    pipeline.save_pretrained(base)
    # diffusers loads its parts in float32, and transformers in the type that the configuration names: one for all.
    text_config = base / "text_encoder" / "config.json"
    content = json.loads(text_config.read_text(encoding="utf-8"))
    text_config.write_text(json.dumps({**content, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    shutil.copy(args.run / "samples.png", base / "samples.png")
    shutil.copytree(args.clip, ASSETS / "tiny-clip", dirs_exist_ok=True)

    lines = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    recipe = yaml.safe_load((args.run / "recipe.yaml").read_text(encoding="utf-8"))
    validations = [line for line in lines if "validation_loss" in line]
    trained = [line for line in lines if "train_loss" in line]
    # Time in training steps only: each logged window has its speed.
    seconds, before = 0.0, 0
    for line in trained:
        seconds += (line["step"] - before) * recipe["train_batch_size"] / line["images_per_second"]
        before = line["step"]
    epoch_of = {line["step"]: round(line["epoch"]) for line in trained}
    first = validations[0]
    clip = json.loads((args.clip / "figures.json").read_text(encoding="utf-8"))
    card = CARD.format(
        size=sum(path.stat().st_size for path in base.rglob("*.safetensors")) / 1e6,
        vae_parameters=sum(p.numel() for p in pipeline.vae.parameters()),
        text_parameters=sum(p.numel() for p in pipeline.text_encoder.parameters()),
        unet_parameters=sum(p.numel() for p in pipeline.unet.parameters()),
        vae=json.loads(args.vae_figures.read_text(encoding="utf-8")),
        clip=clip,
        clip_top1=100 * clip["top1_of_all_names"],
        rows=len(load_dataset(str(ASSETS / "emoji"), split="train")),
        steps=trained[-1]["step"],
        batch=recipe["train_batch_size"],
        unet_minutes=f"{seconds / 60:.0f} min",
        first_loss=first["validation_loss"],
        first_epoch=epoch_of.get(first["step"], 1),
        last_loss=validations[-1]["validation_loss"],
        lowest_loss=min(line["validation_loss"] for line in validations),
    )
    (base / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
