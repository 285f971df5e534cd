"""Speed and peak memory of train_text_to_image.py and of diffusers' script, side by side.

    python benchmarks/vs_diffusers.py --peer_script path/to/diffusers/examples/text_to_image/train_text_to_image.py
    python benchmarks/vs_diffusers.py ... --epochs 3 --our_flags "--cache_latents memory --center_crop"
    python benchmarks/vs_diffusers.py ... --shape emoji

Both get the same model (generated, with random weights, or the embedded base), the same pictures and the same command
line, in turn, several times. Steady speed is read from the TensorBoard files that both write: from a step after the
warm-up to the last one, at both of which both wait for the device; with --epochs from the first step on, so that all
epochs count. Beside it stand the whole process's wall time and processor time, from the command to its end. The peer's
path is an argument: its code is not part of this repository.
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
import time
from dataclasses import dataclass
from pathlib import Path

from make_model import SHAPES, build

HERE = Path(__file__).parent
OURS = HERE.parent / "train_text_to_image.py"


@dataclass
class Measured:
    """One run of a script."""

    images_per_second: float  # after the warm-up
    seconds: float  # from the command to the end of its process
    cpu_seconds: float
    peak: int  # bytes


# What is compared, in words, and how much faster ours is.
RATIOS = {
    "images/s": lambda ours, peer: ours.images_per_second / peer.images_per_second,
    "whole process": lambda ours, peer: peer.seconds / ours.seconds,
    "its processor time": lambda ours, peer: peer.cpu_seconds / ours.cpu_seconds,
}


def command_line(args: argparse.Namespace, work: Path, output_dir: Path) -> list[str]:
    """The flags that both scripts get."""
    *_, resolution, batch, steps, _ = SHAPES[args.shape]
    length = ["--num_train_epochs", args.epochs] if args.epochs else ["--max_train_steps", args.steps or steps]
    flags = [
        "--pretrained_model_name_or_path", work / "model", "--train_data_dir", work / "pictures",
        "--cache_dir", work / "cache", "--resolution", args.resolution or resolution, "--random_flip",
        "--train_batch_size", args.batch or batch, *length,
        "--checkpointing_steps", 1_000_000, "--learning_rate", "1e-5", "--lr_warmup_steps", 0,
        "--seed", 0, "--output_dir", output_dir, "--mixed_precision", args.mixed_precision,
    ]  # fmt: skip
    return [str(flag) for flag in flags] + args.flags.split()


def run_one(script: Path, flags: list[str], device: str, batch: int, warm_up: int) -> Measured:
    """Run a script in a process of its own."""
    output_dir = Path(flags[flags.index("--output_dir") + 1])
    report = Path(f"{output_dir}.peak")
    environment = {**os.environ, "PEAK_FILE": str(report), "ACCELERATE_USE_CPU": "1" if device == "cpu" else "0"}
    shutil.rmtree(output_dir, ignore_errors=True)
    begin, cpu_before = time.perf_counter(), os.times()
    done = subprocess.run(
        [sys.executable, HERE / "measured_run.py", script, *flags], env=environment, capture_output=True, text=True
    )
    seconds, cpu_after = time.perf_counter() - begin, os.times()
    if done.returncode:
        sys.exit(f"error: {script} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    measured = Measured(
        images_per_second(output_dir, batch, warm_up),
        seconds,
        sum(cpu_after[2:4]) - sum(cpu_before[2:4]),  # of its children
        json.loads(report.read_text()),
    )
    shutil.rmtree(output_dir)
    return measured


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
    parser.add_argument("--epochs", type=int, help="whole epochs instead of --steps, counted from the first step")
    parser.add_argument("--device", default="auto", help="cpu keeps both off a GPU")
    parser.add_argument("--flags", default="", help="further flags for both scripts, in one string")
    parser.add_argument("--our_flags", default="", help="further flags for ours only, in one string")
    parser.add_argument("--work_dir", type=Path, help="keep the generated model here for further calls")
    args = parser.parse_args()
    if not args.peer_script.is_file():
        sys.exit(f"error: --peer_script {args.peer_script}: no such file")

    *_, batch, steps, warm_up = SHAPES[args.shape]
    batch, steps = args.batch or batch, args.steps or steps
    warm_up = 1 if args.epochs else warm_up
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work_dir or Path(temporary)) / args.shape
        if not (work / "model").exists():
            build(args.shape, work, args.resolution)
        logging = ["--logging_steps", str(warm_up)]  # so that a logged step ends the warm-up
        pairs = []
        length = f"{args.epochs} epochs" if args.epochs else f"{steps} steps"
        print(f"{args.shape}, batch {batch}, {args.mixed_precision}, {length}; {machine()}")
        print("| run | images/s, ours and diffusers' | whole process, s | its processor time, s | peak, GiB | ratios |")
        print("|---|---|---|---|---|---|")
        for repeat in range(args.repeats):
            row = {}
            for name, script, extra in (
                ("ours", OURS, [*logging, *args.our_flags.split()]),
                ("diffusers", args.peer_script, []),
            ):
                flags = command_line(args, work, work / f"{name}-{repeat}") + extra
                row[name] = run_one(script, flags, args.device, batch, warm_up)
            ours, peer = row["ours"], row["diffusers"]
            pairs.append({what: ratio(ours, peer) for what, ratio in RATIOS.items()})
            print(
                f"| {repeat + 1} | {ours.images_per_second:.2f}, {peer.images_per_second:.2f} "
                f"| {ours.seconds:.1f}, {peer.seconds:.1f} | {ours.cpu_seconds:.1f}, {peer.cpu_seconds:.1f} "
                f"| {ours.peak / 2**30:.2f}, {peer.peak / 2**30:.2f} "
                f"| {', '.join(f'{ratio:.3f}' for ratio in pairs[-1].values())} |",
                flush=True,
            )
    for what in RATIOS:
        ratios = sorted(pair[what] for pair in pairs)
        print(f"{what}: ours is {statistics.median(ratios):.3f} times as fast ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
