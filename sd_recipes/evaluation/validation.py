"""What a run has learned: errors on held-out and training rows under fixed noise, and pictures, on all processes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch
from accelerate import Accelerator
from PIL import Image

from sd_recipes.data.batches import Batch
from sd_recipes.data.order import MicroBatch
from sd_recipes.errors import one_line
from sd_recipes.evaluation.figures import FIGURES, LOSS, Best, best_of, figures_of, held_out_losses
from sd_recipes.evaluation.metrics import ImageTextScore
from sd_recipes.evaluation.pictures import draw_pictures, drawing_pipeline, picture_grid, save_whole
from sd_recipes.evaluation.sample_errors import (
    AVERAGED,
    HELD_OUT,
    RAW,
    FixedSamples,
    of_set,
    read_table,
    sorted_table,
    table_path,
    write_table,
)
from sd_recipes.evaluation.watched_rows import WatchedRows
from sd_recipes.model.components import Components
from sd_recipes.model.family import Family, TextStates
from sd_recipes.model.latents import LatentEncoder
from sd_recipes.recipe import Recipe
from sd_recipes.redaction import in_texts, redacted
from sd_recipes.runtime.agreement import all_gather, broadcast
from sd_recipes.runtime.out_of_memory import AtOnce, is_out_of_memory, tell_out_of_memory
from sd_recipes.runtime.output_dir import NO_ROOM
from sd_recipes.runtime.signals import Stopped, stop_request
from sd_recipes.runtime.trackers import Tracker, list_tables, read_metrics
from sd_recipes.training.objective import DenoisingLoss
from sd_recipes.training.state import Progress, TrainState

logger = logging.getLogger(__name__)

NAMED = 20  # held-out rows that cannot be used, in a warning


@dataclass
class Share:
    """One process's share of a validation."""

    # Of each kind of weights and set of rows, where there was memory for them.
    errors: dict[tuple[str, str], pa.Table] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)  # held-out rows that cannot be used, and why
    thumbnails: dict[tuple[str, int], bytes] = field(default_factory=dict)  # by set and row
    pictures: dict[int, Image.Image] = field(default_factory=dict)  # by the prompt's number


