"""The training curve without the noise of the timesteps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_format_and_saver import entry, rewrite_manifest
from training_runs import assert_equal, build, fit_from, train, weights

from sd_recipes.checkpoints.format import STATE
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import ObjectiveConfig
from sd_recipes.runtime.trackers import read_metrics
from sd_recipes.training.quiet_loss import QuietLoss, Spike


def mean_loss(timesteps: torch.Tensor) -> torch.Tensor:
    """Of a model: large where there is little noise."""
    return 0.02 + 0.9 * torch.exp(-timesteps / 150)


def alone(value: Any) -> list[Any]:
    """As `all_gather` of one process."""
    return [value]


class Feed:
    """Steps with losses like a model's, so many samples each, at uniform timesteps."""

    def __init__(self, quiet: QuietLoss, batch_size: int = 2) -> None:
        self.quiet, self.batch_size = quiet, batch_size
        self.generator = torch.Generator().manual_seed(0)
        self.num_steps = 0

    def step(self, scale: float = 1.0, of_first: float = 1.0) -> tuple[float, float | None, list[Spike]]:
        """The step's plain loss, its quiet one, and whether it leapt; `of_first` multiplies the first row's loss."""
        timesteps = torch.randint(1000, (self.batch_size,), generator=self.generator)
        scatter = torch.exp(0.1 * torch.randn(self.batch_size, generator=self.generator))
        losses = scale * mean_loss(timesteps) * scatter
        losses[0] *= of_first
        first = self.num_steps * self.batch_size
        positions = np.arange(first, first + self.batch_size)
        batch: Any = SimpleNamespace(
            names=tuple(f"row {position}" for position in positions),
            weights=torch.ones(self.batch_size),
            plan=SimpleNamespace(positions=positions, rows=positions, is_class=False),
        )
        self.quiet.add(batch, timesteps, losses)
        self.num_steps += 1
        self.quiet.step(self.num_steps)
        spikes = self.quiet.take_in(alone)
        return losses.mean().item(), self.quiet.close(), spikes


def feed(batch_size: int = 2, **settings: Any) -> Feed:
    return Feed(QuietLoss(1000, ObjectiveConfig(**settings)), batch_size)


def noise(curve: np.ndarray) -> float:
    """From step to step, relative to the curve."""
    return np.diff(curve).std() / np.sqrt(2) / curve.mean()


def test_it_is_the_loss_over_all_timesteps_with_a_fraction_of_the_noise() -> None:
    fed = feed()
    plain, quiet, spikes = zip(*(fed.step() for _ in range(600)), strict=True)
    start = quiet.index(next(value for value in quiet if value is not None))
    assert 3 < start < 40, "once every bin was met"
    assert None not in quiet[start:]
    curve = np.array(quiet[start + 20 :], dtype=float)
    everywhere = mean_loss(torch.arange(1000)).mean().item()
    assert curve.mean() == pytest.approx(everywhere, rel=0.05)
    assert noise(np.array(plain[start + 20 :])) > 4 * noise(curve)
    assert not any(spikes)


def test_it_falls_with_the_losses_and_not_behind_them() -> None:
    fed = feed(batch_size=16)
    before = np.mean([quiet for _, quiet, _ in (fed.step() for _ in range(100)) if quiet])
    at_once = np.mean([fed.step(0.5)[1] for _ in range(10)])
    later = np.mean([fed.step(0.5)[1] for _ in range(200)])
    assert at_once / before == pytest.approx(0.5, rel=0.1)
    assert later / before == pytest.approx(0.5, rel=0.1)


def test_timesteps_that_are_hardly_drawn_do_not_keep_it_from_beginning() -> None:
    fed = feed(timestep_sampling="logit_normal", logit_mean=1.0, logit_std=0.5)
    assert fed.quiet.shares.sum() == pytest.approx(1)
    assert fed.quiet.shares[0] == 0, "less than one of ten thousand"
    assert fed.step()[1] is None
    fed.generator.manual_seed(1)
    assert any(fed.step()[1] for _ in range(30))


def test_a_row_that_leaps_is_named_and_the_means_do_not_have_it() -> None:
    fed = feed(batch_size=4)
    assert not any(fed.step(of_first=50.0 if n == 9 else 1.0)[2] for n in range(80)), "too early to tell, or ordinary"
    means = fed.quiet.running.means
    _, quiet, (spike,) = fed.step(of_first=100.0)
    assert torch.equal(fed.quiet.running.means, means)
    assert (spike.step, spike.quiet_loss) == (81, quiet)
    assert spike.quiet_loss > 5 * spike.usual
    (name, ratio), *others = spike.ratios
    assert name == "row 320"
    assert 50 < ratio < 200
    assert all(each < 3 for _, each in others)
    assert not any(fed.step()[2] for _ in range(20))


def test_losses_that_stay_high_are_the_usual_ones_after_a_while() -> None:
    fed = feed(batch_size=8)
    for _ in range(100):
        fed.step()
    leapt = [bool(fed.step(4.0)[2]) for _ in range(150)]
    assert leapt[0]
    assert not any(leapt[60:])


# ------------------------------------------------------------------------------------------ real runs


