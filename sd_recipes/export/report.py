"""A run's figures and pictures at its end: the loss curve, and before and after side by side."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sd_recipes.evaluation.figures import FIGURES
from sd_recipes.evaluation.verdict import figures_by_step, judge
from sd_recipes.runtime.trackers import list_samples, read_metrics, step_of

logger = logging.getLogger(__name__)


def write_report(output_dir: Path, last_step: int | None = None) -> list[str]:
    """Write loss_curve.png, and before_after.png if step 0 was validated; returns the lines to print.

    `output_dir` is a run's folder with its metrics.jsonl and samples/; of these, the last one up to `last_step` is
    after training.
    """
    lines = read_metrics(output_dir / "metrics.jsonl")
    said = []
    figures = figures_by_step(lines)
    if "train_loss" in figures:
        draw_loss_curve(figures, output_dir / "loss_curve.png")
        said.append(f"loss curve      {output_dir / 'loss_curve.png'}")
    samples = [path for path in list_samples(output_dir) if last_step is None or step_of(path) <= last_step]
    if samples and samples[0].name == "step-000000.png" and len(samples) > 1:
        try:
            before, after = read_picture(samples[0]), read_picture(samples[-1])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # torn, or not ours
            logger.warning("No before_after.png: a picture in %s cannot be read (%s).", samples[0].parent, error)
        else:
            side_by_side(before, after, output_dir / "before_after.png")
            said.append(f"before / after  {output_dir / 'before_after.png'}")
    changes = []
    for name, label in FIGURES.items():
        values = [line[name] for line in lines if name in line]
        if len(values) > 1:
            changes.append(f"{label} {values[0]:.4g} -> {values[-1]:.4g}")
        elif values:
            changes.append(f"{label} {values[0]:.4g}")
    if changes:
        said.append("figures         " + ", ".join(changes))
    judgement = judge(figures)
    for place, sentence in enumerate(judgement.sentences if judgement.best_step else []):
        said.append(f"{'' if place else 'verdict':<16}{sentence}")
    return said


def draw_loss_curve(figures: Mapping[str, dict[int, float]], path: Path) -> None:
    """Training loss by step with its running mean; held-out loss and that of training rows, the gap, the best step."""
    from matplotlib.figure import Figure  # takes long to import, and a run begins without it

    training, held_out, training_rows = (
        figures.get(name, {}) for name in ("train_loss", "validation_loss", "train_subset_loss")
    )
    steps, losses = list(training), list(training.values())
    # Centered, over a twentieth of the run: an average over the past alone would lag behind where the loss falls fast.
    reach = max(1, len(losses) // 40)
    smooth = [float(np.mean(losses[max(0, n - reach) : n + reach + 1])) for n in range(len(losses))]
    figure = Figure(figsize=(8, 4.5), dpi=110)
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training loss")
    axes.plot(steps, smooth, color="tab:blue", label="training loss, running mean")
    if held_out:
        axes.plot(*zip(*held_out.items(), strict=True), "o-", color="tab:orange", label="held-out loss, fixed noise")
    if training_rows:
        axes.plot(*zip(*training_rows.items(), strict=True), "o-", color="tab:green", label="the same of training rows")
    if both := sorted(held_out.keys() & training_rows.keys()):
        above, below = ([side[step] for step in both] for side in (held_out, training_rows))
        axes.fill_between(both, above, below, color="tab:orange", alpha=0.15, linewidth=0, label="gap")
    best = judge(figures).best_step
    if best is not None:
        axes.axvline(best, color="black", linestyle="--", linewidth=1, label=f"best: step {best}")
    axes.set(xlabel="optimizer step", ylabel="loss")
    fixed = [*held_out.values(), *training_rows.values()]
    bottom = min(0, 1.15 * min(losses))  # with a learned uncertainty the loss may be negative
    axes.set_ylim(bottom, 1.15 * max([sorted(losses)[int(0.98 * (len(losses) - 1))], *fixed, 0]))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def read_picture(path: Path) -> Image.Image:
    with Image.open(path, formats=["PNG"]) as picture:
        return picture.copy()


def side_by_side(left: Image.Image, right: Image.Image, path: Path) -> None:
    """Two grids side by side, titled."""
    title, gap = 34, 24
    sheet = Image.new("RGB", (left.width + right.width + gap, max(left.height, right.height) + title), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=20)
    for picture, x, text in ((left, 0, "before training"), (right, left.width + gap, "after training")):
        pen.text((x + 3, 6), text, fill="black", font=font)
        sheet.paste(picture, (x, title))
    pen.line([(left.width + gap // 2, 0), (left.width + gap // 2, sheet.height)], fill="gray")
    sheet.save(path)
