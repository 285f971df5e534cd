"""What a run has learned: loss on held-out rows under fixed noise, and pictures of fixed prompts, on all processes."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from sd_recipes.data.batches import BatchBuilder
from sd_recipes.data.draws import generator
from sd_recipes.data.order import STRATA_PURPOSE, MicroBatch
from sd_recipes.evaluation.metrics import ImageTextScore
from sd_recipes.evaluation.pictures import BROKEN_OFF, draw_pictures, drawing_pipeline, picture_grid, save_whole
from sd_recipes.model.components import Components
from sd_recipes.model.family import Family
from sd_recipes.model.latents import LatentEncoder
from sd_recipes.recipe import Recipe
from sd_recipes.redaction import in_texts, redacted
from sd_recipes.runtime.agreement import all_gather, broadcast, wait_for_all
from sd_recipes.runtime.out_of_memory import AtOnce, is_out_of_memory, tell_out_of_memory
from sd_recipes.runtime.output_dir import NO_ROOM
from sd_recipes.runtime.signals import Stopped, stop_request
from sd_recipes.runtime.trackers import Tracker, read_metrics
from sd_recipes.training.objective import DenoisingLoss
from sd_recipes.training.state import Progress, TrainState

logger = logging.getLogger(__name__)

# The same noise for every run and every step, whatever the run's seed, so that losses can be compared.
HELD_OUT_SEED = 0
# With fewer (row, timestep, noise) samples, the loss of a small split says more about the noise than about the model.
MIN_HELD_OUT_SAMPLES = 256
NAMED = 20  # held-out rows that cannot be used, in a warning
FIGURES = {"validation_loss": "held-out loss", "image_text_score": "image-text score"}


@dataclass
class Share:
    """One process's share of a validation."""

    loss: float = 0.0  # summed over its held-out samples
    weight: float = 0.0  # the number of those that count
    bad: dict[str, str] = field(default_factory=dict)  # held-out rows that cannot be used, and why
    has_loss: bool = False  # whether it got through its held-out samples
    pictures: dict[int, Image.Image] = field(default_factory=dict)  # by the prompt's number


