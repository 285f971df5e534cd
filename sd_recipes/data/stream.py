"""Rows that come as a stream of shards: their order and their position, on any number of processes.

A stream is read in lanes, one for each process that the run began with. A lane reads its own shards
(shuffled again every epoch, a few at a time in turn) into blocks of `shuffle_block` rows, and shuffles
each block by (seed, block, lane). There is no rolling shuffle buffer: the position is where the block
began and how many global batches of it are done, and from these few numbers exactly the same rows follow.
A round is one block of every lane. The processes exchange how many rows the lanes have for it, so that
the last, uneven global batch of an epoch is shared out exactly like any other.

The lanes stay the same when a run resumes on another number of processes: fewer processes read several
lanes each; of more processes, some share a lane and train on different rows of it. So the rows, their
global batches and their draws do not depend on the number of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from sd_recipes.data.draws import generator
from sd_recipes.data.order import STRATA_PURPOSE, MicroBatch, portion
from sd_recipes.data.shards import Shards, SourceReader
from sd_recipes.errors import RecipeError

logger = logging.getLogger(__name__)

BLOCK_PURPOSE, ROUND_PURPOSE = 0x57E1, 0x57E2  # keep the keys of these permutations apart from all others


@dataclass(frozen=True)
class Block:
    """Shuffled rows of one lane for one round, and where its readers stand before and after it."""

    examples: dict[tuple[int, int], list[dict[str, Any]]]  # by size (height, width)
    number: int  # of the block in the run
    ends_epoch: bool
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


class Lane:
    """One lane's blocks, read ahead by a thread; its `block` is the one that is being trained on."""

    def __init__(
        self,
        number: int,
        readers: list[SourceReader],
        parts_of: Callable[[int], list[int]],
        seed: int,
        size_of: Callable[[dict[str, Any]], tuple[int, int]],
        state: dict[str, Any] | None,
    ) -> None:
        self.number, self.readers, self.seed, self.size_of = number, readers, seed, size_of
        self.parts_of = parts_of  # from a block's number to the number of its rows from each source
        self.next_block = state["block"] if state else 0
        # A lane that has used up its rows of the epoch waits for the others before it begins its next block.
        self.waits = bool(state and state["waits"])
        for reader, saved in zip(readers, state["readers"] if state else [], strict=False):
            reader.restore(saved)
        self._ahead = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stream")
        self._coming = self._ahead.submit(self._read, self.next_block)

    def begin_round(self) -> tuple[dict[tuple[int, int], int], bool]:
        """How many rows of each size the lane has for this round, and whether its epoch ends with it."""
        self.block = self._coming.result()
        self.examples = {} if self.waits else self.block.examples
        self.ended = self.waits or self.block.ends_epoch
        if not self.waits:
            self.next_block += 1
            self._coming = self._ahead.submit(self._read, self.next_block)
        return {size: len(rows) for size, rows in self.examples.items()}, self.ended

    def within_round(self) -> dict[str, Any]:
        """The state from which this round can be read again."""
        return {"block": self.block.number, "waits": self.waits, "readers": self.block.before}

    def after_round(self, *, waits: bool) -> dict[str, Any]:
        """The state from which the next round is read."""
        readers = self.block.before if self.waits else self.block.after
        return {"block": self.next_block, "waits": waits, "readers": readers}

    def _read(self, number: int) -> Block:
        before = [reader.state for reader in self.readers]
        rows: list[dict[str, Any]] = []
        ended = False
        for reader, part in zip(self.readers, self.parts_of(number), strict=True):
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
                ended = reader.peek() is None  # a block that is exactly full may be the epoch's last
        examples: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for place in generator(self.seed, number, BLOCK_PURPOSE, part=self.number).permutation(len(rows)):
            examples.setdefault(self.size_of(rows[place]), []).append(rows[place])
        return Block(examples, number, ended, before, [reader.state for reader in self.readers])

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
        self._ahead.shutdown(wait=False, cancel_futures=True)


Agree = Callable[[Any], list[Any]]  # every process's value, given this one's


