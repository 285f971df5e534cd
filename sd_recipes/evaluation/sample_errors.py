"""The squared error of each of a fixed set of samples (row, timestep, noise), from which all figures are derived.

The samples are the same at every validation of every run with the same rows. So curves are free of the noise of
timesteps, which is nearly all the noise of a training loss, and two models differ by what they have learned.
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm.auto import tqdm

from sd_recipes.data.batches import Batch, BatchBuilder, TrainingBatches
from sd_recipes.data.draws import generator
from sd_recipes.data.held_out import HELD_OUT_SEED
from sd_recipes.data.order import STRATA_PURPOSE, MicroBatch
from sd_recipes.evaluation.pictures import BROKEN_OFF
from sd_recipes.model.conditioning import MAX_TEXT_BYTES, TextStates
from sd_recipes.runtime.signals import stop_request
from sd_recipes.runtime.trackers import VALIDATION
from sd_recipes.writing import replacing

logger = logging.getLogger(__name__)

THUMBNAIL = 96  # pixels, of the longer side
HELD_OUT, TRAIN = "held_out", "train"  # the sets of rows
AVERAGED, RAW = "averaged", "raw"  # the weights
SCHEMA = pa.schema(
    {"set": pa.string(), "weights": pa.string(), "row": pa.int32(), "timestep": pa.int32(), "loss": pa.float64()}
)
EMPTY = pa.schema([SCHEMA.field(name) for name in ("row", "timestep", "loss")]).empty_table()
METADATA = b"sd_recipes"

Encode = Callable[[Batch], torch.Tensor]  # latents (B, C, h, w) of a batch on the device
EncodeText = Callable[[torch.Tensor], TextStates]  # of input_ids (B, L)
Losses = Callable[[torch.Tensor, TextStates, Batch], torch.Tensor]  # of latents, text states and their batch: (B,)


@dataclass(frozen=True)
class Kept:
    """What is encoded once of some samples, in the host's memory."""

    batch: Batch  # without pixels
    latents: torch.Tensor  # (B, C, h, w)
    states: TextStates | None  # None if they are to be encoded anew

    def in_parts_of(self, size: int) -> Iterator[Kept]:
        """Of `size` samples, of which there may be room for fewer than when they were encoded."""
        start = 0
        for part in self.batch.in_parts_of(size):
            own = slice(start, start + len(part.weights))
            states = None if self.states is None else {name: each[own] for name, each in self.states.items()}
            yield Kept(part, self.latents[own], states)
            start = own.stop