@dataclass
class Validator:
    """Validates what a run has learned: its held-out loss, its pictures and their image-text score.

    Rows and prompts are shared out to the processes; each has the weights that are evaluated.
    """

    recipe: Recipe
    accelerator: Accelerator
    family: Family
    components: Components
    encoder: LatentEncoder
    objective: DenoisingLoss
    held_out: BatchBuilder | None
    score: ImageTextScore | None  # on the first process
    held_out_size: tuple[int, int]  # (height, width)
    picture_size: tuple[int, int]
    held_out_at_once: AtOnce
    pictures_at_once: AtOnce
    bad_rows: dict[str, str] = field(default_factory=dict)  # held-out rows that cannot be used, and why

    def is_due(self, progress: Progress, plan: MicroBatch) -> bool:
        """Every so many steps; or, as in diffusers' script, after the first epoch and then every so many."""
        if self.recipe.validation_steps:
            return progress.global_step % self.recipe.validation_steps == 0
        return plan.ends_epoch and plan.epoch % self.recipe.validation_epochs == 0

    def is_due_at_start(self, progress: Progress, metrics: Path) -> bool:
        """Before training, if that is asked for; or if the run ended before it had validated its last step."""
        if progress.global_step == 0 and self.recipe.validate_before_training:
            return True
        return progress.awaits_validation and not self._was_done(progress.global_step, metrics)

    def _was_done(self, step: int, metrics: Path) -> bool:
        if self.recipe.validation_split or self.recipe.validation_clip_model:
            done = any(line["step"] == step and FIGURES.keys() & line.keys() for line in read_metrics(metrics))
        else:
            done = not self.recipe.validation_prompts or self._grid_path(step).is_file()
        return broadcast(done)

    def _grid_path(self, step: int) -> Path:
        return Path(self.recipe.output_dir) / "samples" / f"step-{step:06d}.png"

    @torch.no_grad()
    def __call__(self, state: TrainState, tracker: Tracker) -> None:
        """Validate the weights that are exported; log, and write the grid of pictures.

        Abandoned as soon as a process is asked to end: all of them then stop at the end of the step. Every process has
        to call it. A process leaves out what it has no memory for.
        """
        progress = state.progress
        if self.held_out is None and not self.recipe.validation_prompts:
            progress.awaits_validation = False
            return
        share: Share | None = Share()
        with state.evaluated(self.components):
            try:
                with self.encoder.on_device():
                    share = self._own_share()
            except Stopped:
                share = None
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                tell_out_of_memory("this validation", error)
        shares = all_gather(share)
        finished = [each for each in shares if each is not None]
        if len(finished) < len(shares):
            return
        progress.awaits_validation = False
        try:
            self._conclude(finished, progress.global_step, tracker)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            logger.warning("The validation's pictures cannot be written (%s): training continues.", error)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tell_out_of_memory("this validation", error)
        wait_for_all()

    def _own_share(self) -> Share:
        """This process's share of a validation. Raises Stopped."""
        share, unet = Share(), self.components.unet.to(self.accelerator.device)  # from host memory, if it was gathered
        was_training = unet.training
        unet.eval()
        try:
            if self.held_out is not None:
                share = self.held_out_at_once.attempt(self._held_out_share) or share
            numbers = range(len(self.recipe.validation_prompts or []))[self._own]
            if numbers:
                pipeline = drawing_pipeline(self.family, self.components, self.recipe.validation_sampler)
                prompts = self.recipe.validation_prompts or []
                draw = partial(draw_pictures, pipeline, prompts, self.recipe, self.picture_size, numbers)
                with self.accelerator.autocast():
                    pictures = self.pictures_at_once.attempt(draw)
                share.pictures = dict(zip(numbers, pictures or [], strict=False))
        finally:
            unet.train(was_training)
        return share

    @property
    def _own(self) -> slice:
        return slice(self.accelerator.process_index, None, self.accelerator.num_processes)

    def _held_out_share(self, at_once: int) -> Share:
        """Loss of this process's held-out samples, `at_once` of them at a time, with the UNet as it is.

        Timesteps are stratified over all samples, and over those of each row, so that it meets early and late ones.
        """
        assert self.held_out is not None
        assert self.held_out.rows is not None
        num_rows = len(self.held_out.rows)
        num_samples = num_rows * math.ceil(MIN_HELD_OUT_SAMPLES / num_rows)
        strata = held_out_strata(num_rows, num_samples // num_rows).reshape(-1)
        own = np.arange(num_samples)[self._own]
        share = Share(has_loss=True)
        sums = [torch.zeros(2, device=self.accelerator.device)]
        for start in tqdm(
            range(0, len(own), at_once),
            desc="Held-out loss",
            leave=False,
            disable=not self.accelerator.is_local_main_process,
        ):
            stop_request.check(BROKEN_OFF)
            chosen = own[start : start + at_once]
            plan = MicroBatch(
                rows=chosen % num_rows,
                positions=chosen,
                strata=strata[chosen],
                global_batch_size=num_samples,
                weight=1.0,
                is_last=True,
                samples_seen=0,
                ends_epoch=False,
                epoch=0,
                size=self.held_out_size,
            )
            batch = self.held_out[plan]
            share.bad |= dict(batch.bad)
            states = self.family.encode_text(self.components, batch.input_ids)
            batch = batch.to(self.accelerator.device)
            latents = self.encoder.sample(batch.all_moments(self.encoder.encode), batch.posterior_noise)
            conditioning = self.family.conditioning(states, batch)
            with self.accelerator.autocast():
                losses = self.objective(self.components.unet, latents, conditioning, batch.timesteps, batch.noise)
            sums.append(torch.stack([(batch.weights * losses).sum(), batch.weights.sum()]))
        # Added up in float64, which Apple's GPUs lack.
        share.loss, share.weight = torch.stack(sums).cpu().double().sum(dim=0).tolist()
        return share

    def _conclude(self, shares: list[Share], step: int, tracker: Tracker) -> None:
        """Write the figures and pictures of all processes to the trackers and to the run's folder."""
        figures: dict[str, float] = {}
        if self.held_out is not None and all(share.has_loss for share in shares):
            loss = self._held_out_loss(shares)
            if loss is not None:
                figures["validation_loss"] = loss
        try:
            if self.accelerator.is_main_process:
                figures |= self._conclude_pictures(shares, step, tracker)
        finally:  # the loss is not lost with a picture
            if self.accelerator.is_main_process and figures:
                tracker.log(figures, step)

    def _conclude_pictures(self, shares: list[Share], step: int, tracker: Tracker) -> dict[str, float]:
        """Write the grid of all processes' pictures, if there are all; returns their score, if asked for."""
        drawn = {number: picture for share in shares for number, picture in share.pictures.items()}
        prompts = self.recipe.validation_prompts or []
        if not drawn or len(drawn) < len(prompts):
            return {}
        pictures = [drawn[number] for number in range(len(prompts))]
        path = self._grid_path(step)
        path.parent.mkdir(exist_ok=True)
        save_whole(picture_grid(pictures, in_texts(redacted, prompts)), path)
        tracker.log_pictures(pictures, step)
        return {"image_text_score": self.score(pictures, prompts)} if self.score else {}

    def _held_out_loss(self, shares: list[Share]) -> float | None:
        """Mean loss over the held-out samples of all processes; None if none of the rows can be used."""
        bad = {row: why for share in shares for row, why in share.bad.items()}
        if new := [row for row in bad if row not in self.bad_rows]:
            self.bad_rows |= bad
            rest = f" and {len(new) - NAMED} more" if len(new) > NAMED else ""
            assert self.held_out is not None
            assert self.held_out.rows is not None
            logger.warning(
                "%d of %d held-out rows cannot be used and are left out of the held-out loss: %s%s",
                len(self.bad_rows), len(self.held_out.rows),
                "; ".join(f"{row}: {bad[row]}" for row in new[:NAMED]), rest,
            )  # fmt: skip
        weight = sum(share.weight for share in shares)
        if not weight:
            logger.warning("No row of --validation_split can be used: there is no held-out loss.")
            self.held_out = None
            return None
        return sum(share.loss for share in shares) / weight


def held_out_strata(num_rows: int, num_passes: int) -> np.ndarray:
    """(num_passes, num_rows): which of num_passes * num_rows slices of the timesteps each row gets in each pass.

    Every slice comes once, and each row gets a random one from each pass's: no row is tied to a part of the timesteps,
    so that one that cannot be used leaves no part out.
    """
    return np.stack(
        [
            number * num_rows + generator(HELD_OUT_SEED, number, STRATA_PURPOSE).permutation(num_rows)
            for number in range(num_passes)
        ]
    )
