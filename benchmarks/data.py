"""Speed of data: our loader against diffusers' transform, cached epochs against the first, the start of a run.

    python benchmarks/data.py loader --workers 2
    python benchmarks/data.py epochs
    python benchmarks/data.py start
    python benchmarks/data.py inspect

The transform of diffusers' script is written out here on Pillow, as torchvision computes it, with the
same `datasets`, DataLoader and collation: what is compared is the path from file to batch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from watched import run_watched

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
SCRIPT = HERE.parent / "train_text_to_image.py"


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth shapes with grain: it compresses like a photograph, to 0.38 bytes a pixel at quality 92."""
    coarse = rng.integers(0, 256, (height // 96 + 2, width // 96 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.normal(0, 8, (height, width, 1)).astype(np.int16)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def build_folder(folder: Path, number: int, width: int, height: int, distinct: int = 16) -> Path:
    """An imagefolder of `number` JPEGs; beyond `distinct` pictures, files are copies of each other."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    first = []
    with (folder / "metadata.jsonl").open("w") as metadata:
        for count in range(number):
            name = f"{count:06d}.jpg"
            if count < distinct:
                photograph(rng, width, height).save(folder / name, quality=92)
                first.append((folder / name).read_bytes())
            else:
                (folder / name).write_bytes(first[count % distinct])
            metadata.write(json.dumps({"file_name": name, "text": f"a photograph, number {count}"}) + "\n")
    return folder


def machine() -> str:
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, Pillow {Image.__version__}"


# ------------------------------------------------------------------------------------------- loader


def diffusers_loader(folder: Path, tokenizer, resolution: int, batch: int, workers: int):
    """The loader of diffusers' script: preprocess_train, collate_fn and DataLoader as it has them."""
    rows = datasets.load_dataset("imagefolder", data_files={"train": f"{folder}/**"})["train"]

    def transform(image: Image.Image) -> torch.Tensor:
        scale = resolution / min(image.size)
        image = image.resize([max(resolution, int(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
        left, top = (random.randint(0, side - resolution) for side in image.size)
        image = image.crop((left, top, left + resolution, top + resolution))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return (pixels - 0.5) / 0.5

    def preprocess(examples):
        examples["pixel_values"] = [transform(image.convert("RGB")) for image in examples["image"]]
        examples["input_ids"] = tokenizer(
            list(examples["text"]),
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return examples

    def collate(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {
            "pixel_values": pixel_values.to(memory_format=torch.contiguous_format).float(),
            "input_ids": torch.stack([example["input_ids"] for example in examples]),
        }

    return torch.utils.data.DataLoader(
        rows.with_transform(preprocess), shuffle=True, collate_fn=collate, batch_size=batch, num_workers=workers
    )


def our_loader(folder: Path, tokenizer, resolution: int, batch: int, workers: int):
    """The loader of train_text_to_image.py, draws of noise included."""
    from functools import partial
    from itertools import chain

    from sd_recipes.data.batches import BatchBuilder, TrainingBatches
    from sd_recipes.data.captions import tokenize
    from sd_recipes.data.order import Order, plans_of_order
    from sd_recipes.data.rows import load_rows
    from sd_recipes.recipe import Recipe

    recipe = Recipe(
        pretrained_model_name_or_path="-", train_data_dir=str(folder), resolution=resolution, random_flip=True
    )
    rows = load_rows(recipe)
    order = Order((len(rows),), batch, seed=0, sizes=((resolution, resolution),))
    builder = BatchBuilder(
        rows, recipe, seed=0, tokenize=partial(tokenize, tokenizer), latent_shape=_latent_shape,
        num_train_timesteps=1000,
    )  # fmt: skip
    plans = partial(plans_of_order, order, rank=0, world_size=1, micro_batch_size=batch)
    steps = TrainingBatches(builder, plans, num_workers=workers, pin_memory=False)(0, order.num_steps(1))
    return chain.from_iterable(steps)


def _latent_shape(size: tuple[int, int]) -> tuple[int, int, int]:
    return 4, size[0] // 8, size[1] // 8


def rows_per_second(batches, number: int) -> float:
    """From the first batch on, so that starting the workers does not count."""
    iterator = iter(batches)
    first = next(iterator)
    rows_before = len(first["input_ids"] if isinstance(first, dict) else first.input_ids)
    started = time.perf_counter()
    for _ in iterator:
        pass
    return (number - rows_before) / (time.perf_counter() - started)


def measure_loader(args: argparse.Namespace) -> None:
    from transformers import CLIPTokenizer

    from sd_recipes import assets

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    tokenizer = CLIPTokenizer.from_pretrained(assets.resolve("sd-recipes/tiny-emoji"), subfolder="tokenizer")
    print(f"loader, {args.workers} workers, batches of 8, to {args.resolution}²; {machine()}")
    with tempfile.TemporaryDirectory() as work:
        for name, width, height, number in (("12 megapixels", 4096, 3072, 96), ("1 megapixel", 1155, 866, 480)):
            folder = build_folder(Path(work, name.replace(" ", "-")), number, width, height)
            ratios = []
            for _ in range(args.repeats):
                loaders = (our_loader, diffusers_loader)
                ours, peer = (
                    rows_per_second(loader(folder, tokenizer, args.resolution, 8, args.workers), number)
                    for loader in loaders
                )
                ratios.append(ours / peer)
                print(
                    f"  {name}: ours {ours:.1f} rows/s, diffusers' {peer:.1f} rows/s, ratio {ours / peer:.2f}",
                    flush=True,
                )
            print(f"  {name}: median ratio {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


# ------------------------------------------------------------------------------------------- epochs


def run_script(flags: list[object]) -> tuple[list[dict], float]:
    """Train in a process of its own; returns the lines of its metrics, and the time of day when it was started."""
    output_dir = Path(str(flags[flags.index("--output_dir") + 1]))
    started = time.time()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, flags)], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"error: the script failed with {done.returncode}:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()], started


def measure_epochs(args: argparse.Namespace) -> None:
    from make_model import build

    print(f"first and cached epochs at quarter width, 256², batch 4; {machine()}")
    with tempfile.TemporaryDirectory() as work:
        build("quarter", Path(work), None)
        folder = build_folder(Path(work, "photographs"), 16, 1155, 866)
        ratios = []
        for repeat in range(args.repeats):
            output_dir = Path(work, f"run-{repeat}")
            lines, _ = run_script([
                "--pretrained_model_name_or_path", Path(work, "model"), "--train_data_dir", folder,
                "--resolution", 256, "--center_crop", "--train_batch_size", 4, "--num_train_epochs", 4,
                "--cache_latents", "disk", "--logging_steps", 1, "--output_dir", output_dir, "--report_to", "none",
                "--checkpointing_steps", 10**6, "--seed", 0,
            ])  # fmt: skip
            speed = {line["step"]: line["images_per_second"] for line in lines if "images_per_second" in line}
            live = statistics.median(speed[step] for step in (2, 3, 4))
            cached = statistics.median(speed[step] for step in range(6, 17))
            ratios.append(cached / live)
            print(
                f"  {repeat + 1}: first {live:.2f} images/s, cached {cached:.2f}, ratio {cached / live:.2f}", flush=True
            )
        print(f"  median ratio {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
        cached_row_time(Path(work), folder)


def cached_row_time(work: Path, folder: Path) -> None:
    """Milliseconds in the loader for a cached row, at 512²: 64 x 64 latents."""
    from sd_recipes.data.latent_store import FORMAT, LatentStore, moments_of, row_key
    from sd_recipes.data.rows import load_rows
    from sd_recipes.recipe import Recipe

    rows = load_rows(Recipe(pretrained_model_name_or_path="-", train_data_dir=str(folder)))
    made = {"format": FORMAT, "dtype": "fp16", "flips": False}
    cache = LatentStore(work / "rows", made, 0)
    encoded = [row["image"] for row in rows]
    sizes = {"height": 512, "width": 512, "original_height": 866, "original_width": 1155}
    cache.put(
        [{"key": row_key(each), **sizes, "text": "a photograph"} for each in encoded],
        torch.randn(len(encoded), 8, 64, 64), None,
    )  # fmt: skip
    cache.flush()
    reader = LatentStore(work / "rows", made, 0)
    times = []
    for _ in range(20):
        for each in encoded:
            started = time.perf_counter()
            found = reader.find(row_key(each))
            moments_of(found, flip=False, latent_shape=(4, 64, 64))
            times.append(1000 * (time.perf_counter() - started))
    print(f"  a cached row of 64 x 64 latents: median {statistics.median(times):.3f} ms, longest {max(times):.3f} ms")


# -------------------------------------------------------------------------------------------- start


def measure_start(args: argparse.Namespace) -> None:
    from make_model import build

    print(f"time from the command to the first optimizer step; {machine()}")
    with tempfile.TemporaryDirectory() as work:
        build("tiny", Path(work), None)
        for number in (100, 100_000):
            folder = build_folder(Path(work, f"rows-{number}"), number, 96, 64)
            for repeat in range(args.repeats):
                output_dir = Path(work, f"run-{number}-{repeat}")
                lines, started = run_script([
                    "--pretrained_model_name_or_path", Path(work, "model"), "--train_data_dir", folder,
                    "--resolution", 64, "--train_batch_size", 4, "--max_train_steps", 1, "--logging_steps", 1,
                    "--output_dir", output_dir, "--report_to", "none", "--seed", 0,
                ])  # fmt: skip
                assert [line["step"] for line in lines] == [1]
                first = (output_dir / "metrics.jsonl").stat().st_mtime  # when that one line was written
                print(f"  {number:,} rows, run {repeat + 1}: {first - started:.1f} s", flush=True)


# ------------------------------------------------------------------------------------------ inspect


def measure_inspect(args: argparse.Namespace) -> None:
    print(f"sd-recipes inspect; {machine()}")
    with tempfile.TemporaryDirectory() as work:
        times = {number: [] for number in (2_000, 10_000)}
        for number, taken in times.items():
            folder = build_folder(Path(work, f"photographs-{number}"), number, 512, 512, distinct=64)
            for _ in range(args.repeats):
                seconds, peak = inspect(["--train_data_dir", folder, "--output_dir", Path(work, "a")])
                taken.append(seconds)
                print(
                    f"  {number:,} JPEGs of 512²: {number / seconds:.0f} images/s in all, peak {peak / 2**20:.0f} MiB",
                    flush=True,
                )
        if args.repeats:
            fewer, more = map(statistics.median, times.values())
            print(f"  without the start, from the difference of the medians: {8_000 / (more - fewer):.0f} images/s")
        for number in args.rows:
            path = Path(args.parquet or Path(work, f"{number}.parquet"))
            if not path.is_file():
                small_rows(path, number)
            flags = ["--cache_dir", Path(work, f"cache-{number}"), "--output_dir", Path(work, f"b-{number}")]
            seconds, peak = inspect(["--dataset_name", path, *flags])
            print(f"  {number:,} small rows: {number / seconds:.0f} rows/s, peak {peak / 2**20:.0f} MiB", flush=True)


def small_rows(path: Path, number: int) -> Path:
    """A parquet file of many small, all different JPEGs."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    schema = features.arrow_schema
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, number, 5000):
            rows = []
            for count in range(start, min(start + 5000, number)):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "JPEG")
                rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "text": f"picture {count}"})
            table = pa.table(
                {"image": pa.array([row["image"] for row in rows], image), "text": [row["text"] for row in rows]}
            )
            writer.write_table(table.cast(schema))
    return path


def inspect(flags: list[object]) -> tuple[float, int]:
    """Seconds of one inspection, and the most memory that its processes held together, without mapped files."""
    command = [sys.executable, "-m", "sd_recipes.commands.cli", "inspect", "--resolution", "512", *map(str, flags)]
    done = run_watched(command, good=(0, 1))
    return done.seconds, done.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (
        ("loader", measure_loader), ("epochs", measure_epochs), ("start", measure_start), ("inspect", measure_inspect),
    ):  # fmt: skip
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--repeats", type=int, default=3)
    commands.choices["loader"].add_argument("--workers", type=int, default=2)
    commands.choices["loader"].add_argument("--resolution", type=int, default=512)
    commands.choices["inspect"].add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    commands.choices["inspect"].add_argument("--parquet", help="small rows that an earlier call made")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
