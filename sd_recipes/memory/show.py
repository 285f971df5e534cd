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


def in_lines(plan: MemoryPlan, variations: Sequence[Variation], best: MemoryPlan | None) -> str:
    """The whole plan for a terminal; `best` is the fastest set that fits, if there is a budget."""
    recipe = plan.recipe
    splits = -(-recipe.train_batch_size // recipe.images_at_once)
    batch = f"batch {recipe.train_batch_size}" + (f" = {splits} x {recipe.images_at_once}" if splits > 1 else "")
    lines = [
        f"{recipe.resolution} x {recipe.resolution} pixels, {batch}, {recipe.mixed_precision or 'no'} mixed precision, "
        f"{recipe.optimizer}, on {'a GPU' if plan.device == 'cuda' else 'the CPU'}",
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
    lines += ["", "what would change it"]
    for each in variations:
        change = plan.total - each.plan.total
        lines.append(
            f"  {each.words:<28}{'-' if change >= 0 else '+'}{size_in_words(abs(change)):>8}  -> "
            f"{size_in_words(each.plan.total):>8}  {each.flags}; price: {each.price}"
        )
    if best is not None:
        flags = in_flags(differing(recipe, best.recipe))
        found = "it fits as it is" if not flags else f"add  {flags}"
        lines += ["", f"fastest set that fits: {size_in_words(best.total)}", f"  {found}"]
    return "\n".join(lines)


def fit_in_words(plan: MemoryPlan) -> str:
    if plan.capacity is None:
        return ""
    if plan.fits:
        return ": fits"
    return f": does not fit, by {size_in_words(plan.total - plan.capacity, up=True)}"


def as_json(plan: MemoryPlan, variations: Sequence[Variation], best: MemoryPlan | None) -> dict[str, Any]:
    """Everything, in bytes, for machines."""
    return {
        "device": plan.device,
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
        "fastest": None if best is None else {"total": best.total, "settings": differing(plan.recipe, best.recipe)},
    }


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
