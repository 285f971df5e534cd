"""Images per second and peak memory of train_text_to_image.py and of diffusers' script, side by side.

    python benchmarks/vs_diffusers.py --peer_script path/to/diffusers/examples/text_to_image/train_text_to_image.py

Both get the same generated model (random weights), the same pictures and the same command line, in
turn, several times. Speed is read from the TensorBoard files that both write: from a step after the
warm-up to the last one, at both of which both wait for the device. The peer's path is an argument:
its code is not part of this repository.
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

from make_model import SHAPES, build

HERE = Path(__file__).parent
OURS = HERE.parent / "train_text_to_image.py"


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


def run_one(script: Path, flags: list[str], device: str) -> int:
    """Run a script in a process of its own; returns its peak memory in bytes."""
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

    *_, batch, steps, warm_up = SHAPES[args.shape]
    batch, steps = args.batch or batch, args.steps or steps
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work_dir or Path(temporary)) / args.shape
        if not (work / "model").exists():
            build(args.shape, work, args.resolution)
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
