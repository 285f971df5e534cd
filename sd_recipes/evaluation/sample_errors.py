"""The squared error of each of a fixed set of samples (row, timestep, noise), from which all figures are derived.

The samples are the same at every validation of every run with the same rows. So curves are free of the noise of
timesteps, which is nearly all the noise of a training loss, and two models differ by what they have learned.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm.auto import tqdm

from sd_recipes.data.batches import Batch, BatchBuilder
from sd_recipes.data.draws import generator
from sd_recipes.data.held_out import HELD_OUT_SEED
from sd_recipes.data.order import STRATA_PURPOSE, MicroBatch
from sd_recipes.evaluation.pictures import BROKEN_OFF
from sd_recipes.runtime.signals import stop_request
from sd_recipes.runtime.trackers import VALIDATION
from sd_recipes.writing import replacing

THUMBNAIL = 96  # pixels, of the longer side
HELD_OUT, TRAIN = "held_out", "train"  # the sets of rows
AVERAGED, RAW = "averaged", "raw"  # the weights
SCHEMA = pa.schema(
    {"set": pa.string(), "weights": pa.string(), "row": pa.int32(), "timestep": pa.int32(), "loss": pa.float64()}
)
EMPTY = pa.schema([SCHEMA.field(name) for name in ("row", "timestep", "loss")]).empty_table()
METADATA = b"sd_recipes"

Encode = Callable[[Batch], torch.Tensor]  # latents (B, C, h, w) of a batch on the device
Losses = Callable[[torch.Tensor, Batch], torch.Tensor]  # of latents and their batch: (B,)


@dataclass
class FixedSamples:
    """One process's share of the samples of a set of rows; their latents are encoded once, since the VAE is frozen.

    Timesteps are stratified over all samples, and over those of each row, so that it meets early and late ones.
    """

    builder: BatchBuilder
    size: tuple[int, int]  # (height, width) of the images
    num_samples: int  # at least, over all processes: few rows come several times
    own: slice  # of all samples
    bad: dict[str, str] = field(default_factory=dict)  # rows that cannot be used, and why
    thumbnails: dict[int, bytes] = field(default_factory=dict)  # by row, of the pictures as the model sees them
    _kept: list[tuple[Batch, torch.Tensor]] = field(default_factory=list)  # batches without pixels, and latents

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

    def errors(self, encode: Encode, losses: Losses, device: torch.device, at_once: int, *, bar: bool) -> pa.Table:
        """Row, timestep and loss of each of these samples, `at_once` of them at a time. Raises Stopped."""
        if not self._kept:
            self._kept = list(self._encoded(encode, device, at_once, bar=bar))
        parts = [part for kept in self._kept for part in _split(*kept, at_once)]
        if not parts:  # fewer samples than processes
            return EMPTY
        found = []
        for batch, latents in tqdm(parts, desc="Validation", leave=False, disable=not bar):
            stop_request.check(BROKEN_OFF)
            found.append(losses(latents.to(device), batch.to(device)))
        usable = torch.cat([batch.weights for batch, _ in parts]).bool().numpy()
        return pa.table(
            {
                "row": pa.array(np.concatenate([batch.plan.rows for batch, _ in parts])[usable], pa.int32()),
                "timestep": pa.array(torch.cat([batch.timesteps for batch, _ in parts]).numpy()[usable], pa.int32()),
                # In float64 on the host, which Apple's GPUs lack.
                "loss": torch.cat(found).cpu().double().numpy()[usable],
            }
        )

    def _encoded(
        self, encode: Encode, device: torch.device, at_once: int, *, bar: bool
    ) -> Iterator[tuple[Batch, torch.Tensor]]:
        own = np.arange(self.num_rows * self.num_passes)[self.own]
        for start in tqdm(range(0, len(own), at_once), desc="Rows of the validation", leave=False, disable=not bar):
            stop_request.check(BROKEN_OFF)
            plan = self.plan(own[start : start + at_once])
            batch = self.builder[plan]
            self.bad |= dict(batch.bad)
            for place, pixels in zip(batch.to_encode.tolist(), batch.pixels, strict=True):
                row = int(plan.rows[place])
                if batch.weights[place] and row not in self.thumbnails:
                    self.thumbnails[row] = thumbnail(pixels)
            latents = encode(batch.to(device)).cpu()
            nothing = torch.zeros(0, dtype=torch.int64)
            yield replace(batch, pixels=batch.pixels[:0], to_encode=nothing, moments=None, records=[]), latents


def _split(batch: Batch, latents: torch.Tensor, at_once: int) -> Iterator[tuple[Batch, torch.Tensor]]:
    """In parts of `at_once`, of which there may be room for fewer than when they were encoded."""
    parts = batch.in_parts_of(at_once)
    yield from zip(parts, latents.split([len(part.weights) for part in parts]), strict=True)


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
