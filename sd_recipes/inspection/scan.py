"""The pass over all rows: read here, images checked in worker processes, results gathered in the rows' order."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm import tqdm

from sd_recipes.data.buckets import Buckets
from sd_recipes.data.first_words import example_captions
from sd_recipes.data.masks import masks_in_words
from sd_recipes.data.rows import join_rows, load_sources, load_streams
from sd_recipes.errors import RecipeError
from sd_recipes.inspection.caption_checks import CaptionSummary
from sd_recipes.inspection.findings import Findings, kinds
from sd_recipes.inspection.image_checks import ImageSettings, ImageSummary, picture_name
from sd_recipes.inspection.settings import Inspection
from sd_recipes.inspection.workers import Images, ImageWorkers

CHUNK_ROWS = 32
CHUNK_BYTES = 16 * 2**20

Row = dict[str, Any]


class Rows:
    """The rows to inspect, as (number, row): all of them, or `max_rows` drawn at random; from a stream, the first ones.

    `total` is None where it is not known. Raises RecipeError for data that cannot be read.
    """

    def __init__(self, config: Inspection) -> None:
        self.config, self.image_column = config, config.image_column
        self.max_rows = config.max_rows
        self._rows: datasets.Dataset | None = None
        self.total: int | None
        self.available: int | None = None
        if config.streaming:
            streams = load_streams(config, cache_dir=config.cache_dir, repeats=False)
            self._streams = [stream.rows for stream in streams]
            self.recognised = [stream.recognised for stream in streams]
            self.total = self.max_rows
            return
        # Each picture once, however often it is trained on.
        sources = load_sources(config, cache_dir=config.cache_dir, repeats=False)
        self.recognised = [source.recognised for source in sources]
        self._rows = join_rows([source.rows for source in sources], config.max_train_samples, seed=0)
        if self.image_column not in self._rows.column_names:
            raise RecipeError(f"{config.sources[0].flag} is a cache of latents: inspect the images it was made from")
        self.available = len(self._rows)
        if config.masked_loss:
            self.recognised[0].notes.append(masks_in_words(self._rows, config))
        self.total = min(self.available, self.max_rows or self.available)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        if self._rows is None:
            yield from enumerate(itertools.islice(itertools.chain(*self._streams), self.max_rows))
            return
        numbers: range | np.ndarray = range(len(self._rows))
        if self.max_rows is not None and self.max_rows < len(numbers):
            numbers = np.sort(np.random.default_rng(0).choice(len(numbers), self.max_rows, replace=False))
        for start in range(0, len(numbers), CHUNK_ROWS):
            some = numbers[start : start + CHUNK_ROWS]
            columns = self._rows[some]
            for place, number in enumerate(some):
                yield int(number), {name: values[place] for name, values in columns.items()}

    def examples(self) -> list[str]:
        """Some captions; none of a stream, which would be opened for them."""
        return [] if self._rows is None else example_captions(self._rows, self.config)

    def read(self, number: int) -> Row | None:
        """The row with this number; None for a stream, whose rows have gone by."""
        return self._rows[number] if self._rows is not None else None

    def paths(self) -> Iterator[str]:
        """The image paths of all rows, sampled or not; not for a stream."""
        assert self._rows is not None
        images = self._rows.select_columns([self.image_column])
        for start in range(0, len(images), 1000):
            for encoded in images[start : start + 1000][self.image_column]:
                if encoded and encoded["path"]:
                    yield encoded["path"]


@dataclass
class Scan:
    """Everything that one pass gives; only the row numbers and digests grow, 32 bytes a row with the captions'."""

    captions: CaptionSummary
    images: ImageSummary = field(default_factory=ImageSummary)
    findings: Findings = field(default_factory=Findings)
    num_rows: int = 0
    num_bad: int = 0  # rows that cannot be trained on
    samples: list[tuple[int, str, Row]] = field(default_factory=list)  # (number, name, row), drawn at random
    rows: array[int] = field(default_factory=lambda: array("I"))  # rows that decoded
    contents: array[int] = field(default_factory=lambda: array("Q"))  # digests of their files
    looks: array[int] = field(default_factory=lambda: array("Q"))  # their perceptual hashes


def scan(rows: Rows, config: Inspection, tokenizer: Any | None, num_samples: int, workers: ImageWorkers) -> Scan:
    """Inspect all of `rows`. Raises RecipeError if one of the workers dies."""
    result = Scan(CaptionSummary(config, tokenizer))
    buckets = None
    if config.aspect_ratio_buckets or config.bucket_step <= config.resolution:
        buckets = Buckets(config.resolution, config.bucket_step, config.max_upscale)
    settings = ImageSettings(
        resolution=config.resolution,
        buckets=buckets,
        uses_buckets=config.aspect_ratio_buckets,
        max_upscale=config.max_upscale,
        max_image_megapixels=config.max_image_megapixels,
        root=config.train_data_dir and str(Path(config.train_data_dir)),
    )
    bad_kinds = {name for name, kind in kinds(config).items() if kind.severity == "bad"}
    good = _Reservoir(result.samples, num_samples)
    with tqdm(total=rows.total, desc="inspecting", unit="row", mininterval=0.5) as bar:
        for chunk, images in workers.inspect(_chunks(rows, config.image_column), settings):
            named = [
                (number, picture_name(row[config.image_column], number, settings.root), row) for number, row in chunk
            ]
            findings = images.findings + result.captions.update(named)
            bad = {finding.row for finding in findings if finding.kind in bad_kinds}
            result.images.merge(images.summary)
            result.findings.add(sorted(findings, key=lambda finding: finding.row or 0))
            result.num_rows += len(chunk)
            result.num_bad += len(bad)
            for numbers, found in (
                (result.rows, images.rows),
                (result.contents, images.contents),
                (result.looks, images.looks),
            ):
                numbers.frombytes(found.tobytes())
            good.offer(entry for entry in named if entry[0] not in bad)
            bar.update(len(chunk))
    result.samples.sort(key=lambda sample: sample[0])
    return result


def _chunks(rows: Iterable[tuple[int, Row]], image_column: str) -> Iterator[tuple[list[tuple[int, Row]], Images]]:
    """Up to CHUNK_ROWS rows and about CHUNK_BYTES bytes at a time, and their images."""
    chunk: list[tuple[int, Row]] = []
    images: Images = []
    size = 0
    for number, row in rows:
        chunk.append((number, row))
        images.append((number, row[image_column]))
        size += len((row[image_column] or {}).get("bytes") or b"")
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk, images
            chunk, images, size = [], [], 0
    if chunk:
        yield chunk, images


class _Reservoir:
    """A random sample of fixed size from rows whose number is not known (Vitter 1985, algorithm R)."""

    def __init__(self, kept: list[tuple[int, str, Row]], size: int) -> None:
        self.kept, self.size = kept, size
        self._seen = 0
        self._rng = np.random.default_rng(0)

    def offer(self, rows: Iterable[tuple[int, str, Row]]) -> None:
        for row in rows:
            self._seen += 1
            if len(self.kept) < self.size:
                self.kept.append(row)
            elif (place := int(self._rng.integers(self._seen))) < self.size:
                self.kept[place] = row
