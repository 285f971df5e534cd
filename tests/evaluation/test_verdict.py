"""Whether a run learns, in words: each case says what is true of it, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sd_recipes.evaluation.verdict import Judgement, figures_by_step, judge, verdict


def validations(held_out: dict[int, float], training_rows: dict[int, float] | None = None) -> list[dict[str, Any]]:
    return [
        {"step": step, "validation_loss": loss}
        | ({"train_subset_loss": training_rows[step]} if training_rows and step in training_rows else {})
        for step, loss in held_out.items()
    ]


def training(losses: list[float]) -> list[dict[str, Any]]:
    return [{"step": step, "train_loss": loss} for step, loss in enumerate(losses, 1)]


def judged(lines: list[dict[str, Any]]) -> Judgement:
    return judge(figures_by_step(lines))


def test_without_held_out_rows_it_says_what_cannot_be_known_and_the_flag() -> None:
    found = judged(training([0.4] * 10 + [0.3] * 80 + [0.2] * 10))
    assert (found.learning, found.overfitting, found.best_step) == ("unknown", "unknown", None)
    assert "--validation_split" in found.sentences[0]
    assert found.sentences[1] == (
        "The training loss was 0.4000 in the first tenth of the run and 0.2000 in the last; over-fitting lowers it too."
    )
    assert len(verdict(training([0.4, 0.2]))) == 1, "two losses say nothing of a trend"
    assert len(verdict([])) == 1


def test_one_validation_is_compared_with_nothing() -> None:
    assert verdict(validations({0: 0.3})) == [
        "The held-out loss was 0.3000 before training and has not been measured since."
    ]
    (said,) = verdict(validations({200: 0.3}))
    assert "at step 200, its only measurement" in said
    assert "--validate_before_training" in said
    assert judged(validations({200: 0.3})).best_step is None


def test_best_at_the_end() -> None:
    found = judged(validations({0: 0.4, 100: 0.3, 200: 0.2}, {0: 0.4, 100: 0.29, 200: 0.18}))
    assert (found.learning, found.overfitting, found.best_step, found.since_best) == ("yes", "no", 200, 0)
    assert found.to_best == pytest.approx(-0.5)
    assert found.sentences == [
        "It has learned: the held-out loss fell from 0.4000 before training to 0.2000 at step 200, 50 % lower.",
        "It was best at the last validation, step 200; training rows are at 0.1800, a gap of 0.02000.",
    ]


def test_best_before_the_end_with_a_growing_gap_is_over_fitting() -> None:
    found = judged(validations({0: 0.4, 100: 0.2, 200: 0.25}, {0: 0.4, 100: 0.19, 200: 0.15}))
    assert (found.learning, found.overfitting, found.best_step) == ("yes", "yes", 100)
    assert found.since_best == pytest.approx(0.25)
    assert found.sentences[1] == (
        "It has over-fitted since step 100, when it was best: the held-out loss rose to 0.2500 by step 200, 25 % "
        "higher, while that of training rows went from 0.1900 to 0.1500."
    )
    worse = verdict(validations({0: 0.4, 100: 0.2, 200: 0.5}, {0: 0.4, 100: 0.19, 200: 0.15}))
    assert "and above where it began" in worse[1]


def test_both_losses_rising_is_no_over_fitting() -> None:
    found = judged(validations({0: 0.4, 100: 0.2, 200: 0.3}, {0: 0.4, 100: 0.19, 200: 0.28}))
    assert (found.learning, found.overfitting) == ("yes", "no")
    assert "Both got worse" in found.sentences[1]
    assert "--learning_rate" in found.sentences[1]


def test_a_rise_without_training_rows_is_not_called_over_fitting() -> None:
    found = judged(validations({0: 0.4, 100: 0.2, 200: 0.3}))
    assert (found.learning, found.overfitting) == ("yes", "unknown")
    assert "cannot be known without the loss of training rows" in found.sentences[1]
    # Training rows that were measured at the best step only do not tell either.
    assert judged(validations({0: 0.4, 100: 0.2, 200: 0.3}, {0: 0.4, 100: 0.2})).overfitting == "unknown"


def test_never_better_than_before_training() -> None:
    by_heart = judged(validations({0: 0.3, 100: 0.35, 200: 0.4}, {0: 0.3, 100: 0.2, 200: 0.1}))
    assert (by_heart.learning, by_heart.overfitting, by_heart.best_step) == ("no", "yes", 100)
    assert "never lower than its 0.3000 before training" in by_heart.sentences[0]
    assert "at step 200 it is 0.4000, 33 % higher" in by_heart.sentences[0]
    assert "its best since was 0.3500 at step 100" in by_heart.sentences[0]
    assert by_heart.sentences[1] == "The loss of training rows fell from 0.3000 to 0.1000: they are learned by heart."
    neither = judged(validations({0: 0.3, 100: 0.4}, {0: 0.3, 100: 0.4}))
    assert (neither.learning, neither.overfitting, neither.best_step) == ("no", "no", 100)
    assert "did not fall either" in neither.sentences[1]
    assert judged(validations({0: 0.3, 100: 0.4})).overfitting == "unknown"


def test_without_step_0_the_first_validation_is_the_start() -> None:
    found = judged(validations({50: 0.3, 100: 0.2}))
    assert (found.learning, found.best_step) == ("yes", 100)
    assert "from 0.3000 at step 50 (the first validation) to 0.2000" in found.sentences[0]
    assert judged(validations({50: 0.3, 100: 0.4})).learning == "no"


def test_a_thousandth_is_no_change() -> None:
    assert judged(validations({0: 0.3, 100: 0.2999})).learning == "no"
    as_good = judged(validations({0: 0.3, 100: 0.2, 200: 0.2001}))
    assert as_good.overfitting == "no"
    assert "as good at the last validation" in as_good.sentences[1]


def test_losses_below_0_have_no_relative_change() -> None:
    found = judged(validations({0: -1.0, 100: -1.2, 200: -1.1}))
    assert (found.learning, found.to_best, found.since_best) == ("yes", None, None)
    assert "%" not in " ".join(found.sentences)


def test_figures_leave_out_what_is_not_finite_and_keep_the_last_of_a_step() -> None:
    lines = [
        {"step": 20, "a": 1.0},
        {"step": 10, "a": 2},
        {"step": 10, "a": 3},
        {"step": 30, "a": math.nan},
        {"step": 40, "b": 1},
    ]
    assert list(figures_by_step(lines)["a"].items()) == [(10, 3.0), (20, 1.0)]