def joined_states(states: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The state of all lanes, joined from what each process of a run saved; None at the start of a run."""
    known = [state for state in states if state]
    if not known:
        return None
    return known[0] | {"lanes": {number: lane for state in known for number, lane in state["lanes"].items()}}


class Stream:
    """Micro-batches of a stream, on any number of processes.

    `size_of` gives the (height, width) at which a row is trained. `agree` exchanges a small value between
    the processes; with one process it gives `[value]`. Several sources are mixed by `weights` within every
    block, and each goes through its own epochs; the run's epoch then never ends.
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
        self.sources, self.weights, self.seed = sources, weights, seed
        self.rank, self.world_size = rank, world_size
        self.global_batch_size, self.shuffle_block = global_batch_size, shuffle_block
        self.micro_batch_size = micro_batch_size
        self.size_of, self.agree = size_of, agree

    def _open_lanes(self, num_lanes: int, saved: dict[str, Any]) -> tuple[list[Lane], list[int]]:
        """This process's lanes, and every lane's share of a whole global batch. Raises RecipeError if one has none."""
        if num_lanes > self.global_batch_size:  # a lane without a share would never be read, and the epoch never end
            raise RecipeError(
                f"the stream was begun by {num_lanes} processes, each with a part of its rows, and a global batch of "
                f"{self.global_batch_size} has no room for a row of each: choose --train_batch_size and "
                f"--gradient_accumulation_steps so that, on {self.world_size} processes, it is at least {num_lanes}, "
                "or start from scratch with --overwrite"
            )
        for shards in self.sources:
            if shards.number < num_lanes:
                logger.warning(
                    "%s has %d shards for %d processes: every process reads all rows and keeps its share; more shards "
                    "would avoid that",
                    shards.name, shards.number, num_lanes,
                )  # fmt: skip
        if self.world_size > num_lanes:
            logger.warning(
                "The stream was begun by %d processes and is read as if by that many: of the %d now, those that share "
                "a lane read the same rows, and each trains on a part of them",
                num_lanes, self.world_size,
            )  # fmt: skip
        shares = [len(range(each, self.global_batch_size, num_lanes)) for each in range(num_lanes)]
        lanes = []
        for number in _lanes_of(self.rank, self.world_size, num_lanes):
            # A block is a whole number of shares.
            block_rows = max(1, -(-self.shuffle_block // max(1, shares[number]))) * shares[number]
            readers = [SourceReader(each, self.seed, number, num_lanes, part) for part, each in enumerate(self.sources)]
            parts_of = partial(self._parts, block_rows)
            lanes.append(Lane(number, readers, parts_of, self.seed, self.size_of, saved.get(str(number))))
        return lanes, shares

    def _parts(self, block_rows: int, block: int) -> list[int]:
        return [len(of_source) for of_source in portion(block, block_rows, self.weights)]

    def micro_batches(self, samples_seen: int, state: dict[str, Any] | None) -> Iterator[MicroBatch]:
        """This process's micro-batches from `state` on, without end.

        `state` is that of the last micro-batch done or, after a change of the number of processes, `joined_states`.
        """
        state = state or {"num_lanes": self.world_size, "round": 0, "done": 0, "epoch": 0, "lanes": {}}
        num_lanes, round_number, done, epoch = (state[name] for name in ("num_lanes", "round", "done", "epoch"))
        lanes, shares = self._open_lanes(num_lanes, state["lanes"])
        shape = [self.global_batch_size, self.shuffle_block]
        if done and state["shape"] != shape:
            rows = done * state["shape"][0]
            logger.warning("The stream's batches have changed within a block: %d rows of it are met once more.", rows)
            done = 0
        try:
            while True:
                of_processes = self.agree({lane.number: lane.begin_round() for lane in lanes})
                of_lanes = {number: each for process in of_processes for number, each in process.items()}
                counts = [of_lanes[number][0] for number in range(num_lanes)]
                ends_epoch = all(ended for _, ended in of_lanes.values())
                batches = _batches_of_round(counts, shares, generator(self.seed, round_number, ROUND_PURPOSE))
                if not batches:  # a lane's last block has rows, if the lane has any
                    raise RecipeError(f"{' and '.join(shards.name for shards in self.sources)} has no rows to train on")
                waiting = {lane.number: lane.ended and not ends_epoch for lane in lanes}
                common = {"num_lanes": num_lanes, "shape": shape}
                for place, (size, step, rows_of) in enumerate(batches):
                    if place < done:
                        continue
                    is_end = place == len(batches) - 1
                    after: dict[str, Any] = common | {
                        "round": round_number,
                        "done": place + 1,
                        "epoch": epoch,
                        "lanes": {str(lane.number): lane.within_round() for lane in lanes},
                    }
                    if is_end:
                        after = common | {
                            "round": round_number + 1,
                            "done": 0,
                            "epoch": epoch + ends_epoch,
                            "lanes": {str(lane.number): lane.after_round(waits=waiting[lane.number]) for lane in lanes},
                        }
                    yield from self._share(
                        lanes,
                        [step * share for share in shares],
                        rows_of,
                        position=samples_seen,
                        size=size,
                        ends_epoch=ends_epoch and is_end,
                        epoch=epoch,
                        state=after,
                    )
                    samples_seen += sum(rows_of)
                for lane in lanes:
                    lane.waits = waiting[lane.number]
                epoch, round_number, done = epoch + ends_epoch, round_number + 1, 0
        finally:
            for lane in lanes:
                lane.close()

    def _share(
        self,
        lanes: list[Lane],
        first_rows: list[int],
        rows_of: list[int],
        *,
        position: int,
        size: tuple[int, int],
        ends_epoch: bool,
        epoch: int,
        state: dict[str, Any],
    ) -> Iterator[MicroBatch]:
        """This process's micro-batches of the global batch at `position`: rows_of[l] rows of lane l from first_rows[l].

        Raises RecipeError if the process has no row at all: it needs one to join the others' collectives.
        """
        own: list[tuple[int, dict[str, Any]]] = []  # (place in the global batch, row)
        for lane in lanes:
            rows = lane.examples.get(size, [])[first_rows[lane.number] :]
            turns = _turns(self.rank, self.world_size, lane.number, rows_of)
            own += [(_place(turn, lane.number, rows_of), rows[turn]) for turn in turns]
        own.sort(key=lambda each: each[0])
        # A row's place depends on its lane: with strata by place, it would meet the same timesteps again and again.
        strata = generator(self.seed, position, STRATA_PURPOSE).permutation(sum(rows_of))
        # As many micro-batches on every process: the others wait for this one's forward pass or gradients.
        starts = range(0, _largest_share(self.world_size, rows_of), self.micro_batch_size)
        for start in starts:
            chosen, size_of_chosen = own[start : start + self.micro_batch_size], size
            if not chosen:
                size_of_chosen, row = _padding_sample(lanes)
                chosen = [(0, row)]
            places = np.array([place for place, _ in chosen], dtype=np.int64)
            yield MicroBatch(
                rows=position + places,
                positions=position + places,
                strata=strata[places],
                global_batch_size=sum(rows_of),
                weight=float(start < len(own)),
                is_last=start == starts[-1],
                samples_seen=position + sum(rows_of),
                ends_epoch=ends_epoch,
                epoch=epoch,
                size=size_of_chosen,
                examples=tuple(row for _, row in chosen),
                stream_state=state,
            )


def _lanes_of(rank: int, world_size: int, num_lanes: int) -> range:
    """The lanes that a process reads: only one, unless there are more lanes than processes."""
    return range(rank, num_lanes, world_size) if world_size <= num_lanes else range(rank % num_lanes, num_lanes)[:1]


def _turns(rank: int, world_size: int, lane: int, rows_of: list[int]) -> range:
    """The numbers of a lane's rows in a global batch that a process takes: every k-th if k processes share the lane."""
    if world_size <= len(rows_of):
        return range(rows_of[lane])
    return range(rows_of[lane])[rank // len(rows_of) :: len(range(lane, world_size, len(rows_of)))]


def _largest_share(world_size: int, rows_of: list[int]) -> int:
    """The most samples of a global batch that any process has."""
    num_lanes = len(rows_of)
    return max(
        sum(len(_turns(rank, world_size, lane, rows_of)) for lane in _lanes_of(rank, world_size, num_lanes))
        for rank in range(world_size)
    )


def _place(turn: int, lane: int, rows_of: list[int]) -> int:
    """The place of a lane's row in the global batch, as if the rows were dealt in turn, as in order.share."""
    return sum(min(count, turn) for count in rows_of) + sum(count > turn for count in rows_of[:lane])


def _padding_sample(lanes: list[Lane]) -> tuple[tuple[int, int], dict[str, Any]]:
    """A row, with its own size, for a process without a share, which only joins the others' collectives."""
    for lane in lanes:
        for size, rows in lane.block.examples.items():
            return size, rows[0]
    raise RecipeError("a process has no rows of the stream: use fewer processes, or more shards")


def _batches_of_round(
    counts: list[dict[tuple[int, int], int]], shares: list[int], shuffling: np.random.Generator
) -> list[tuple[tuple[int, int], int, list[int]]]:
    """For each global batch of a round: its size, its number among those of that size, and each lane's number of rows.

    `counts` are each lane's numbers of rows by size, `shares` its number of rows in a whole global batch.
    """
    batches = []
    for size in sorted({size for each in counts for size in each}):
        numbers = [each.get(size, 0) for each in counts]
        steps = max(-(-number // share) for number, share in zip(numbers, shares, strict=True) if share)
        for step in range(steps):
            rows_of = [max(0, min(share, number - step * share)) for number, share in zip(numbers, shares, strict=True)]
            batches.append((size, step, rows_of))
    if len({size for size, *_ in batches}) > 1:  # batches of one size are shuffled already, the small one last
        batches = [batches[place] for place in shuffling.permutation(len(batches))]
    return batches
