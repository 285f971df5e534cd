"""The rows of a stream's shards: read ahead, from any row on, and through outages."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets
import fsspec
import numpy as np

from sd_recipes.data.draws import generator
from sd_recipes.errors import RecipeError, RunError, one_line

logger = logging.getLogger(__name__)

SHARDS_PURPOSE = 0x57E0  # keeps the keys of its permutations apart from all others
OPEN_SHARDS = 4  # read in turn, row by row: mixes shards and hides latency
READ_AHEAD_ROWS = 32  # of each open shard
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two attempts
# What another attempt does not fix.
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, datasets.exceptions.DatasetNotFoundError)


class StreamLost(RunError):
    """The stream failed for longer than the run may wait."""

    status = 5


class StreamClosed(Exception):
    """The stream was closed while a thread was reading it."""


@dataclass(frozen=True)
class Shards:
    """One source: a stream whose shards can be read one at a time, from any row on."""

    stream: datasets.IterableDataset
    name: str
    outage_seconds: float
    is_local: bool = False  # what is wrong with a file on this machine does not go away

    @property
    def number(self) -> int:
        return self.stream.num_shards

    def rows(self, shard: int, start: int, closed: threading.Event) -> Iterator[dict[str, Any]]:
        """The rows of a shard from number `start` on; after an error, read again from the row where it occurred.

        Raises StreamLost when that has failed for `outage_seconds` on end, or at once where trying again is no use; and
        StreamClosed instead of trying again, once `closed` is set.
        """
        row, pause, failing_since = start, FIRST_PAUSE, None
        while True:
            try:
                part = self.stream.shard(num_shards=self.number, index=shard)
                for example in part.skip(row) if row else part:
                    yield with_bytes(example)
                    row, pause, failing_since = row + 1, FIRST_PAUSE, None
                return
            # datasets, fsspec, pyarrow, tarfile, huggingface_hub and HTTP clients fail in their own ways.
            except Exception as error:
                if closed.is_set():
                    raise StreamClosed from error
                words = f"{self.name}: shard {shard} at row {row}: {one_line(error, 200)}"
                if isinstance(error, PERMANENT):
                    raise StreamLost(f"{words}: the file is gone or forbidden") from error
                if self.is_local and not isinstance(error, OSError):  # which a network file system may recover from
                    raise StreamLost(f"{words}: the file is damaged") from error
                now = time.monotonic()
                failing_since = failing_since or now
                if now + pause - failing_since > self.outage_seconds:
                    raise StreamLost(
                        f"{words}: failing for {now - failing_since:.0f} s; run the same command when it is back, or "
                        "raise --stream_outage_minutes"
                    ) from error
                logger.warning("%s: trying again in %.0f s", words, pause)
                if closed.wait(pause):
                    raise StreamClosed from error
                pause = min(2 * pause, LONGEST_PAUSE)


class ReadAhead:
    """An iterator's rows, read by a thread ahead of their use, until `closed`; errors are raised when reached."""

    def __init__(self, rows: Iterator[dict[str, Any]], closed: threading.Event) -> None:
        self._rows, self._closed = rows, closed
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(READ_AHEAD_ROWS)
        self._next: tuple[str, Any] | None = None
        threading.Thread(target=self._read, name="shard", daemon=True).start()

    def _read(self) -> None:
        try:
            for row in self._rows:
                self._put("row", row)
                if self._closed.is_set():
                    return
            self._put("end", None)
        except Exception as error:
            self._put("error", error)

    def _put(self, kind: str, value: Any) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put((kind, value), timeout=0.5)
            except queue.Full:
                continue

    def peek(self) -> dict[str, Any] | None:
        """The next row, without taking it; None at the end."""
        while self._next is None:
            if self._closed.is_set():
                raise StreamClosed
            with contextlib.suppress(queue.Empty):
                self._next = self._queue.get(timeout=0.5)
        kind, value = self._next
        if kind == "error":
            raise value
        return value

    def take(self) -> None:
        """Move on to the row after the one that `peek` gave."""
        self._next = None


def with_bytes(example: dict[str, Any]) -> dict[str, Any]:
    """The row with the bytes of its images, where it only names remote files, as rows of streamed folders do."""
    found = {}
    for name, value in example.items():
        if isinstance(value, dict) and value.get("bytes", b"") is None and "://" in (value.get("path") or ""):
            with fsspec.open(value["path"], "rb") as file:
                found[name] = {**value, "bytes": file.read()}
    return {**example, **found}


@dataclass
class SourceReader:
    """The rows of one lane's shards of a source: open shards in turn, the others after them.

    Its `state` is the epoch, the next shard to open, whose turn it is, and (shard's number in the epoch's
    order, row) of each open one.
    """

    shards: Shards
    seed: int
    lane: int
    num_lanes: int
    part: int  # the source's number, which keeps its permutations apart from other sources'
    epoch: int = 0
    next_shard: int = 0
    turn: int = 0
    slots: list[list[int]] = field(default_factory=list)
    _open: list[ReadAhead] = field(default_factory=list)
    _closed: threading.Event = field(default_factory=threading.Event)

    @property
    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "next_shard": self.next_shard,
            "turn": self.turn,
            "slots": [list(slot) for slot in self.slots],
        }

    def restore(self, state: dict[str, Any]) -> None:
        assert not self._open, "it is restored before it reads"
        self.epoch, self.next_shard, self.turn = state["epoch"], state["next_shard"], state["turn"]
        self.slots = [list(slot) for slot in state["slots"]]
        if any(ordinal >= len(self._own_shards()) for ordinal, _ in self.slots):
            raise RecipeError(
                f"{self.shards.name} has {self.shards.number} shards, fewer than when the checkpoint was written in "
                "the middle of one that is gone: put it back, or start over with --overwrite"
            )

    def _own_shards(self) -> np.ndarray:
        """This lane's shards in the order of the epoch; all of them, where there are fewer than lanes."""
        order = generator(self.seed, self.epoch, SHARDS_PURPOSE, part=self.part).permutation(self.shards.number)
        return order if self._splits_rows else order[self.lane :: self.num_lanes]

    @property
    def _splits_rows(self) -> bool:
        return self.shards.number < self.num_lanes

    def peek(self) -> dict[str, Any] | None:
        """The next row, without taking it; None once all of the epoch are taken, and the next epoch begins.

        Raises StreamClosed once another thread has closed it.
        """
        own = self._own_shards()
        while True:
            if self._closed.is_set():
                raise StreamClosed
            while len(self.slots) < OPEN_SHARDS and self.next_shard < len(own):
                self.slots.append([self.next_shard, 0])
                self.next_shard += 1
            for ordinal, row in self.slots[len(self._open) :]:
                rows = self.shards.rows(int(own[ordinal]), row, self._closed)
                self._open.append(ReadAhead(rows, self._closed))
            if not self.slots:
                self.epoch, self.next_shard, self.turn = self.epoch + 1, 0, 0
                return None
            self.turn %= len(self.slots)
            example = self._open[self.turn].peek()
            if example is None:
                del self.slots[self.turn], self._open[self.turn]
            elif self._splits_rows and self.slots[self.turn][1] % self.num_lanes != self.lane:
                self._go_on()
            else:
                return example

    def take(self) -> None:
        """Move on to the row after the one that `peek` gave: of the next open shard."""
        self._go_on()
        self.turn += 1

    def _go_on(self) -> None:
        self._open[self.turn].take()
        self.slots[self.turn][1] += 1

    def close(self) -> None:
        """End its threads for good, also one that waits for the end of an outage."""
        self._closed.set()
