"""Images a second and peak memory of train_text_to_image.py and of diffusers' script, side by side.

    python benchmarks/vs_diffusers.py --peer_script path/to/diffusers/examples/text_to_image/train_text_to_image.py

Both get the same generated model (random weights), the same pictures and the same command line, in
turn, several times. Speed is read from the TensorBoard files that both write: from a step after the
warm-up to the last one, at both of which both wait for the device. The peer's path is an argument:
its code is no part of this repository.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
OURS = HERE.parent / "train_text_to_image.py"

SHAPES = {
    # UNet widths, text width, VAE widths, heads, resolution, batch, steps, warm-up steps
    "tiny": ([32, 64, 64, 64], 64, [16, 16, 32, 32], 8, 64, 4, 12, 4),
    "quarter": ([80, 160, 320, 320], 192, [32, 64, 128, 128], 8, 256, 4, 12, 4),
    "sd15": ([320, 640, 1280, 1280], 768, [128, 256, 512, 512], 8, 512, 16, 40, 10),
    "sd2": ([320, 640, 1280, 1280], 1024, [128, 256, 512, 512], [5, 10, 20, 20], 512, 16, 40, 10),
}


def build_model(shape: str, folder: Path) -> None:
    """A pipeline folder of that shape with random weights and a tokenizer of single characters."""
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
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
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
        smooth = np.asarray(Image.fromarray(coarse).resize((side * 5 // 4, side), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index}.jpg", quality=90)
        lines.append(json.dumps({"file_name": f"{index}.jpg", "text": f"picture number {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def command_line(args: argparse.Namespace, work: Path, output_dir: Path) -> list[str]:
    """The flags that both scripts get."""
    *_, resolution, batch, steps, _ = SHAPES[args.shape]
    flags = [
        "--pretrained_model_name_or_path", work / "model", "--train_data_dir", work / "pictures",
        "--cache_dir", work / "cache", "--resolution", args.resolution or resolution, "--random_flip",
        "--train_batch_size", args.batch or batch, "--max_train_steps", args.steps or steps,
        "--checkpointing_steps", 1_000_000, "--learning_rate", "1e-5", "--lr_warmup_steps", 0,
        "--seed", 0, "--output_dir", output_dir, "--mixed_precision", args.mixed_precision,
    ]  # fmt: skip
    return [str(flag) for flag in flags] + args.flags.split()


def run_one(script: Path, flags: list[str], device: str) -> tuple[float, int]:
    """Run a script in a process of its own that reports its peak memory: seconds of the process, bytes."""
    report = Path(flags[flags.index("--output_dir") + 1] + ".peak")
    environment = {**os.environ, "PEAK_FILE": str(report), "ACCELERATE_USE_CPU": "1" if device == "cpu" else "0"}
    done = subprocess.run(
        [sys.executable, HERE / "measured_run.py", script, *flags], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"error: {script} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(report.read_text())


def images_per_second(output_dir: Path, batch: int, warm_up: int) -> float:
    """From the wall-clock times of the logged losses, without the steps before `warm_up`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output_dir / "logs" / "text2image-fine-tune"))
    events.Reload()
    logged = [event for event in events.Scalars("train_loss") if event.step >= warm_up]
    first, last = logged[0], logged[-1]
    return (last.step - first.step) * batch / (last.wall_time - first.wall_time)


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer_script", "--peer-script", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="quarter")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="auto", help="cpu keeps both off a GPU")
    parser.add_argument("--flags", default="", help="further flags for both scripts, in one string")
    parser.add_argument("--our_flags", default="", help="further flags for ours only, in one string")
    parser.add_argument("--work_dir", type=Path, help="keep the generated model here for further calls")
    args = parser.parse_args()
    if not args.peer_script.is_file():
        sys.exit(f"error: --peer_script {args.peer_script}: no such file")

    *_, resolution, batch, steps, warm_up = SHAPES[args.shape]
    batch, steps = args.batch or batch, args.steps or steps
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work_dir or Path(temporary)) / args.shape
        if not (work / "model").exists():
            build_model(args.shape, work / "model")
            build_pictures(work / "pictures", max(64, 2 * batch), args.resolution or resolution)
        logging = ["--logging_steps", str(warm_up)]  # so that a logged step ends the warm-up
        pairs = []
        print(f"{args.shape}, batch {batch}, {args.mixed_precision}, {steps} steps; {machine()}")
        for repeat in range(args.repeats):
            row = {}
            for name, script, extra in (
                ("ours", OURS, [*logging, *args.our_flags.split()]),
                ("diffusers", args.peer_script, []),
            ):
                output_dir = work / f"{name}-{repeat}"
                shutil.rmtree(output_dir, ignore_errors=True)
                peak = run_one(script, command_line(args, work, output_dir) + extra, args.device)
                row[name] = images_per_second(output_dir, batch, warm_up), peak
                shutil.rmtree(output_dir)
            pairs.append(row)
            (ours, our_peak), (peer, peer_peak) = row["ours"], row["diffusers"]
            print(
                f"  {repeat + 1}: ours {ours:.2f} images/s, {our_peak / 2**30:.2f} GiB; diffusers {peer:.2f} images/s, "
                f"{peer_peak / 2**30:.2f} GiB; ratio {ours / peer:.3f}",
                flush=True,
            )
    ratios = sorted(row["ours"][0] / row["diffusers"][0] for row in pairs)
    print(f"ratio ours / diffusers: median {statistics.median(ratios):.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
