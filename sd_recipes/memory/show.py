"""A plan in words, as a bar of characters, as JSON, and as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from sd_recipes.memory.plan import MemoryPlan
from sd_recipes.memory.remedies import Variation, differing, in_flags
from sd_recipes.sizes import size_in_words
from sd_recipes.writing import replacing

WIDTH = 48  # characters of a bar
EIGHTHS = " ▏▎▍▌▋▊▉█"
SMALL = 0.003  # of the whole: kinds below it are put together
REST = "other"
ORDER = (
    "(ordered by times of steps measured on an H100; those of --micro_batch and --vae_slicing are assumed, and what "
    "changes the training comes last)"
)
COLOURS = (
    "#4c78a8", "#e45756", "#f58518", "#72b7b2", "#54a24b", "#eeca3b", "#b279a2", "#ff9da6", "#9d755d", "#79706e",
    "#8cd17d", "#86bcb6", "#d4a6c8",
)  # fmt: skip


def sum_in_words(plan: MemoryPlan) -> str:
    """tensors X + overhead Y = Z of W."""
    overhead = plan.total - plan.tensors
    words = f"tensors {size_in_words(plan.tensors)} + overhead {size_in_words(overhead)} = {size_in_words(plan.total)}"
    return words if plan.capacity is None else f"{words} of {size_in_words(plan.capacity)}"


def rows(plan: MemoryPlan) -> list[tuple[str, int]]:
    """What there is at the peak, the kinds of tensors before the overhead, and small ones together."""
    found = [*plan.by_kind.items(), *plan.overhead.items()]
    small = [size for _, size in found if size < SMALL * plan.total]
    large = [(kind, size) for kind, size in found if size >= SMALL * plan.total and kind != REST]
    rest = sum(small) + sum(size for kind, size in found if kind == REST and size >= SMALL * plan.total)
    return large + ([(REST, rest)] if rest else [])


def bar(share: float) -> str:
    """A bar that is `share` of WIDTH characters long."""
    eighths = round(min(share, 1) * WIDTH * 8)
    return EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def in_lines(plan: MemoryPlan) -> str:
    """The plan for a terminal."""
    recipe = plan.recipe
    splits = -(-recipe.train_batch_size // recipe.images_at_once)
    batch = f"batch {recipe.train_batch_size}" + (f" = {splits} x {recipe.images_at_once}" if splits > 1 else "")
    lines = [
        f"{recipe.resolution} x {recipe.resolution} pixels, {batch}, {recipe.mixed_precision or 'no'} mixed precision, "
        f"{recipe.optimizer}, on {'a GPU' if plan.device == 'cuda' else 'the CPU'}"
        + (f", each of {plan.num_processes} processes" if plan.num_processes > 1 else ""),
        "",
        f"{'memory of the GPU' if plan.device == 'cuda' else 'memory'} at its peak, in the step's {plan.phase} phase",
    ]
    of = max(plan.total, plan.capacity or 0)
    lines += [f"  {kind:<28}{size_in_words(size):>9}  {bar(size / of)}" for kind, size in rows(plan)]
    lines += [f"  {sum_in_words(plan)}{fit_in_words(plan)}", "", "by phase, tensors alone"]
    lines += [
        f"  {name:<28}{size_in_words(each.total):>9}  {bar(each.total / of)}"
        for name, each in plan.moments.items()
        if each.total
    ]
    if plan.device == "cuda":
        host = sum(plan.host.values())
        parts = ", ".join(f"{name} {size_in_words(size)}" for name, size in plan.host.items())
        lines += ["", f"memory of the host: {size_in_words(host)} ({parts})"]
    return "\n".join(lines)


def variations_in_lines(plan: MemoryPlan, variations: Sequence[Variation]) -> str:
    """What would change the plan, but for what saves less than is shown."""
    lines = ["", "what would change it"]
    for each in variations:
        saved = size_in_words(plan.total - each.plan.total)
        if each.plan.total < plan.total and saved != size_in_words(0):
            lines.append(
                f"  {each.words:<28}-{saved:>8}  -> {size_in_words(each.plan.total):>8}  {each.flags}; "
                f"price: {each.price}"
            )
    return "\n".join(lines if len(lines) > 2 else [*lines, "  nothing, by as much as is shown here"])


def best_in_lines(plan: MemoryPlan, best: MemoryPlan) -> str:
    """The fastest set that fits."""
    lines = ["", f"fastest set that fits: {size_in_words(best.total)}"]
    if flags := in_flags(differing(plan.recipe, best.recipe)):
        return "\n".join([*lines, f"  add  {flags}", f"  {ORDER}"])
    return "\n".join([*lines, "  it fits as it is"])


def fit_in_words(plan: MemoryPlan) -> str:
    if plan.capacity is None:
        return ""
    if plan.fits:
        return ": fits"
    return f": does not fit, by {size_in_words(plan.total - plan.capacity, up=True)}"


def as_json(
    plan: MemoryPlan, variations: Sequence[Variation], best: MemoryPlan | None, least: MemoryPlan | None
) -> dict[str, Any]:
    """Everything, in bytes, for machines; `least` is the smallest set, where none fits."""
    return {
        "device": plan.device,
        "processes": plan.num_processes,
        "capacity": plan.capacity,
        "fits": plan.fits,
        "total": plan.total,
        "tensors": plan.tensors,
        "phase": plan.phase,
        "kinds": plan.by_kind,
        "overhead": dict(plan.overhead),
        "host": dict(plan.host),
        "phases": {name: each.total for name, each in plan.moments.items()},
        "variations": [
            {"name": each.words, "flags": each.flags, "total": each.plan.total, "price": each.price}
            for each in variations
        ],
        "fastest": None if best is None else _set_as_json(plan, best),
        "least": None if least is None else _set_as_json(plan, least),
    }


def _set_as_json(plan: MemoryPlan, changed: MemoryPlan) -> dict[str, Any]:
    changes = differing(plan.recipe, changed.recipe)
    return {"total": changed.total, "settings": changes, "flags": in_flags(changes)}


def draw(plan: MemoryPlan, path: Path) -> None:
    """The bar as an SVG drawing, with a line at the capacity. Raises OSError."""
    width, left, height = 860, 20, 40
    of = max(plan.total, plan.capacity or 0)
    scale = (width - 2 * left) / of
    shapes, legend, x = [], [], float(left)
    for number, (kind, size) in enumerate(rows(plan)):
        colour = COLOURS[number % len(COLOURS)]
        words = escape(f"{kind}: {size_in_words(size)}")
        shapes.append(
            f'<rect x="{x:.1f}" y="50" width="{size * scale:.1f}" height="{height}" fill="{colour}">'
            f"<title>{words}</title></rect>"
        )
        column, row = number % 3, number // 3
        at = left + column * 280, 126 + 22 * row
        legend.append(
            f'<rect x="{at[0]}" y="{at[1] - 11}" width="12" height="12" fill="{colour}"/>'
            f'<text x="{at[0] + 18}" y="{at[1]}">{words}</text>'
        )
        x += size * scale
    if plan.capacity is not None:
        edge = left + plan.capacity * scale
        shapes.append(f'<line x1="{edge:.1f}" y1="44" x2="{edge:.1f}" y2="96" stroke="#222" stroke-width="2"/>')
    bottom = 126 + 22 * (-(-len(legend) // 3))
    title = escape(f"{sum_in_words(plan)}{fit_in_words(plan)}")
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom}" width="{width}" height="{bottom}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{left}" y="22" font-size="15">{title}</text>'
        f'<text x="{left}" y="40">at the peak, in the {plan.phase} phase</text>'
        f"{''.join(shapes)}{''.join(legend)}</svg>\n"
    )
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
