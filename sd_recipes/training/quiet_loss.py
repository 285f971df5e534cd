"""The training curve without the noise of the timesteps, and the steps at which it leaps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd_recipes.data.batches import Batch
from sd_recipes.data.timesteps import timestep_at
from sd_recipes.recipe import ObjectiveConfig
from sd_recipes.training.row_losses import RowLosses
from sd_recipes.training.timestep_errors import RunningLosses

MOST_STEPS = 500  # that are kept until they are taken in
KNOWN_SHARE = 0.95  # of the timesteps that a run draws: once their mean losses are known, the curve begins
# A spike is so many standard deviations of the logarithm, and this factor, above the median of the recent steps.
# Of 15,000 ordinary steps, with global batches from 1 to 32, one was (docs/guards.md).
WINDOW, FEWEST, DEVIATIONS, FACTOR = 100, 30, 6.0, 1.5
NAMED = 5  # rows of a spike
PRIOR, LEAST = 30, 0.01  # losses that every bin's variance begins with; the least variance of them, over m²
PER_MAD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


class Noted(NamedTuple):
    """What is kept of a micro-batch until it is taken in."""

    names: tuple[str, ...]  # (B,) of the rows
    positions: Tensor  # (B,) int64 of the samples in the run
    rows: Tensor  # (B,) int64
    values: Tensor  # (3, B) float32: timesteps, losses and weights, on the device
    is_class: bool  # class pictures, which may be taught something else, count neither in the curve nor in the means


class Row(NamedTuple):
    """A row of a step that was left out."""

    position: int
    name: str
    has_finite_loss: bool


@dataclass(frozen=True)
class Spike:
    """A step whose loss leapt."""

    step: int
    quiet_loss: float
    usual: float  # what the steps before it would have had there, by their median quotient
    ratios: list[tuple[str, float]]  # its rows with the largest loss over the running mean at their timestep


class QuietLoss:
    """A step's loss as if its timesteps came from everywhere: its quotient by m(t), times the mean of m over all t.

    m(t) is the running mean loss in the bin of timestep t, before the step. The quotient q is such that the losses are
    nearest to q·m(t), by squares over the variance v(t) in the bin: Σ l·m/v / Σ m²/v, l over m at a single timestep, so
    that bins count alike where losses vary in proportion to m, and those in which rows differ a lot count less.

    The quotient alone stays at 1, since m follows the losses; over a fixed m it would have no scale, and could not
    begin before m is known. The product has the scale of the training loss, and does not lag: where all losses halve,
    the quotient does so at once, and as m follows, the mean of m takes over. Losses are those before a learned
    uncertainty divides them and before `--timesteps_by_error` weights them.

    All is computed in the host's memory, when the run logs or saves, from the samples of all processes in the order of
    their positions: it depends neither on processes and micro-batches, nor on when that is. A step that leaps is a
    `Spike`, which counts in the curve and not in m.
    """

    def __init__(self, num_train_timesteps: int, config: ObjectiveConfig, row_losses: RowLosses | None = None) -> None:
        """`row_losses` is told of every sample, unless rows have no numbers, as in a stream."""
        self.row_losses = row_losses
        self.running = RunningLosses(num_train_timesteps, config, torch.device("cpu"))
        self.squares = RunningLosses(num_train_timesteps, config, torch.device("cpu"))  # of the losses
        drawn = [timestep_at((n + 0.5) / 10_000, num_train_timesteps, config) for n in range(10_000)]
        in_bins = self.running.bins(torch.tensor(drawn)).bincount(minlength=len(self.running.shares))
        self.shares = in_bins.double() / len(drawn)  # (bins,) of the timesteps that the run draws
        self.recent: deque[float] = deque(maxlen=WINDOW)  # quotients of the last steps
        self.sum, self.num_steps = 0.0, 0  # of the steps since the last log
        # Under another objective the losses are others.
        self.objective = config.model_dump(mode="json", include=set(ObjectiveConfig.model_fields))
        self._of_step: list[Noted] = []
        self._steps: list[tuple[int, list[Noted]]] = []

    @property
    def is_full(self) -> bool:
        """Whether no more steps should be kept before they are taken in."""
        return len(self._steps) >= MOST_STEPS

    def add(self, batch: Batch, timesteps: Tensor, losses: Tensor) -> None:
        """Note the losses, (B,), at timesteps, (B,), of a micro-batch, without waiting for the device."""
        values = torch.stack([timesteps.float(), losses.float(), batch.weights])
        positions, rows = torch.from_numpy(batch.plan.positions), torch.from_numpy(batch.plan.rows)
        self._of_step.append(Noted(batch.names, positions, rows, values, batch.plan.is_class))

    def step(self, number: int) -> None:
        """The micro-batches noted since the last step were the step of this number."""
        self._steps.append((number, self._of_step))
        self._of_step = []

    def forget(self) -> list[Row]:
        """Leave out the micro-batches noted since the last step; returns this process's rows of them."""
        noted, self._of_step = self._of_step, []
        return [
            Row(position, name, math.isfinite(loss))
            for each in noted
            for position, name, (_, loss, weight) in zip(
                each.positions.tolist(), each.names, each.values.T.tolist(), strict=True
            )
            if weight > 0
        ]

    def take_in(self, all_gather: Callable[[Any], list[Any]]) -> list[Spike]:
        """Take in the steps since the last call; returns the spikes among them.

        `all_gather` gives every process's value, on all of them. Every process has to call this.
        """
        steps, self._steps = self._steps, []
        samples = torch.cat(all_gather(_samples(steps)))
        samples = samples[samples[:, 1].argsort()]
        _, sizes = samples[:, 0].unique_consecutive(return_counts=True)
        leapt = [leap for of_step in samples.split(sizes.tolist()) if (leap := self._take_in(of_step))]
        if not leapt:
            return []
        own = {
            position: name
            for number, noted in steps
            if number in {spike.step for spike, _ in leapt}
            for each in noted
            for position, name in zip(each.positions.tolist(), each.names, strict=True)
        }
        names = {position: name for named in all_gather(own) for position, name in named.items()}
        return [
            replace(spike, ratios=[(names[position], ratio) for position, ratio in ratios]) for spike, ratios in leapt
        ]

    def _take_in(self, samples: Tensor) -> tuple[Spike, list[tuple[int, float]]] | None:
        """Take in a step's `_samples`; a spike comes without its rows, and with their positions and ratios."""
        timesteps, losses = samples[:, 2].long(), samples[:, 3]
        bins = self.running.bins(timesteps)
        quotient, mean = self._quotient(bins, losses), self._mean()
        usual = None
        if quotient is not None:
            usual = self._leapt_from(quotient)
            self.recent.append(quotient)
            self.sum += quotient * mean
            self.num_steps += 1
        if quotient is None or usual is None:
            self._tell_rows(samples, bins)
            ones = torch.ones_like(losses)
            self.running.take_in(self.running.sums(timesteps, losses, ones))
            self.squares.take_in(self.squares.sums(timesteps, losses.square(), ones))
            return None
        ratios = (losses / self.running.means[bins]).nan_to_num()  # of a bin that is not known yet, 0
        largest = ratios.argsort(descending=True)[:NAMED]
        rows = list(zip(samples[largest, 1].long().tolist(), ratios[largest].tolist(), strict=True))
        return Spike(int(samples[0, 0]), quotient * mean, usual * mean, []), rows

    def _tell_rows(self, samples: Tensor, bins: Tensor) -> None:
        """Note how hard the rows of a step were."""
        if self.row_losses is not None:
            known = (self.running.means > 0)[bins]
            ratios = samples[:, 3][known] / self.running.means[bins][known]
            self.row_losses.add(samples[:, 4][known].long(), ratios)

    def _mean(self) -> float:
        """The mean of m over all timesteps whose bin is known; NaN if there are none."""
        means = self.running.means
        known = means > 0
        return ((self.shares * means)[known].sum() / self.shares[known].sum()).item()

    def _quotient(self, bins: Tensor, losses: Tensor) -> float | None:
        """Of a step with these losses, (N,), in these bins; None before the means are known well enough."""
        means, counts = self.running.means, self.running.running[1]
        known = means > 0
        if self.shares[known].sum() < KNOWN_SHARE or not known[bins].any():
            return None
        variances = (self.squares.means - means.square()).clamp(min=0)
        # Where few losses were met, their variance says little: as if some more had the variance that is usual.
        usual = (counts * variances / means.square())[known].sum() / counts.sum()
        variances = (counts * variances + PRIOR * usual.clamp(min=LEAST) * means.square()) / (counts + PRIOR)
        bins, losses = bins[known[bins]], losses[known[bins]]
        weights = (means / variances)[bins]
        quotient = ((weights * losses).sum() / (weights * means[bins]).sum()).item()
        return quotient if 0 < quotient < math.inf else None

    def _leapt_from(self, quotient: float) -> float | None:
        """The usual quotient, if a step's is far above it; None if it is not, or if there are too few to tell."""
        if len(self.recent) < FEWEST:
            return None
        logs = [math.log(each) for each in self.recent]
        usual = median(logs)
        deviation = PER_MAD * median(abs(each - usual) for each in logs)
        is_far = math.log(quotient) - usual > max(DEVIATIONS * deviation, math.log(FACTOR))
        return math.exp(usual) if is_far else None

    def close(self) -> float | None:
        """The mean over the steps since the last call, of those that were taken in; None if there is none."""
        mean = self.sum / self.num_steps if self.num_steps else None
        self.sum, self.num_steps = 0.0, 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return {
            "objective": self.objective,
            "losses": self.running.running[0].tolist(),
            "squares": self.squares.running[0].tolist(),
            "counts": self.running.running[1].tolist(),
            "recent": list(self.recent),
            "sum": self.sum,
            "num_steps": self.num_steps,
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; of another objective, or in other bins, nothing, and begin anew."""
        losses, squares, counts = (
            torch.tensor(values[name], dtype=torch.float64) for name in ("losses", "squares", "counts")
        )
        if values["objective"] != self.objective or losses.shape != self.shares.shape:
            return
        self.running.running = torch.stack([losses, counts])
        self.squares.running = torch.stack([squares, counts])
        self.recent.extend(values["recent"])
        self.sum, self.num_steps = values["sum"], values["num_steps"]


def _samples(steps: list[tuple[int, list[Noted]]]) -> Tensor:
    """(N, 5) float64 of the samples that count: step, position, timestep, loss, row. Waits for the device, once."""
    noted = [(number, each) for number, of_step in steps for each in of_step if not each.is_class]
    if not noted:
        return torch.empty(0, 5, dtype=torch.float64)
    timesteps, losses, weights = torch.cat([each.values for _, each in noted], dim=1).cpu().double()
    positions = torch.cat([each.positions for _, each in noted])
    rows = torch.cat([each.rows for _, each in noted])
    numbers = torch.cat([torch.full_like(each.positions, number) for number, each in noted])
    return torch.stack([numbers, positions, timesteps, losses, rows], dim=1)[(weights > 0) & losses.isfinite()]
