"""Is a run learning, is it over-fitting, when was it best: in words, from the figures that it logged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Answer = Literal["yes", "no", "unknown"]
Lines = Iterable[Mapping[str, Any]]
Losses = dict[int, float]  # by step, in order of steps
MARGIN = 0.001  # relative; a loss under fixed noise that differs by less is the same


@dataclass(frozen=True)
class Judgement:
    """What the losses of a run say.

    `best_step` is that of the lowest held-out loss after training began, `last_step` that of the last one. `to_best` is
    the relative change from the first to the best (below 0: lower), `since_best` from the best to the last; None where
    a loss is not above 0. Without two held-out losses, all are None.
    """

    learning: Answer
    overfitting: Answer
    sentences: list[str]
    best_step: int | None = None
    last_step: int | None = None
    to_best: float | None = None
    since_best: float | None = None


def verdict(lines: Lines) -> list[str]:
    """One or two sentences on whether the run learns, whether it over-fits, and when it was best.

    `lines` are those of metrics.jsonl.
    """
    return judge(figures_by_step(lines)).sentences


def figures_by_step(lines: Lines) -> dict[str, Losses]:
    """The finite values of each figure by step, in order of steps; the last one that was logged for a step counts."""
    found: dict[str, Losses] = {}
    for line in sorted(lines, key=lambda line: line["step"]):
        for name, value in line.items():
            if math.isfinite(value):
                found.setdefault(name, {})[line["step"]] = float(value)
    return found


def judge(figures: Mapping[str, Losses]) -> Judgement:
    """The judgement that `verdict` puts in words.

    It learns if the held-out loss was lower at some step than before training (or than at the first validation, where
    there was none before training). It over-fits if the held-out loss has risen since its best, and the loss of the
    training rows has not risen by half as much.
    """
    held_out, training_rows = (figures.get(name, {}) for name in ("validation_loss", "train_subset_loss"))
    if not held_out:
        return Judgement("unknown", "unknown", _without_held_out(figures.get("train_loss", {})))
    if len(held_out) == 1:
        return Judgement("unknown", "unknown", [_measured_once(*next(iter(held_out.items())))])
    first, last = next(iter(held_out)), next(reversed(held_out))
    after = [step for step in held_out if step > 0]
    best = min(after, key=held_out.__getitem__)
    learning: Answer = "yes" if _below(held_out[best], held_out[first]) else "no"
    describe = _learned if learning == "yes" else _never_better
    overfitting, sentences = describe(held_out, training_rows, first, best, last)
    to_best, since_best = _relative(held_out[first], held_out[best]), _relative(held_out[best], held_out[last])
    return Judgement(learning, overfitting, sentences, best, last, to_best, since_best)


def _without_held_out(training: Losses) -> list[str]:
    said = [
        "There is no held-out loss so far, so nobody can know whether the run is learning or over-fitting: hold rows "
        "out with --validation_split, such as 0.05."
    ]
    losses = list(training.values())
    if len(losses) >= 10:
        tenth = len(losses) // 10
        begin, end = (sum(some) / tenth for some in (losses[:tenth], losses[-tenth:]))
        said.append(
            f"The training loss was {begin:#.4g} in the first tenth of the run and {end:#.4g} in the last; "
            "over-fitting lowers it too."
        )
    return said


def _measured_once(step: int, loss: float) -> str:
    if step == 0:
        return f"The held-out loss was {loss:#.4g} before training and has not been measured since."
    return (
        f"The held-out loss was {loss:#.4g} at step {step}, its only measurement: there is nothing to compare it with. "
        "--validate_before_training measures it before the first step too."
    )


def _never_better(
    held_out: Losses, training_rows: Losses, first: int, best: int, last: int
) -> tuple[Answer, list[str]]:
    """Whether it over-fits, and the sentences on a run whose held-out loss never fell."""
    said = [
        "It has not learned what holds for other rows: the held-out loss was never lower than its "
        f"{held_out[first]:#.4g} {_when(first)}; at step {last} it is {held_out[last]:#.4g}"
        f"{_change(held_out[first], held_out[last])}."
    ]
    if best not in (first, last):
        said[0] = f"{said[0][:-1]}, and its best since was {held_out[best]:#.4g} at step {best}."
    if len(training_rows) < 2:
        return "unknown", said
    begin, end = next(iter(training_rows.values())), next(reversed(training_rows.values()))
    if _below(end, begin):
        said.append(f"The loss of training rows fell from {begin:#.4g} to {end:#.4g}: they are learned by heart.")
        return ("yes" if _below(held_out[first], held_out[last]) else "no"), said
    said.append(
        f"The loss of training rows did not fall either ({begin:#.4g}, then {end:#.4g}): train longer, or with another "
        "--learning_rate."
    )
    return "no", said


def _learned(held_out: Losses, training_rows: Losses, first: int, best: int, last: int) -> tuple[Answer, list[str]]:
    """Whether it over-fits, and the sentences on a run whose held-out loss fell."""
    said = [
        f"It has learned: the held-out loss fell from {held_out[first]:#.4g} {_when(first)} to {held_out[best]:#.4g} "
        f"at step {best}{_change(held_out[first], held_out[best])}."
    ]
    gap = ""
    if last in training_rows:
        gap = f"; training rows are at {training_rows[last]:#.4g}, a gap of {held_out[last] - training_rows[last]:#.4g}"
    if best == last:
        return "no", [*said, f"It was best at the last validation, step {last}{gap}."]
    if not _below(held_out[best], held_out[last]):
        return "no", [*said, f"It was best at step {best}, and as good at the last validation, step {last}{gap}."]
    rise = f"the held-out loss rose to {held_out[last]:#.4g} by step {last}{_change(held_out[best], held_out[last])}"
    if _below(held_out[first], held_out[last]):
        rise += " and above where it began"
    if best not in training_rows or last not in training_rows:
        unknown = "whether that is over-fitting cannot be known without the loss of training rows"
        return "unknown", [*said, f"It was best at step {best}; since then {rise}: {unknown}."]
    moved = f"that of training rows went from {training_rows[best]:#.4g} to {training_rows[last]:#.4g}"
    if training_rows[last] - training_rows[best] < (held_out[last] - held_out[best]) / 2:
        return "yes", [*said, f"It has over-fitted since step {best}, when it was best: {rise}, while {moved}."]
    return "no", [
        *said,
        f"It was best at step {best}; since then {rise}, and {moved}. Both got worse, so it is not over-fitting: "
        "try a lower --learning_rate.",
    ]


def _when(step: int) -> str:
    return "before training" if step == 0 else f"at step {step} (the first validation)"


def _below(one: float, other: float) -> bool:
    return one < other - MARGIN * abs(other)


def _relative(start: float, end: float) -> float | None:
    """The change as a part of `start`; None where a loss is not above 0, as one with a learned uncertainty may be."""
    return end / start - 1 if start > 0 and end > 0 else None


def _change(start: float, end: float) -> str:
    """The relative change in words, where there is one."""
    change = _relative(start, end)
    return "" if change is None else f", {changed(change)}"


def changed(change: float) -> str:
    """A relative change in words: 12 % lower, 0.3 % higher."""
    return f"{percent(change)} {'lower' if change < 0 else 'higher'}"


def percent(change: float) -> str:
    """The size of a relative change: 12 %, 0.3 %."""
    number = 100 * abs(change)
    return f"{number:.0f} %" if number >= 10 else f"{number:.1f} %"