def curve_of(folder: Path | str, key: str = "quiet_loss") -> dict[int, float]:
    return {line["step"]: line[key] for line in read_metrics(Path(folder) / "metrics.jsonl") if key in line}


@pytest.mark.slow
def test_a_real_runs_curve_falls_with_a_fraction_of_the_noise(settings: dict[str, Any]) -> None:
    """The noise is that of the second half: there the loss still falls, but slowly. It is 3.3 times smaller."""
    run = train(settings, train_batch_size=1, max_train_steps=300, learning_rate=3e-3, logging_steps=1)
    plain, quiet = curve_of(run.output_dir, "train_loss"), curve_of(run.output_dir)
    assert len(quiet) > 250
    late = range(150, 301)
    ratio = noise(np.array([plain[step] for step in late])) / noise(np.array([quiet[step] for step in late]))
    assert ratio > 2.5
    first, last = [quiet[step] for step in sorted(quiet)[:50]], [quiet[step] for step in late[-50:]]
    assert np.mean(last) < 0.6 * np.mean(first)
    assert not (run.output_dir / "incidents.jsonl").exists()


def test_it_is_the_mean_of_the_steps_since_the_last_log_and_a_resumed_run_has_the_same(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"train_batch_size": 8, "max_train_steps": 12, "checkpointing_steps": 5}
    each = curve_of(train(settings, output_dir=str(tmp_path / "each")).output_dir)
    settings |= {"logging_steps": 3}
    whole = train(settings)
    curve = curve_of(whole.output_dir)
    for step in (9, 12):
        assert curve[step] == pytest.approx(np.mean([each[step - 2], each[step - 1], each[step]]), rel=1e-12)
    source = str(tmp_path / "run" / "checkpoint-5")
    resumed = train(settings, output_dir=str(tmp_path / "again"), resume_from_checkpoint=source)
    again = curve_of(resumed.output_dir)
    assert again == {step: value for step, value in curve.items() if step > 5}
    assert resumed.state.quiet_loss.state_dict() == whole.state.quiet_loss.state_dict()


def test_a_run_that_seldom_logs_keeps_few_steps_and_has_the_same_figure(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"train_batch_size": 8, "max_train_steps": 12, "logging_steps": 100}
    expected = curve_of(train(settings).output_dir)
    monkeypatch.setattr("sd_recipes.training.quiet_loss.MOST_STEPS", 3)
    taken, take_in = [], QuietLoss.take_in
    monkeypatch.setattr(QuietLoss, "take_in", lambda *arguments: (taken.append(1), take_in(*arguments))[1])
    assert curve_of(train(settings, output_dir=str(tmp_path / "few")).output_dir) == expected
    assert len(taken) == 5, "at the first step and the last, and after every three"
    assert list(expected) == [12]


def rewrite_state(path: Path, change: Any) -> None:
    state = json.loads((path / STATE).read_text())
    change(state)
    (path / STATE).write_text(json.dumps(state))
    rewrite_manifest(path, lambda m: m["files"].update({STATE: entry((path / STATE).read_bytes())}))


def test_a_checkpoint_without_it_resumes_and_the_curve_begins_anew(settings: dict[str, Any], tmp_path: Path) -> None:
    """As those of earlier versions, which had no steps to skip either."""
    settings |= {"train_batch_size": 8, "max_train_steps": 12, "checkpointing_steps": 5}
    whole = train(settings)

    def make_older(state: dict[str, Any]) -> None:
        del state["quiet_loss"], state["progress"]["skipped_in_a_row"]

    rewrite_state(tmp_path / "run" / "checkpoint-5", make_older)
    resumed = train(settings, resume_from_checkpoint="checkpoint-5")
    assert_equal(weights(whole), weights(resumed))
    assert min(step for step in curve_of(resumed.output_dir) if step > 5) > 6


def test_another_objective_begins_anew(settings: dict[str, Any]) -> None:
    settings |= {"train_batch_size": 8, "max_train_steps": 5}
    train(settings)
    other = build(settings, resume_from_checkpoint="latest", max_train_steps=6, snr_gamma=5.0)
    fit_from(other)
    assert other.state.quiet_loss.running.running[1].sum() == 8
    assert 6 not in curve_of(other.output_dir)


def test_a_curve_that_nobody_wrote_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    train(settings)
    rewrite_state(tmp_path / "run" / "checkpoint-4", lambda state: state["quiet_loss"]["losses"].append(1.0))
    with pytest.raises(RecipeError, match="in as many bins"):
        train(settings, resume_from_checkpoint="latest", max_train_steps=5)


def test_it_is_before_what_a_learned_uncertainty_divides_by(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"train_batch_size": 8, "max_train_steps": 6, "learning_rate": 0.0}
    plain = train(settings)
    run = build(settings, output_dir=str(tmp_path / "divided"), learned_uncertainty=True)
    torch.nn.init.constant_(run.state.parts["uncertainty"].module.weight, 3.0)
    fit_from(run)
    assert curve_of(run.output_dir) == pytest.approx(curve_of(plain.output_dir), rel=1e-5)
    divided, undivided = (curve_of(each.output_dir, "train_loss")[1] for each in (run, plain))
    assert divided != pytest.approx(undivided, rel=1e-3)