@dataclass
class Validator:
    """Validates what a run has learned: its errors on fixed samples, its pictures and their image-text score.

    Samples and prompts are shared out to the processes; each has the weights that are evaluated.
    """

    recipe: Recipe
    accelerator: Accelerator
    family: Family
    components: Components
    encoder: LatentEncoder
    objective: DenoisingLoss
    samples: dict[str, FixedSamples]  # by set: of held-out rows and of as many training rows, or none
    watched: WatchedRows | None  # what the samples are of
    prompts: list[str]
    score: ImageTextScore | None  # on the first process
    picture_size: tuple[int, int]  # (height, width)
    samples_at_once: AtOnce
    pictures_at_once: AtOnce
    bad_rows: dict[str, str] = field(default_factory=dict)  # held-out rows that cannot be used, and why
    # On the first process: the errors of the run's first validation, its held-out losses by step, and whether it has
    # written what the rows are.
    before: pa.Table | None = None
    losses: dict[int, float] | None = None
    has_written_rows: bool = False

    @property
    def has_work(self) -> bool:
        """Whether a validation is more than a moment at which the run's page is written."""
        return bool(self.samples or self.prompts)

    def is_due(self, progress: Progress, plan: MicroBatch) -> bool:
        """Every so many steps; or, as in diffusers' script, after the first epoch and then every so many."""
        if self.recipe.validation_steps:
            return progress.global_step % self.recipe.validation_steps == 0
        return plan.ends_epoch and plan.epoch % self.recipe.validation_epochs == 0

    def is_due_at_start(self, progress: Progress, metrics: Path) -> bool:
        """Before training, where there are held-out rows; or if the run ended before it had validated its last step."""
        if progress.global_step == 0:
            return bool(self.samples) or self.recipe.validate_before_training
        return progress.awaits_validation and not self._was_done(progress.global_step, metrics)

    def _was_done(self, step: int, metrics: Path) -> bool:
        if self.samples or self.score:
            done = any(line["step"] == step and FIGURES.keys() & line.keys() for line in read_metrics(metrics))
        else:
            done = not self.prompts or self._grid_path(step).is_file()
        return broadcast(done)

    def _grid_path(self, step: int) -> Path:
        return Path(self.recipe.output_dir) / "samples" / f"step-{step:06d}.png"

    def best_so_far(self, metrics: Path) -> Best | None:
        """The best validation in a run's metrics; the same on all processes, which all have to call it."""
        return broadcast(best_of(self._losses_so_far(metrics)) if self.accelerator.is_main_process else None)

    def _losses_so_far(self, metrics: Path) -> dict[int, float]:
        """Held-out losses by step, on the first process: read once, since a full disk may keep later ones out."""
        if self.losses is None:
            self.losses = held_out_losses(read_metrics(metrics))
        return self.losses

    @torch.no_grad()
    def __call__(self, state: TrainState, tracker: Tracker) -> Best | None:
        """Validate the weights; log, and write the table of errors and the grid of pictures.

        Returns the best validation so far, the same on all processes; None if there is no held-out loss. Abandoned as
        soon as a process is asked to end: all of them then stop at the end of the step. Every process has to call it. A
        process leaves out what it has no memory for.
        """
        progress = state.progress
        if not self.has_work:
            progress.awaits_validation = False
            return None
        shares = all_gather(self._share(state))
        finished = [each for each in shares if each is not None]
        if len(finished) < len(shares):
            return None
        progress.awaits_validation = False
        try:
            self._conclude(finished, progress.global_step, tracker)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            logger.warning("What a validation leaves cannot be written (%s): training continues.", error)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tell_out_of_memory("this validation", error)
        return self.best_so_far(tracker.path)

    @torch.no_grad()
    def errors(self) -> pa.Table | None:
        """The errors of the components' weights as they are, sorted; the same table on all processes.

        None if there was no memory for them. Every process has to call it. Raises Stopped.
        """
        share: Share | None = Share()
        assert share is not None
        try:
            with self.encoder.on_device(), self.evaluating():
                self._add_errors(share, RAW)
        except Stopped:
            share = None
        shares = [each for each in all_gather(share) if each is not None]
        stop_request.check("while weights were evaluated")
        return self._table(shares)

    # Of one process

    def _share(self, state: TrainState) -> Share | None:
        """This process's share of a validation of the evaluated weights, and of the others; None if asked to stop."""
        share: Share | None = Share()
        begun = state.progress.global_step > 0
        draws = begun or self.recipe.validate_before_training
        kinds = ([AVERAGED, RAW] if begun else [AVERAGED]) if state.is_averaged else [RAW]
        for weights in kinds:
            # Entered on all processes, whatever has happened on one of them: sharded parts are gathered.
            with state.evaluated(self.components, averaged=weights == AVERAGED):
                try:
                    if share is not None:
                        with self.encoder.on_device(), self.evaluating():
                            self._add_errors(share, weights)
                            if weights == kinds[0] and draws:
                                self._add_pictures(share)
                except Stopped:
                    share = None
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    tell_out_of_memory("this validation", error)
        if share is not None and not begun and state.is_averaged:  # both kinds are the same
            share.errors |= {(which, RAW): errors for (which, _), errors in share.errors.items()}
        return share

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within this context UNet and text encoder evaluate, the UNet on the device: it may have been gathered.

        A compiled one is not, since it would be compiled anew for every shape that is evaluated.
        """
        models = [self.components.unet.to(self.accelerator.device)]
        models += [getattr(self.components, name) for name in self.family.text_models]
        were_training = [model for model in models if model.training]
        for model in were_training:
            model.eval()
        try:
            with torch.compiler.set_stance("force_eager") if self.recipe.compile else nullcontext():
                yield
        finally:
            for model in were_training:
                model.train()

    @property
    def _own(self) -> slice:
        return slice(self.accelerator.process_index, None, self.accelerator.num_processes)

    def _add_errors(self, share: Share, weights: str) -> None:
        """Add the errors of this process's samples, with the UNet as it is. Raises Stopped."""
        for which, samples in self.samples.items():
            errors = self.samples_at_once.attempt(
                partial(
                    samples.errors,
                    self._latents,
                    partial(self.family.encode_text, self.components),
                    self._losses,
                    self.accelerator.device,
                    bar=self.accelerator.is_local_main_process,
                )
            )
            if errors is not None:
                share.errors[which, weights] = errors
            if which == HELD_OUT:
                share.bad |= samples.bad
            share.thumbnails |= {(which, row): picture for row, picture in samples.thumbnails.items()}

    def _latents(self, batch: Batch) -> torch.Tensor:
        return self.encoder.sample(batch.all_moments(self.encoder.encode), batch.posterior_noise)

    def _losses(self, latents: torch.Tensor, states: TextStates, batch: Batch) -> torch.Tensor:
        conditioning = self.family.conditioning(states, batch)
        with self.accelerator.autocast():
            return self.objective(
                self.components.unet,
                latents,
                conditioning,
                batch.timesteps,
                batch.noise,
                latent_weights=batch.latent_weights,
            )

    def _add_pictures(self, share: Share) -> None:
        """Add this process's pictures. Raises Stopped."""
        numbers = range(len(self.prompts))[self._own]
        if numbers:
            pipeline = drawing_pipeline(self.family, self.components, self.recipe.validation_sampler)
            ask = partial(self.family.prompt_arguments, self.components)
            draw = partial(draw_pictures, pipeline, ask, self.prompts, self.recipe, self.picture_size, numbers)
            with self.accelerator.autocast():
                pictures = self.pictures_at_once.attempt(draw)
            share.pictures = dict(zip(numbers, pictures or [], strict=False))

    # Of all processes

    def _table(self, shares: list[Share]) -> pa.Table | None:
        """All processes' errors; None if one had no memory for some, or if no held-out row can be used."""
        kinds = {kind for share in shares for kind in share.errors}
        if not kinds or any(share.errors.keys() != kinds for share in shares):
            return None
        table = sorted_table([of_set(share.errors[kind], *kind) for share in shares for kind in kinds])
        return table if HELD_OUT in table["set"].to_pylist() else None

    def _conclude(self, shares: list[Share], step: int, tracker: Tracker) -> None:
        """Write the errors, figures and pictures of all processes to the trackers and to the run's folder."""
        self._tell_bad_rows(shares)
        if not self.accelerator.is_main_process:
            return
        figures: dict[str, float] = {}
        table = self._table(shares)
        if table is not None:
            figures = self._figures(table, step, tracker.path)
        try:
            if table is not None:
                self._write_errors(table, shares, step)
            figures |= self._conclude_pictures(shares, step, tracker)
        finally:  # the loss is not lost with a picture
            if figures:
                tracker.log(figures, step)

    def _figures(self, table: pa.Table, step: int, metrics: Path) -> dict[str, float]:
        if self.before is None:
            self.before = self._table_before(table)
        figures = figures_of(table, self.before, len(self.objective.schedule.snr))
        losses = self._losses_so_far(metrics)
        if math.isfinite(figures[LOSS]):
            losses[step] = figures[LOSS]
        if best := best_of(losses):
            figures["best_step"] = best.step
        return figures

    def _table_before(self, table: pa.Table) -> pa.Table:
        """The table of the run's first validation: this one, if it is that."""
        found = list_tables(Path(self.recipe.output_dir))
        if not found:
            return table
        try:
            return read_table(found[0])
        except (OSError, pa.ArrowException) as error:
            logger.warning(
                "%s cannot be read (%s): the excess of the losses is over those of this validation instead.",
                found[0], one_line(error),
            )  # fmt: skip
            return table

    def _write_errors(self, table: pa.Table, shares: list[Share], step: int) -> None:
        """Write the table, and once what its rows are. Raises OSError."""
        assert self.watched is not None
        output_dir = Path(self.recipe.output_dir)
        about = {
            "step": step,
            "prediction_type": self.objective.prediction_type,
            "num_train_timesteps": len(self.objective.schedule.snr),
        }
        write_table(table, table_path(output_dir, step), about)
        if not self.has_written_rows:
            self.watched.write(output_dir, {key: each for share in shares for key, each in share.thumbnails.items()})
            self.has_written_rows = True

    def _conclude_pictures(self, shares: list[Share], step: int, tracker: Tracker) -> dict[str, float]:
        """Write the grid of all processes' pictures, if there are all; returns their score, if asked for."""
        drawn = {number: picture for share in shares for number, picture in share.pictures.items()}
        if not drawn or len(drawn) < len(self.prompts):
            return {}
        pictures = [drawn[number] for number in range(len(self.prompts))]
        path = self._grid_path(step)
        path.parent.mkdir(exist_ok=True)
        save_whole(picture_grid(pictures, in_texts(redacted, self.prompts)), path)
        tracker.log_pictures(pictures, step)
        return {"image_text_score": self.score(pictures, self.prompts)} if self.score else {}

    def _tell_bad_rows(self, shares: list[Share]) -> None:
        """Name the held-out rows that cannot be used, once; without any other, there is nothing to evaluate."""
        if not self.samples:
            return
        num_rows = self.samples[HELD_OUT].num_rows
        bad = {row: why for share in shares for row, why in share.bad.items()}
        if new := [row for row in bad if row not in self.bad_rows]:
            self.bad_rows |= bad
            rest = f" and {len(new) - NAMED} more" if len(new) > NAMED else ""
            logger.warning(
                "%d of %d held-out rows cannot be used and are left out of the held-out loss: %s%s",
                len(self.bad_rows), num_rows, "; ".join(f"{row}: {bad[row]}" for row in new[:NAMED]), rest,
            )  # fmt: skip
        if len(self.bad_rows) == num_rows:
            logger.warning("No row of --validation_split can be used: there is no held-out loss.")
            self.samples = {}
