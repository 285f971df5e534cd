"""Rows that come as a stream of shards: their order, their position, and outages survived.

A process reads its own shards (shuffled anew every epoch, a few at a time in turn) into blocks of
`shuffle_block` rows, and shuffles each block by (seed, epoch, block). There is no running shuffle
buffer: the position is where the block began and how many global batches of it are done, a few
numbers, from which the very same rows follow. A round is one block of every process; the processes
tell each other how many rows they have for it, so that the last, uneven one of an epoch is shared
out exactly like any other global batch.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import datasets
import fsspec
import numpy as np

from sd_recipes.data.order import MicroBatch, apportion, generator
from sd_recipes.recipe import RecipeError, RunError

logger = logging.getLogger(__name__)

SHARDS_PURPOSE, BLOCK_PURPOSE, ROUND_PURPOSE = 0x57E0, 0x57E1, 0x57E2
OPEN_SHARDS = 4  # read in turn, row by row: mixes shards and hides latency
READ_AHEAD_ROWS = 32  # of each open shard
LONGEST_PAUSE = 30.0  # seconds between two attempts
# What another attempt does not mend.
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

    @property
    def number(self) -> int:
        return self.stream.num_shards

    def rows(self, shard: int, start: int) -> Iterator[dict[str, Any]]:
        """The rows of a shard from number `start` on; read anew after an error, from the row where it struck.

        Raises StreamLost when that failed for `outage_seconds` on end, at once for a file that is not there.
        """
        row, pause, failing_since = start, 1.0, None
        while True:
            try:
                part = self.stream.shard(num_shards=self.number, index=shard)
                for example in part.skip(row) if row else part:
                    yield with_bytes(example)
                    row, pause, failing_since = row + 1, 1.0, None
                return
            # datasets, fsspec, pyarrow, tarfile, huggingface_hub and HTTP clients fail in their own ways.
            except Exception as error:
                words = f"{self.name}: shard {shard} at row {row}: {' '.join(str(error).split())[:200] or repr(error)}"
                if isinstance(error, PERMANENT):
                    raise StreamLost(f"{words}: the file is gone or forbidden") from error
                now = time.monotonic()
                failing_since = failing_since or now
                if now + pause - failing_since > self.outage_seconds:
                    raise StreamLost(
                        f"{words}: failing for {now - failing_since:.0f} s; run the same command with "
                        "--resume_from_checkpoint latest when it is back, or raise --stream_outage_minutes"
                    ) from error
                logger.warning("%s: trying again in %.0f s", words, pause)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)


class ReadAhead:
    """An iterator's rows, read by a thread ahead of their use; its errors are raised where they are met."""

    def __init__(self, rows: Iterator[dict[str, Any]]) -> None:
        self._rows = rows
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(READ_AHEAD_ROWS)
        self._next: tuple[str, Any] | None = None
        self._stop = threading.Event()
        threading.Thread(target=self._read, name="shard", daemon=True).start()

    def _read(self) -> None:
        try:
            for row in self._rows:
                self._put("row", row)
                if self._stop.is_set():
                    return
            self._put("end", None)
        except Exception as error:
            self._put("error", error)

    def _put(self, kind: str, value: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put((kind, value), timeout=0.5)
            except queue.Full:
                continue

    def peek(self) -> dict[str, Any] | None:
        """The next row, which stays the next; None at the end."""
        while self._next is None:
            if self._stop.is_set():
                raise StreamClosed
            with contextlib.suppress(queue.Empty):
                self._next = self._queue.get(timeout=0.5)
        kind, value = self._next
        if kind == "error":
            raise value
        return value

    def take(self) -> None:
        """Go on to the row after the one that `peek` gave."""
        self._next = None

    def close(self) -> None:
        self._stop.set()


def with_bytes(example: dict[str, Any]) -> dict[str, Any]:
    """The row with the bytes of its image, where it only names a file elsewhere, as streamed folders do."""
    for name, value in example.items():
        if isinstance(value, dict) and value.get("bytes", b"") is None and "://" in (value.get("path") or ""):
            with fsspec.open(value["path"], "rb") as file:
                return {**example, name: {**value, "bytes": file.read()}}
    return example


@dataclass
class SourceReader:
    """The rows of one process's shards of a source: open shards in turn, the others after them.

    Its `state` is the epoch, the next shard to open, and (shard's number in the epoch's order, row) of
    each open one.
    """

    shards: Shards
    seed: int
    rank: int
    world_size: int
    part: int  # the source's number, which tells its permutations from other sources'
    epoch: int = 0
    next_shard: int = 0
    turn: int = 0
    slots: list[list[int]] = field(default_factory=list)
    _open: list[ReadAhead] = field(default_factory=list)

    @property
    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "next_shard": self.next_shard,
            "turn": self.turn,
            "slots": [list(slot) for slot in self.slots],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.close()
        self.epoch, self.next_shard, self.turn = state["epoch"], state["next_shard"], state["turn"]
        self.slots = [list(slot) for slot in state["slots"]]

    def _own_shards(self) -> np.ndarray:
        """This process's shards in the order of the epoch; all of them, where there are fewer than processes."""
        order = generator(self.seed, self.epoch, SHARDS_PURPOSE, part=self.part).permutation(self.shards.number)
        return order if self._splits_rows else order[self.rank :: self.world_size]

    @property
    def _splits_rows(self) -> bool:
        return self.shards.number < self.world_size

    def peek(self) -> dict[str, Any] | None:
        """The next row, which stays the next; None once all of the epoch are taken, and the next epoch begins."""
        own = self._own_shards()
        while True:
            while len(self.slots) < OPEN_SHARDS and self.next_shard < len(own):
                self.slots.append([self.next_shard, 0])
                self.next_shard += 1
            for ordinal, row in self.slots[len(self._open) :]:
                self._open.append(ReadAhead(self.shards.rows(int(own[ordinal]), row)))
            if not self.slots:
                self.epoch, self.next_shard, self.turn = self.epoch + 1, 0, 0
                return None
            self.turn %= len(self.slots)
            example = self._open[self.turn].peek()
            if example is None:
                del self.slots[self.turn], self._open[self.turn]
            elif self._splits_rows and self.slots[self.turn][1] % self.world_size != self.rank:
                self._go_on()
            else:
                return example

    def take(self) -> None:
        """Go on to the row after the one that `peek` gave: of the next open shard."""
        self._go_on()
        self.turn += 1

    def _go_on(self) -> None:
        self._open[self.turn].take()
        self.slots[self.turn][1] += 1

    def close(self) -> None:
        for reader in self._open:
            reader.close()
        self._open = []


@dataclass(frozen=True)
class Block:
    """Shuffled rows of one process for one round, and where its readers stand before and after it."""

    examples: dict[tuple[int, int], list[dict[str, Any]]]  # by size (height, width)
    number: int  # of the block in the run
    ends_epoch: bool
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


Agree = Callable[[Any], list[Any]]  # every process's value, given this one's


class Stream:
    """Micro-batches of a stream, of any number of processes.

    `size_of` gives the (height, width) on which a row is trained. `agree` exchanges a small value between
    the processes, as `[value]` with one. Several sources are mixed by `weights` within every block and
    go through their epochs each on its own; the run's epoch then never ends.
    """

    def __init__(
        self,
        sources: list[Shards],
        *,
        weights: list[float],
        seed: int,
        global_batch_size: int,
        shuffle_block: int,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        size_of: Callable[[dict[str, Any]], tuple[int, int]],
        agree: Agree,
    ) -> None:
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.size_of, self.agree = size_of, agree
        # Each process's share of a whole global batch, and blocks of whole shares.
        self.shares = [len(range(each, global_batch_size, world_size)) for each in range(world_size)]
        self.block_rows = max(1, -(-shuffle_block // max(1, self.shares[rank]))) * self.shares[rank]
        self.parts = apportion(self.block_rows, weights)
        self.readers = [
            SourceReader(shards, seed, rank, world_size, part=number) for number, shards in enumerate(sources)
        ]
        for shards in sources:
            if shards.number < world_size:
                logger.warning(
                    "%s has %d shards for %d processes: every process reads all rows and keeps its share; more shards "
                    "would spare that",
                    shards.name, shards.number, world_size,
                )  # fmt: skip

    def _read_block(self, number: int) -> Block:
        before = [reader.state for reader in self.readers]
        rows: list[dict[str, Any]] = []
        ended = False
        for reader, part in zip(self.readers, self.parts, strict=True):
            wanted, was_empty = len(rows) + part, False
            while len(rows) < wanted and not ended:
                row = reader.peek()
                if row is not None:
                    rows.append(row)
                    reader.take()
                    was_empty = False
                elif len(self.readers) == 1:
                    ended = True
                elif was_empty:
                    raise RecipeError(f"{reader.shards.name} has no rows for this process: use fewer processes")
                else:
                    was_empty = True
            if len(self.readers) == 1 and not ended:
                ended = reader.peek() is None  # a block that is just full may be the epoch's last
        examples: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for place in generator(self.seed, number, BLOCK_PURPOSE, part=self.rank).permutation(len(rows)):
            examples.setdefault(self.size_of(rows[place]), []).append(rows[place])
        return Block(examples, number, ended, before, [reader.state for reader in self.readers])

    def micro_batches(self, samples_seen: int, state: dict[str, Any] | None) -> Iterator[MicroBatch]:
        """This process's micro-batches from `state` on (that of the last one done), without end."""
        state = state or {"block": 0, "round": 0, "done": 0, "epoch": 0, "waits": False, "readers": None}
        number, round_number, done, epoch, waits = (
            state[name] for name in ("block", "round", "done", "epoch", "waits")
        )
        for reader, saved in zip(self.readers, state["readers"] or [], strict=False):
            reader.restore(saved)
        ahead = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stream")
        coming = ahead.submit(self._read_block, number)
        try:
            while True:
                block = coming.result()
                # A process whose rows of the epoch are used up waits with its next block for the others.
                examples = {} if waits else block.examples
                ended = waits or block.ends_epoch
                if not waits:
                    number += 1
                    coming = ahead.submit(self._read_block, number)
                counts = self.agree(({size: len(rows) for size, rows in examples.items()}, ended))
                ends_epoch = all(each for _, each in counts)
                batches = self._batches_of_round([each for each, _ in counts], round_number)
                waits_next = ended and not ends_epoch
                for place, (size, first, rows_of) in enumerate(batches):
                    if place < done:
                        continue
                    is_end = place == len(batches) - 1
                    after: dict[str, Any] = {
                        "block": block.number,
                        "round": round_number,
                        "done": place + 1,
                        "epoch": epoch,
                        "waits": waits,
                        "readers": block.before,
                    }
                    if is_end:
                        after |= {
                            "block": number,
                            "round": round_number + 1,
                            "done": 0,
                            "epoch": epoch + ends_epoch,
                            "waits": waits_next,
                            "readers": block.before if waits else block.after,
                        }
                    yield from self._share(
                        examples.get(size, [])[first : first + rows_of[self.rank]] or self._stand_in(block),
                        rows_of,
                        position=samples_seen,
                        size=size,
                        ends_epoch=ends_epoch and is_end,
                        epoch=epoch,
                        state=after,
                    )
                    samples_seen += sum(rows_of)
                waits, epoch, round_number, done = waits_next, epoch + ends_epoch, round_number + 1, 0
        finally:
            for reader in self.readers:
                reader.close()
            ahead.shutdown(wait=False, cancel_futures=True)

    def _batches_of_round(
        self, counts: list[dict[tuple[int, int], int]], round_number: int
    ) -> list[tuple[tuple[int, int], int, list[int]]]:
        """Size, this process's first row of that size, and each process's number of rows, of each global batch."""
        batches = []
        for size in sorted({size for each in counts for size in each}):
            numbers = [each.get(size, 0) for each in counts]
            steps = max(-(-number // share) for number, share in zip(numbers, self.shares, strict=True) if share)
            for step in range(steps):
                rows_of = [
                    max(0, min(share, number - step * share))
                    for number, share in zip(numbers, self.shares, strict=True)
                ]
                batches.append((size, step * self.shares[self.rank], rows_of))
        if len({size for size, *_ in batches}) > 1:  # those of one size are shuffled already, the small one last
            order = generator(self.seed, round_number, ROUND_PURPOSE).permutation(len(batches))
            batches = [batches[place] for place in order]
        return batches

    @staticmethod
    def _stand_in(block: Block) -> list[dict[str, Any]]:
        """A row for a process without a share, which only joins the others' collectives."""
        row = next((rows[0] for rows in block.examples.values()), None)
        if row is None:
            raise RecipeError("a process has no rows of the stream: use fewer processes, or more shards")
        return [row]

    def _share(
        self,
        examples: list[dict[str, Any]],
        rows_of: list[int],
        *,
        position: int,
        size: tuple[int, int],
        ends_epoch: bool,
        epoch: int,
        state: dict[str, Any],
    ) -> Iterator[MicroBatch]:
        """This process's micro-batches of the global batch at `position`, of which process r has rows_of[r] rows."""
        # Numbered as if dealt in turn: as in order.share, where all have as many.
        strata = np.array(
            [
                sum(min(count, turn) for count in rows_of) + sum(count > turn for count in rows_of[: self.rank])
                for turn in range(rows_of[self.rank])
            ],
            dtype=np.int64,
        )
        weight = 1.0
        if len(strata) == 0:  # the other processes wait for this one's gradients
            strata, weight = np.zeros(1, dtype=np.int64), 0.0
        starts = range(0, len(examples), self.micro_batch_size)
        for start in starts:
            chosen = strata[start : start + self.micro_batch_size]
            yield MicroBatch(
                rows=position + chosen,
                positions=position + chosen,
                strata=chosen,
                global_batch_size=sum(rows_of),
                weight=weight,
                is_last=start == starts[-1],
                samples_seen=position + sum(rows_of),
                ends_epoch=ends_epoch,
                epoch=epoch,
                size=size,
                examples=tuple(examples[start : start + self.micro_batch_size]),
                stream_state=state,
            )
