"""The page of a run, report.html: whether it learns, whether it over-fits, when it was best, and from what."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sd_recipes.checkpoints.format import list_checkpoints
from sd_recipes.checkpoints.format import step_of as checkpoint_step
from sd_recipes.errors import RecipeError
from sd_recipes.evaluation.verdict import MARGIN, Judgement, figures_by_step, judge, percent
from sd_recipes.export.bit_pages import bits_of_run
from sd_recipes.export.pages import ENVIRONMENT, render_page
from sd_recipes.export.run_figures import curves, grids
from sd_recipes.export.run_rows import rankings
from sd_recipes.flags import MAX_RECIPE_BYTES, read_recipe_file
from sd_recipes.reading import read_text
from sd_recipes.recipe import Recipe
from sd_recipes.redaction import redacted
from sd_recipes.runtime.starts import read_starts
from sd_recipes.runtime.trackers import read_incidents, read_metrics
from sd_recipes.writing import replace_file

PAGE = "report.html"
INCIDENTS = 20  # shown
STARTS_SHOWN = 12


def write_run_page(output_dir: Path) -> Path:
    """Write report.html from what is in a run's folder; returns its path.

    A function of the folder alone. What is missing, torn or broken is left out. A kill leaves the old page or the new
    one. Raises OSError if it cannot be written, and RecipeError if metrics.jsonl is not a regular file.
    """
    lines = read_metrics(output_dir / "metrics.jsonl")
    figures = figures_by_step(lines)
    judgement = judge(figures)
    last_step = max((line["step"] for line in lines), default=0)
    settings = _settings(output_dir / "recipe.yaml")
    script = Markup(ENVIRONMENT.get_template("run/slider.js").render())
    page = render_page(
        "run/page.html",
        title=output_dir.resolve().name,
        progress=_progress(lines, last_step, settings),
        script=script,
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **_verdict(judgement),
        **curves(figures, last_step, judgement.best_step),
        **grids(output_dir),
        bits=bits_of_run(output_dir),
        rankings=rankings(output_dir),
        **_incidents(output_dir / "incidents.jsonl"),
        **_history(output_dir),
        **_recipe(output_dir / "recipe.yaml", settings),
    )
    path = output_dir / PAGE
    replace_file(path, redacted(page))  # captions and names come from anywhere
    return path


def _progress(lines: Sequence[Mapping[str, Any]], last_step: int, settings: Mapping[str, Any] | None) -> str:
    """Where the run stands, in words."""
    if not lines:
        return "Nothing has been logged yet."
    total = (settings or {}).get("max_train_steps")
    words = f"Step {last_step:,}" + (f" of {total:,}" if isinstance(total, int) else "")
    last = {name: value for line in lines for name, value in line.items()}
    if "epoch" in last:
        words += f", epoch {last['epoch']:.4g}"
    if last.get("bad_rows"):
        words += f", {last['bad_rows']:,.0f} rows that could not be used"
    return f"{words}."


def _verdict(judgement: Judgement) -> dict[str, Any]:
    """The answers to the three questions, each with a detail and a colour, and the verdict in sentences."""
    learning, overfitting, best = judgement.learning, judgement.overfitting, judgement.best_step
    fell = f"{percent(judgement.to_best)} lower" if judgement.to_best else "lower"
    since_best = judgement.since_best or 0.0
    worse = percent(since_best) if since_best > MARGIN else None
    details = {
        "yes": f"held-out loss {fell}",
        "no": "held-out loss was never below its first",
        "unknown": "needs two held-out losses",
    }
    tiles = [_tile("Is it learning?", learning, details[learning], "good", "poor")]
    details = {
        "yes": f"since step {best}" if learning == "yes" else "from the start",
        "no": "held-out loss is at its best",
        "unknown": "needs the losses of held-out and of training rows",
    }
    if learning == "no":
        details["no"] = "held-out loss does not rise while that of training rows falls"
    elif worse:
        details["no"] = f"held-out loss is {worse} off its best, and training rows lost too"
    tiles.append(_tile("Is it over-fitting?", overfitting, details[overfitting], "warning", "good"))
    if best is None:
        detail = "needs a held-out loss after step 0"
    elif learning == "no":
        detail = "and no better than at first"
    elif best == judgement.last_step:
        detail = "the last validation"
    else:
        detail = f"the last validation is {f'{worse} worse' if worse else 'as good'}"
    answer = "Unknown" if best is None else f"Step {best:,}"
    tiles.append({"question": "When was it best?", "answer": answer, "detail": detail, "style": "unknown"})
    style = "poor" if learning == "no" else "warning" if overfitting == "yes" else tiles[0]["style"]
    headline = {"yes": "learning", "no": "not learning", "unknown": "learning not measured"}[learning]
    if overfitting == "yes":
        headline += ", over-fitting"
    return {"tiles": tiles, "style": style, "headline": headline, "sentences": judgement.sentences}


def _tile(question: str, answer: str, detail: str, if_yes: str, if_no: str) -> dict[str, str]:
    style = {"yes": if_yes, "no": if_no, "unknown": "unknown"}[answer]
    return {"question": question, "answer": answer.capitalize(), "detail": detail, "style": style}


def _history(output_dir: Path) -> dict[str, Any]:
    """What the run was started on, how often it was resumed, and its checkpoints."""
    starts = read_starts(output_dir)
    if not starts:
        started = "What it was started on was not recorded."
    else:
        begun = f"Begun from a checkpoint of step {starts[0].step:,}" if starts[0].step else "Started once"
        started = f"{begun}, and never resumed."
        if resumed := [f"{start.step:,}" for start in starts[1:]]:
            often = "once" if len(resumed) == 1 else f"{len(resumed)} times"
            steps = ", ".join(resumed[-12:])
            started = f"{begun} and resumed {often}, from step {steps}{' at last' if len(resumed) > 12 else ''}."
    rows = [
        (
            start.time.removesuffix("+00:00").replace("T", " "),
            start.step,
            start.device,
            start.processes,
            start.cpus,
            start.precision,
            ", ".join(f"{name} {version}" for name, version in start.versions.items()),
        )
        for start in starts[-STARTS_SHOWN:]
    ]
    saved = [f"{checkpoint_step(path):,}" for path in list_checkpoints(output_dir)]
    checkpoints = "There is no checkpoint."
    if saved:
        shown = ", ".join(saved) if len(saved) <= 12 else f"{saved[0]} to {saved[-1]}"
        checkpoints = f"{len(saved)} checkpoint{'s' if len(saved) > 1 else ''}: step {shown}."
    return {"started": started, "starts": rows, "checkpoints": checkpoints}


def _incidents(path: Path) -> dict[str, Any]:
    """The last incidents as (step, what, rows or, where memory ran out, how)."""
    lines = read_incidents(path)
    found = [
        (line["step"], line["kind"].replace("_", " "), ", ".join(map(_row, line["rows"])) or str(line.get("error", "")))
        for line in lines[-INCIDENTS:]
    ]
    return {"incidents": found, "num_incidents": len(lines)}


def _row(row: Any) -> str:
    """A row of an incident: its name or, of a spike, that and its loss over what is usual."""
    if isinstance(row, dict) and isinstance(row.get("ratio"), (int, float)):
        return f"{row.get('row')} ({row['ratio']:.3g} times)"
    return str(row)


def _settings(path: Path) -> dict[str, Any] | None:
    """The settings of the run's recipe; None if it cannot be read."""
    try:
        return read_recipe_file(str(path))
    except RecipeError:
        return None


def _recipe(path: Path, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings that differ from the defaults as (name, value, default), and the whole file."""
    if settings is None:
        return {"settings": None, "recipe": "", "draw_with": None}
    clip_skip = settings.get("clip_skip")
    draw_with = None
    if isinstance(clip_skip, int):  # of a model of any family, which the folder may not tell
        draw_with = f"clip_skip={clip_skip} in diffusers, Clip skip {clip_skip + 1} in A1111 (which has none for SDXL)"
    defaults = {name: Recipe.model_fields[name].get_default() for name in settings}
    changed = [
        (name, _words(value), _words(defaults[name])) for name, value in settings.items() if value != defaults[name]
    ]
    return {"settings": changed, "recipe": read_text(path.resolve(), MAX_RECIPE_BYTES), "draw_with": draw_with}


def _words(value: Any) -> str:
    """A setting as it is read: none, yes or no, a list with commas."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
