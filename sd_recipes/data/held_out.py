"""Which rows are held out of training, and which training rows every validation looks at beside them.

A row is known by its picture: the length of the file, and pieces from its beginning to its end. So it stays on its side
of a share when the data grow, move or come in another order, and rows with the same picture are on one side.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from sd_recipes.data.bad_rows import NAMED, row_name
from sd_recipes.data.draws import generator
from sd_recipes.data.encoded import Encoded
from sd_recipes.data.shards import with_bytes
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe

logger = logging.getLogger(__name__)

HELD_OUT_SEED = 0  # whatever the run's seed, so that runs can be compared
PIECES, PIECE_BYTES = 5, 2**13  # of a picture's file, evenly spaced; a smaller one is read whole
CHUNK_ROWS = 256
CHOICE_PURPOSE = 0x4E1D  # keeps the key of this choice apart from all others
SHARE_ROWS_READ = 3  # of a stream: how many times as many as it should take to find the held-out rows


@dataclass(frozen=True)
class FixedRows:
    """Rows that every validation looks at, and their numbers in what they were chosen from."""

    rows: datasets.Dataset
    numbers: np.ndarray  # (N,)

    def __len__(self) -> int:
        return len(self.rows)


def choose(rows: datasets.Dataset, number: int) -> FixedRows:
    """At most `number` of the rows, always the same ones of the same rows, in their order."""
    numbers = np.arange(len(rows))
    if number < len(rows):
        numbers = np.sort(generator(HELD_OUT_SEED, len(rows), CHOICE_PURPOSE).permutation(len(rows))[:number])
        rows = rows.select(numbers)
    return FixedRows(rows, numbers)


# ------------------------------------------------------------------------------------------ who a row is


def identity(image: Encoded | bytes | None) -> bytes:
    """16 bytes that tell an image {"bytes", "path"}, or moments, from others, and are the same for equal files.

    No image, and a file that cannot be read, have the identity of an empty one.
    """
    content: bytes | None = image["bytes"] if isinstance(image, dict) else image
    digest = hashlib.blake2b(digest_size=16)
    if content is not None:
        _add_pieces(digest, io.BytesIO(content), len(content))
    elif isinstance(image, dict) and image["path"]:
        with contextlib.suppress(OSError), open(image["path"], "rb", buffering=0) as file:  # found bad where it is used
            _add_pieces(digest, file, os.fstat(file.fileno()).st_size)
    return digest.digest()


def _add_pieces(digest: Any, file: Any, size: int) -> None:
    digest.update(b"%d:" % size)
    if size <= PIECES * PIECE_BYTES:
        digest.update(file.read(size))
        return
    for number in range(PIECES):
        file.seek(number * (size - PIECE_BYTES) // (PIECES - 1))
        digest.update(file.read(PIECE_BYTES))


def is_held_out(identity: bytes, share: float) -> bool:
    """Whether a row of this identity is in the held-out share of all rows."""
    return int.from_bytes(identity[:8], "big") < share * 2**64


def identities(rows: datasets.Dataset, image_column: str) -> list[bytes]:
    """The identity of every row."""
    return _of_images(rows, image_column, lambda images: list(map(identity, images.to_pylist())), "Telling rows apart")


def sizes(rows: datasets.Dataset, image_column: str) -> list[int]:
    """The size of each row's picture in bytes; -1 where there is none."""

    def of(images: pa.Array) -> list[int]:
        if not pa.types.is_struct(images.type):
            return pc.binary_length(images).to_pylist()
        lengths = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
        paths = pc.struct_field(images, "path").to_pylist()
        return [_file_size(path) if length is None else length for length, path in zip(lengths, paths, strict=True)]

    return _of_images(rows, image_column, of, "Comparing with held-out rows")


def _of_images(
    rows: datasets.Dataset, image_column: str, function: Callable[[pa.Array], list[Any]], what: str
) -> list[Any]:
    """What `function` gives for the images of each chunk of rows, one after the other; `what` names the bar."""
    bar = tqdm(total=len(rows), desc=what, unit="row", leave=False, disable=len(rows) < 2000)
    found: list[Any] = []
    with ThreadPoolExecutor() as readers, bar:
        for part in readers.map(function, _images(rows, image_column)):
            found += part
            bar.update(len(part))
    return found


def _images(rows: datasets.Dataset, image_column: str) -> Iterable[pa.Array]:
    """The images of rows, or their moments, a chunk at a time, as Arrow has them."""
    name = image_column if image_column in rows.column_names else "moments"
    column = rows.select_columns([name]).with_format("arrow")
    for start in range(0, len(rows), CHUNK_ROWS):
        yield column[start : start + CHUNK_ROWS][name].combine_chunks()


def _file_size(path: str | None) -> int:
    try:
        return os.stat(path or "").st_size
    except OSError:
        return -1


