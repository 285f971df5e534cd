"""Train the tokenizer and the small CLIP of the embedded base on all emoji and their names.

    python tools/train_tiny_clip.py --dataset_dir sd_recipes/assets/emoji \
        --output_dir build/tiny_clip --num_steps 800

Both towers are trained with the symmetric contrastive loss (Radford et al. 2021, fig. 3). The text
tower becomes the pipeline's text encoder; both together give the image-text score. A caption is the
picture's name, with a random few of its keywords half of the time; a picture is shifted, scaled and
put on a random plain background, so that the score judges what is drawn and not where.
"""

import argparse
import io
import json
import random
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

VOCAB_SIZE = 6144
MAX_LENGTH = 32  # the longest name has 12 tokens; every additional one would cost time in cross-attention
HIDDEN_SIZE = 128
IMAGE_SIZE = 64


def load_rows(dataset_dir: Path) -> list[dict]:
    rows = []
    for path in sorted(dataset_dir.glob("data/*.parquet")):
        split = datasets.Dataset.from_parquet(str(path)).cast_column("image", datasets.Image(decode=False))
        for row in split:
            picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGBA")
            rows.append({"rgba": np.asarray(picture), "text": row["text"], "keywords": row["keywords"]})
    return rows


def train_tokenizer(rows: list[dict]) -> CLIPTokenizer:
    """Byte-pair encoding in CLIP's own form: lower case, words closed by `</w>`, every byte known."""
    texts = [text for row in rows for text in [row["text"]] * 3 + row["keywords"]]
    clip = CLIPTokenizer()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = clip.backend_tokenizer.normalizer
    bpe.pre_tokenizer = clip.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special_tokens = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(alphabet),
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=special_tokens,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocab = trained["vocab"]
    for byte in alphabet:  # a word may end in any byte; the trainer adds only the endings it saw
        vocab.setdefault(byte + "</w>", len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=[tuple(merge) for merge in trained["merges"]], model_max_length=MAX_LENGTH)


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    tower = {"hidden_size": HIDDEN_SIZE, "intermediate_size": 4 * HIDDEN_SIZE, "num_attention_heads": 4}
    text = {
        **tower,
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": HIDDEN_SIZE,
    }
    vision = {
        **tower,
        "num_hidden_layers": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 16,
        "projection_dim": HIDDEN_SIZE,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=HIDDEN_SIZE))


def view(rgba: np.ndarray, rng: random.Random) -> np.ndarray:
    """A shifted, scaled (64, 64, 4) picture on white, or on a random pale colour: (64, 64, 3) in 0-255."""
    picture = Image.fromarray(rgba)
    size = rng.randint(48, IMAGE_SIZE)
    picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    colour = (255, 255, 255) if rng.random() < 0.5 else tuple(rng.randint(160, 255) for _ in range(3))
    canvas = Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE), (*colour, 255))
    canvas.alpha_composite(picture, (rng.randint(0, IMAGE_SIZE - size), rng.randint(0, IMAGE_SIZE - size)))
    return np.asarray(canvas.convert("RGB"))


def caption(row: dict, rng: random.Random) -> str:
    if rng.random() < 0.5 or not row["keywords"]:
        return row["text"]
    keywords = rng.sample(row["keywords"], min(len(row["keywords"]), rng.randint(1, 4)))
    return ", ".join([row["text"], *keywords])


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer: CLIPTokenizer, rows: list[dict]) -> float:
    """Share of pictures whose own name is the best of all names."""
    model.eval()
    rng = random.Random(0)
    plain = [{**row, "keywords": []} for row in rows]
    hits = 0
    texts = tokenizer(
        [row["text"] for row in plain], padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    )
    text = F.normalize(model.get_text_features(**texts).pooler_output, dim=-1)
    for start in range(0, len(plain), 256):
        pixels = np.stack([view(row["rgba"], rng) for row in plain[start : start + 256]])
        image = F.normalize(model.get_image_features(pixel_values=to_tensor(pixels)).pooler_output, dim=-1)
        hits += (image @ text.T).argmax(dim=1).eq(torch.arange(start, start + len(pixels))).sum().item()
    return hits / len(rows)


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) in -1..1, as the saved image processor does."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_steps", type=int, default=800)
    parser.add_argument("--batch_size", type=int, default=192)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    rows = load_rows(args.dataset_dir)
    tokenizer = train_tokenizer(rows)
    model = new_clip(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(rows)} pictures")

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.num_steps, pct_start=0.1)
    started = time.monotonic()
    progress = tqdm(range(args.num_steps), mininterval=5)
    for step in progress:
        chosen = rng.sample(rows, args.batch_size)
        texts = tokenizer(
            [caption(row, rng) for row in chosen],
            padding=True,
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        )
        pixels = np.stack([view(row["rgba"], rng) for row in chosen])
        loss = model(pixel_values=to_tensor(pixels), **texts, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")

    figures = {
        "num_steps": args.num_steps,
        "batch_size": args.batch_size,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "top1_of_all_names": round(retrieval(model, tokenizer, rows), 4),
    }
    model.half().save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(args.output_dir)
    (args.output_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(figures)


if __name__ == "__main__":
    main()