@dataclass
class FixedSamples:
    """One process's share of the samples of a set of rows.

    Their latents are encoded once, since the VAE is frozen; if the text models are, so are text states, up to
    MAX_TEXT_BYTES. Timesteps are stratified over all samples, and over those of each row, so that it meets early and
    late ones.
    """

    builder: BatchBuilder
    size: tuple[int, int]  # (height, width) of the images
    num_samples: int  # at least, over all processes: few rows come several times
    own: slice  # of all samples
    keeps_text: bool  # the text models are frozen
    num_workers: int = 0  # that read rows, while others are encoded
    pin_memory: bool = False
    bad: dict[str, str] = field(default_factory=dict)  # rows that cannot be used, and why
    thumbnails: dict[int, bytes] = field(default_factory=dict)  # by row, of the pictures as the model sees them
    _kept: list[Kept] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        assert self.builder.rows is not None
        return len(self.builder.rows)

    @property
    def num_passes(self) -> int:
        return math.ceil(self.num_samples / self.num_rows)

    def plan(self, positions: np.ndarray) -> MicroBatch:
        """The samples at these positions, (B,). The first `num_rows` of all are of each row once, in order."""
        return MicroBatch(
            rows=positions % self.num_rows,
            positions=positions,
            strata=stratify(self.num_rows, self.num_passes).reshape(-1)[positions],
            global_batch_size=self.num_rows * self.num_passes,
            weight=1.0,
            is_last=True,
            samples_seen=0,
            ends_epoch=False,
            epoch=0,
            size=self.size,
        )

    def errors(
        self,
        encode: Encode,
        encode_text: EncodeText,
        losses: Losses,
        device: torch.device,
        at_once: int,
        *,
        bar: bool,
    ) -> pa.Table:
        """Row, timestep and loss of each of these samples, `at_once` of them at a time. Raises Stopped."""
        if not self._kept:
            self._kept = list(self._encoded(encode, encode_text, device, at_once, bar=bar))
        parts = [part for kept in self._kept for part in kept.in_parts_of(at_once)]
        if not parts:  # fewer samples than processes
            return EMPTY
        found = []
        for part in tqdm(parts, desc="Validation", leave=False, disable=not bar):
            stop_request.check(BROKEN_OFF)
            states = part.states or encode_text(part.batch.input_ids)
            states = {name: each.to(device) for name, each in states.items()}
            found.append(losses(part.latents.to(device), states, part.batch.to(device)))
        batches = [part.batch for part in parts]
        usable = torch.cat([batch.weights for batch in batches]).bool().numpy()
        return pa.table(
            {
                "row": pa.array(np.concatenate([batch.plan.rows for batch in batches])[usable], pa.int32()),
                "timestep": pa.array(torch.cat([batch.timesteps for batch in batches]).numpy()[usable], pa.int32()),
                # In float64 on the host, which Apple's GPUs lack.
                "loss": torch.cat(found).cpu().double().numpy()[usable],
            }
        )

    def _encoded(
        self, encode: Encode, encode_text: EncodeText, device: torch.device, at_once: int, *, bar: bool
    ) -> Iterator[Kept]:
        own = np.arange(self.num_rows * self.num_passes)[self.own]
        plans = [self.plan(own[start : start + at_once]) for start in range(0, len(own), at_once)]
        read = TrainingBatches(
            self.builder, lambda *_: iter(plans), num_workers=self.num_workers, pin_memory=self.pin_memory
        )
        text_bytes, num_left_out = 0, 0
        with closing(read(0, len(plans))) as batches:
            for (batch,) in tqdm(
                batches, total=len(plans), desc="Rows of the validation", leave=False, disable=not bar
            ):
                stop_request.check(BROKEN_OFF)
                self.bad |= dict(batch.bad)
                for place, pixels in zip(batch.to_encode.tolist(), batch.pixels, strict=True):
                    row = int(batch.plan.rows[place])
                    if batch.weights[place] and row not in self.thumbnails:
                        self.thumbnails[row] = thumbnail(pixels)
                latents, states = encode(batch.to(device)).cpu(), None
                if self.keeps_text:
                    encoded = {name: each.cpu() for name, each in encode_text(batch.input_ids).items()}
                    text_bytes += sum(each.nbytes for each in encoded.values())
                    states = encoded if text_bytes <= MAX_TEXT_BYTES else None
                    num_left_out += 0 if states else len(batch.weights)
                nothing = torch.zeros(0, dtype=torch.int64)
                kept = replace(batch, pixels=batch.pixels[:0].clone(), to_encode=nothing, moments=None, records=[])
                yield Kept(kept, latents, states)
        if num_left_out:
            logger.info(
                "The captions of %d of %d samples are encoded anew at every validation: text states take %.1f GB, of "
                "which %.1f GB are kept.", num_left_out, len(own), text_bytes / 1e9, MAX_TEXT_BYTES / 1e9,
            )  # fmt: skip


def stratify(num_rows: int, num_passes: int) -> np.ndarray:
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


def thumbnail(pixels: torch.Tensor) -> bytes:
    """uint8 (3, H, W) to a small JPEG."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------ tables


def of_set(table: pa.Table, which: str, weights: str) -> pa.Table:
    """A table of errors with its set and weights named, as all tables have them."""
    named = {"set": pa.array([which] * len(table)), "weights": pa.array([weights] * len(table))}
    return pa.table({name: named[name] if name in named else table[name] for name in SCHEMA.names}, SCHEMA)


def sorted_table(tables: list[pa.Table]) -> pa.Table:
    """One table of all processes' errors, in an order that does not depend on how they were shared out."""
    order = [(name, "ascending") for name in ("weights", "set", "row", "timestep")]
    return pa.concat_tables(tables).sort_by(order)


def table_path(output_dir: Path, step: int) -> Path:
    return output_dir / VALIDATION / f"step-{step:06d}.parquet"


def write_table(table: pa.Table, path: Path, about: dict[str, Any]) -> None:
    """Write a table of errors with what it is `about`, whole or not at all. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as beside:
        pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(about).encode()}), beside)


def read_table(path: Path) -> pa.Table:
    """Raises OSError, or pyarrow's ArrowInvalid if it is no such table."""
    table = pq.read_table(path)
    return pa.table({name: table[name] for name in SCHEMA.names}, SCHEMA.with_metadata(table.schema.metadata))
