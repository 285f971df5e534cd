"""What goes wrong in a step: it is told, and written down with its rows, and may end the run."""

from __future__ import annotations

import logging

from sd_recipes.runtime.agreement import all_gather
from sd_recipes.runtime.trackers import Tracker
from sd_recipes.training.finite import TrainingDiverged
from sd_recipes.training.state import TrainState

logger = logging.getLogger(__name__)

NAMED = 5  # rows in a warning
TOLD = 20  # incidents on the console; the file has them all


class Guard:
    """Watches a run's steps. All processes decide alike, and have to call each method."""

    def __init__(self, state: TrainState, tracker: Tracker, max_skipped_steps: int) -> None:
        self.state, self.tracker, self.max_skipped_steps = state, tracker, max_skipped_steps
        self._num_told = 0

    def skipped(self, grad_norm: float, *, ends_run: bool) -> None:
        """Record the last step, which was not applied, or with --fused_backward_pass without what is not finite.

        Raises TrainingDiverged if there are too many in a row.

        Two are too many at the end of the run: nothing would show that the weights which it leaves are of any use.
        """
        progress, step = self.state.progress, self.state.progress.global_step
        rows = sorted(row for rows in all_gather(self.state.quiet_loss.forget()) for row in rows)
        not_finite = [row.name for row in rows if not row.has_finite_loss]
        names = [row.name for row in rows]
        self.tracker.record("skipped", step, rows=names, grad_norm=str(grad_norm), loss_not_finite=not_finite)
        words = f"its rows are {in_words(names)}"
        if not_finite:
            words = f"the loss is not finite of {in_words(not_finite)}"
        is_skipped = "is skipped"
        if self.state.fused_backward:
            is_skipped = "takes gradients that are not finite for 0"
        self._tell(f"Step {step} {is_skipped}: the gradient's norm is {grad_norm}, and {words}")
        progress.skipped_in_a_row += 1
        before = progress.skipped_in_a_row - 1
        if progress.skipped_in_a_row >= max(1, self.max_skipped_steps):
            words = f", like the {before} before it (--max_skipped_steps)" if before else ""
        elif ends_run and before:
            words = f", like the {before} before it, and the run ends with it"
        else:
            return
        applied = "applied without it" if self.state.fused_backward else "not applied"
        raise TrainingDiverged(f"the gradient's norm is {grad_norm} at step {step}, which is {applied}{words}")

    def counted(self) -> None:
        """The last step counts: its losses are finite."""
        self.state.progress.skipped_in_a_row = 0
        self.state.quiet_loss.step(self.state.progress.global_step)

    def look(self) -> None:
        """Take in the losses of the steps since the last look, and record those that leapt."""
        for spike in self.state.quiet_loss.take_in(all_gather):
            self.tracker.record(
                "spike",
                spike.step,
                quiet_loss=spike.quiet_loss,
                usual=spike.usual,
                rows=[{"row": name, "ratio": ratio} for name, ratio in spike.ratios],
            )
            of_rows = in_words([f"{name} {ratio:.3g} times" for name, ratio in spike.ratios])
            self._tell(
                f"The loss leapt at step {spike.step}: quiet_loss {spike.quiet_loss:.4g}, usually {spike.usual:.4g}. "
                f"Most above what is usual at their timesteps: {of_rows}"
            )

    def _tell(self, words: str) -> None:
        self._num_told += 1
        if self._num_told <= TOLD:
            rest = f"; further incidents only in {self.tracker.incidents.path}" if self._num_told == TOLD else ""
            logger.warning("%s%s", words, rest)


def in_words(names: list[str]) -> str:
    """Some of the names."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