# ------------------------------------------------------------------------------------------ dividing rows


def held_out_numbers(parts: list[datasets.Dataset], config: Recipe) -> list[tuple[np.ndarray, np.ndarray]]:
    """For the rows of each source, the numbers of those to train on, and of those held out, each picture once.

    By the share, or the number of first rows, of --validation_split. Raises RecipeError if a side is empty.
    """
    known = [identities(rows, config.image_column) for rows in parts]
    first = set(list(dict.fromkeys(known[0]))[: config.held_out_first or 0])
    share = config.held_out_share or 0.0
    numbers, seen = [], set()
    for of_part in known:
        trained, held_out = [], []
        for number, each in enumerate(of_part):
            if each in first or is_held_out(each, share):
                if each not in seen:
                    held_out.append(number)
                seen.add(each)
            else:
                trained.append(number)
        numbers.append((np.array(trained, dtype=np.int64), np.array(held_out, dtype=np.int64)))
    num_rows = sum(map(len, parts))
    if not any(len(held_out) for _, held_out in numbers):
        raise RecipeError(
            f"--validation_split {config.validation_split} holds out none of {num_rows} rows: give a larger share, or "
            "a number of first rows"
        )
    if any(len(trained) == 0 for trained, _ in numbers):
        raise RecipeError(
            f"--validation_split {config.validation_split} leaves no row to train on, of {num_rows}: hold out fewer"
        )
    return numbers


def warn_of_rows_in_both(held_out: datasets.Dataset, rows: datasets.Dataset, config: Recipe) -> None:
    """Tell of held-out rows whose picture is also trained on: how many, and which."""
    column = config.image_column
    sizes_held_out = np.array(sizes(held_out, column))
    sizes_trained = np.array(sizes(rows, column))
    alike = np.flatnonzero(np.isin(sizes_trained, sizes_held_out) & (sizes_trained >= 0))
    if not len(alike):
        return
    trained = dict(zip(identities(rows.select(alike), column), alike.tolist(), strict=True))
    both = [(number, trained[each]) for number, each in enumerate(identities(held_out, column)) if each in trained]
    if both:
        named = "; ".join(
            f"{row_name(number, held_out[number].get(column))} is {row_name(other, rows[other].get(column))} there"
            for number, other in both[:NAMED]
        )
        logger.warning(
            "%d of %d held-out rows have a picture that is also trained on, so that the held-out loss says less of new "
            "pictures: %s. Remove them from one side, or hold out a share of the rows by --validation_split 0.05, "
            "which keeps equal pictures together.",
            len(both), len(held_out), named,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------ dividing streams


def divide_streams(
    streams: list[datasets.IterableDataset], config: Recipe
) -> tuple[list[datasets.IterableDataset], list[dict[str, Any]], list[dict[str, Any]]]:
    """Hold out a share of each stream, or the first rows of the first: streams of what is trained on, and rows.

    These are of both sides, held out and trained on, from the streams' first rows: --validation_rows each, or the
    number of first rows. Raises RecipeError if that leaves nothing on a side.
    """
    column, share, first = config.image_column, config.held_out_share, config.held_out_first or 0

    def known(row: dict[str, Any]) -> bytes:
        return identity(row.get(column, row.get("moments")))

    if share is None:
        begin = {known(with_bytes(row)) for row in streams[0].take(first)}
        read, limit = streams[:1], 2 * first + CHUNK_ROWS
    else:
        first, read = math.ceil(config.validation_rows / len(streams)), streams
        limit = SHARE_ROWS_READ * math.ceil(first / min(share, 1 - share)) + CHUNK_ROWS

    def is_trained(row: dict[str, Any]) -> bool:
        each = known(with_bytes(row))
        return each not in begin if share is None else not is_held_out(each, share)

    held_out: dict[bytes, dict[str, Any]] = {}
    trained: dict[bytes, dict[str, Any]] = {}
    num_read = 0
    with tqdm(total=first * len(read), desc="Held-out rows of the stream", unit="row", leave=False) as bar:
        for number, stream in enumerate(read, 1):
            for row in stream.take(limit):
                num_read += 1
                side = trained if is_trained(row) else held_out
                if len(side) < first * number:
                    row = with_bytes(row)
                    side.setdefault(known(row), row)
                bar.update(len(held_out) - bar.n)
                if min(len(held_out), len(trained)) == first * number:
                    break
    if not held_out or not trained:
        what, way_out = ("held out", "more") if trained else ("to train on", "fewer")
        raise RecipeError(
            f"--validation_split {config.validation_split} leaves nothing {what} of the stream's first {num_read} "
            f"rows: hold out {way_out}"
        )
    return [stream.filter(is_trained) for stream in streams], list(held_out.values()), list(trained.values())
