"""Streams: every row once, exact positions, several processes, and failures of the source."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tiny_models import tiny_tokenizer

from sd_recipes.data.batches import BatchBuilder
from sd_recipes.data.captions import tokenize
from sd_recipes.data.draws import draw
from sd_recipes.data.latent_store import FORMAT
from sd_recipes.data.order import MicroBatch
from sd_recipes.data.shards import Shards, SourceReader, StreamClosed, StreamLost
from sd_recipes.data.sizes import size_of_row
from sd_recipes.data.stream import Stream, joined_states
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe


def parquet_shards(folder: Path, lengths: list[int], first: int = 0) -> Path:
    """Parquet files with rows {"id", "text"}, numbered through."""
    folder.mkdir()
    for shard, length in enumerate(lengths):
        ids = list(range(first, first + length))
        datasets.Dataset.from_dict({"id": ids, "text": [f"row {number}" for number in ids]}).to_parquet(
            folder / f"{shard:03d}.parquet"
        )
        first += length
    return folder


def opened(folder: Path, outage_seconds: float = 0.0) -> Shards:
    stream = datasets.load_dataset(
        "parquet", data_files={"train": str(folder / "*.parquet")}, split="train", streaming=True
    )
    return Shards(stream, "--dataset_name test", outage_seconds)


def size_of(row: dict[str, Any]) -> tuple[int, int]:
    return 64, 64


def stream_of(*sources: Shards, rank: int = 0, world_size: int = 1, **changes: Any) -> Stream:
    settings: dict[str, Any] = {
        "weights": [1.0] * len(sources), "seed": 7, "global_batch_size": 6, "shuffle_block": 12, "rank": rank,
        "world_size": world_size, "micro_batch_size": 2, "size_of": size_of, "agree": lambda value: [value],
    }  # fmt: skip
    return Stream(list(sources), **{**settings, **changes})


def ids(plans: list[MicroBatch]) -> list[int]:
    return [row["id"] for plan in plans if plan.weight for row in plan.examples or ()]


def one_epoch(plans: Iterator[MicroBatch]) -> list[MicroBatch]:
    taken = []
    for plan in plans:
        taken.append(plan)
        if plan.ends_epoch and plan.is_last:
            return taken
    raise AssertionError("no end of the epoch")


Take = Callable[[Iterator[MicroBatch]], list[MicroBatch]]


def steps(number: int) -> Take:
    """The micro-batches of so many global batches."""

    def take(plans: Iterator[MicroBatch]) -> list[MicroBatch]:
        taken: list[MicroBatch] = []
        while sum(plan.is_last for plan in taken) < number:
            taken.append(next(plans))
        return taken

    return take


LENGTHS = [5, 17, 9, 1, 8, 10]  # 50 rows


def test_every_row_comes_once_an_epoch_in_another_order_each(tmp_path: Path) -> None:
    plans = stream_of(opened(parquet_shards(tmp_path / "rows", LENGTHS))).micro_batches(0, None)
    first, second = one_epoch(plans), one_epoch(plans)
    assert sorted(ids(first)) == sorted(ids(second)) == list(range(50))
    assert ids(first) != ids(second)
    assert ids(first) != list(range(50))
    assert {plan.epoch for plan in first} == {0}
    assert {plan.epoch for plan in second} == {1}
    sizes = [plan.global_batch_size for plan in first if plan.is_last]
    assert sizes == [6] * 8 + [2], "only the last global batch is smaller"
    assert [plan.positions.tolist() for plan in first[:3]] == [[0, 1], [2, 3], [4, 5]]
    assert second[0].positions[0] == 50


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 9, 13])
def test_a_stream_continues_exactly_where_it_stood(tmp_path: Path, steps: int) -> None:
    shards = opened(parquet_shards(tmp_path / "rows", LENGTHS))
    whole = list(islice(stream_of(shards).micro_batches(0, None), 60))
    ends = [number for number, plan in enumerate(whole) if plan.is_last]
    last = whole[ends[steps - 1]]
    resumed = list(islice(stream_of(shards).micro_batches(last.samples_seen, last.stream_state), 20))
    expected = whole[ends[steps - 1] + 1 :][:20]
    assert ids(resumed) == ids(expected)
    for one, other in zip(resumed, expected, strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        assert one.stream_state == other.stream_state


def in_processes(
    shards: Shards, world_size: int, take: Take = one_epoch, samples_seen: int = 0, state: Any = None, **changes: Any
) -> list[list[MicroBatch]]:
    """What every process of a group takes, each in a thread with a real exchange between them."""
    barrier = threading.Barrier(world_size)
    values: list[Any] = [None] * world_size
    results: list[list[MicroBatch]] = [[] for _ in range(world_size)]

    def work(rank: int) -> None:
        def agree(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait(timeout=30)
            agreed = list(values)
            barrier.wait(timeout=30)
            return agreed

        stream = stream_of(shards, rank=rank, world_size=world_size, agree=agree, **changes)
        results[rank] = take(stream.micro_batches(samples_seen, state))

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return results


@pytest.mark.parametrize(("world_size", "lengths"), [(2, LENGTHS), (3, LENGTHS), (3, [40, 7]), (2, [1, 30])])
def test_processes_share_the_rows_exactly(tmp_path: Path, world_size: int, lengths: list[int]) -> None:
    results = in_processes(opened(parquet_shards(tmp_path / "rows", lengths)), world_size)
    assert Counter(number for plans in results for number in ids(plans)) == Counter(range(sum(lengths)))
    steps = [[plan for plan in plans if plan.is_last] for plans in results]
    assert len({len(each) for each in steps}) == 1, "all processes take the same steps"
    for each in zip(*steps, strict=True):
        assert len({plan.samples_seen for plan in each}) == 1
        assert len({plan.global_batch_size for plan in each}) == 1
    positions = Counter(int(p) for plans in results for plan in plans if plan.weight for p in plan.positions)
    assert positions == Counter(range(sum(lengths))), "every sample has its own draws"


def trained(results: list[list[MicroBatch]]) -> list[tuple[int, int, int, tuple[int, int]]]:
    """(position, id, size of the global batch, size of the image) of every sample, of all processes, in order."""
    return sorted(
        (int(position), row["id"], plan.global_batch_size, plan.size)
        for plans in results
        for plan in plans
        if plan.weight
        for position, row in zip(plan.positions, plan.examples or (), strict=True)
    )


# (processes, global batches) one after the other; of 50 rows in batches of 6, an epoch has 9 or 10.
@pytest.mark.parametrize(
    "stages",
    [
        [(2, 4), (1, 7), (3, 9)],
        [(3, 5), (2, 6), (1, 1), (3, 8)],
        [(1, 3), (3, 9), (2, 8)],
        [(2, 9), (5, 3), (4, 8)],
        [(4, 1), (3, 1), (4, 17)],
    ],
    ids=lambda stages: "-".join(str(processes) for processes, _ in stages),
)
def test_other_numbers_of_processes_train_the_same_samples(tmp_path: Path, stages: list[tuple[int, int]]) -> None:
    """Through epochs' ends, sizes of images, and states that went through a file."""
    shards = opened(parquet_shards(tmp_path / "rows", LENGTHS))
    changes = {"size_of": lambda row: (64, 64) if row["id"] % 3 else (32, 128), "shuffle_block": 8}
    in_all = steps(sum(number for _, number in stages))
    expected = trained(in_processes(shards, stages[0][0], in_all, **changes))
    seen, state, results = 0, None, []
    for processes, number in stages:
        some = in_processes(shards, processes, steps(number), seen, state, **changes)
        results += some
        assert len({plans[-1].samples_seen for plans in some}) == 1
        seen = some[0][-1].samples_seen
        state = joined_states(json.loads(json.dumps([plans[-1].stream_state for plans in some])))
    assert trained(results) == expected
    assert [position for position, *_ in expected] == list(range(seen))
    assert max(Counter(number for _, number, *_ in expected[:50]).values()) == 1


def test_another_batch_size_repeats_rows_of_a_block_and_says_how_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = opened(parquet_shards(tmp_path / "rows", LENGTHS))
    before = steps(3)(stream_of(shards).micro_batches(0, None))  # the second block's first batch
    with caplog.at_level(logging.WARNING):
        after = one_epoch(
            stream_of(shards, global_batch_size=4).micro_batches(before[-1].samples_seen, before[-1].stream_state)
        )
    assert "6 rows of it are met once more" in caplog.text
    met = Counter(ids(before) + ids(after))
    assert sorted(met) == list(range(50))
    assert Counter(met.values()) == {1: 44, 2: 6}


def test_buckets_of_a_stream_are_batched_on_all_processes_alike(tmp_path: Path) -> None:
    shards = opened(parquet_shards(tmp_path / "rows", LENGTHS))
    results = in_processes(shards, 2, size_of=lambda row: (64, 64) if row["id"] % 3 else (32, 128))
    assert sorted(number for plans in results for number in ids(plans)) == list(range(50))
    sizes = defaultdict(set)  # by the global batch
    for plans in results:
        for plan in plans:
            assert {(64, 64) if row["id"] % 3 else (32, 128) for row in plan.examples or ()} == {plan.size}
            if plan.weight:
                sizes[plan.samples_seen].add(plan.size)
    assert {len(each) for each in sizes.values()} == {1}
    assert len(set.union(*sizes.values())) == 2


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    small = opened(parquet_shards(tmp_path / "small", [4, 2]))
    large = opened(parquet_shards(tmp_path / "large", [40, 60], first=1000))
    plans = list(islice(stream_of(small, large, weights=[1.0, 3.0]).micro_batches(0, None), 48))
    taken = ids(plans)
    assert len(taken) == 96
    assert sum(number < 1000 for number in taken) == 24
    assert Counter(number for number in taken if number < 1000) == Counter(dict.fromkeys(range(6), 4))
    assert max(Counter(number for number in taken if number >= 1000).values()) == 1


class Unreliable:
    """A stream that fails at given (shard, row) as often as it is told."""

    def __init__(self, inner: datasets.IterableDataset, failures: Counter, error: Exception) -> None:
        self.inner, self.failures, self.error = inner, failures, error
        self.num_shards = inner.num_shards

    def shard(self, num_shards: int, index: int) -> _UnreliableShard:
        return _UnreliableShard(self, index, self.inner.shard(num_shards=num_shards, index=index), 0)


class _UnreliableShard:
    def __init__(self, owner: Unreliable, index: int, inner: datasets.IterableDataset, start: int) -> None:
        self.owner, self.index, self.inner, self.start = owner, index, inner, start

    def skip(self, start: int) -> _UnreliableShard:
        return _UnreliableShard(self.owner, self.index, self.inner.skip(start), start)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row, example in enumerate(self.inner, start=self.start):
            if self.owner.failures[self.index, row] > 0:
                self.owner.failures[self.index, row] -= 1
                raise self.owner.error
            yield example


@pytest.fixture
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_recipes.data.shards.FIRST_PAUSE", 0.001)


@pytest.mark.usefixtures("_no_pauses")
def test_failures_lose_and_repeat_no_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = opened(parquet_shards(tmp_path / "rows", LENGTHS))
    uninterrupted = ids(one_epoch(stream_of(shards).micro_batches(0, None)))
    failures = Counter({(0, 0): 2, (1, 16): 3, (4, 3): 1, (5, 9): 1})
    unreliable = Shards(Unreliable(shards.stream, failures, ConnectionError("reset")), "a stream", 60.0)
    with caplog.at_level(logging.WARNING):
        assert ids(one_epoch(stream_of(unreliable).micro_batches(0, None))) == uninterrupted
    assert sum(failures.values()) == 0
    assert "a stream: shard 1 at row 16: reset: trying again" in caplog.text


@pytest.mark.usefixtures("_no_pauses")
def test_a_stream_that_stays_away_ends_the_run_in_words(tmp_path: Path) -> None:
    shards = opened(parquet_shards(tmp_path / "rows", LENGTHS))
    for error, words in (
        (ConnectionError("reset"), "raise --stream_outage_minutes"),
        (FileNotFoundError("404"), "the file is gone or forbidden"),
    ):
        away = Shards(Unreliable(shards.stream, Counter({(1, 4): 10**6}), error), "a stream", 0.0)
        with pytest.raises(StreamLost, match="a stream: shard 1 at row 4") as caught:
            one_epoch(stream_of(away).micro_batches(0, None))
        assert words in str(caught.value)


def in_memory(num_rows: int, num_shards: int, first: int = 0) -> Shards:
    """A stream of rows {"id"}, numbered through, without files."""
    rows = datasets.Dataset.from_dict({"id": range(first, first + num_rows)})
    return Shards(rows.to_iterable_dataset(num_shards=num_shards), "--dataset_name test", 0.0)


def begun_by(processes: int) -> dict[str, Any]:
    """The state of a stream that so many processes have begun, before its first batch."""
    return {"num_lanes": processes, "round": 0, "done": 0, "epoch": 0, "lanes": {}}


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize(
    "sources", [[(20, 1)], [(20, 8)], [(20, 10)], [(8, 1), (12, 8)]], ids=["1 shard", "8", "10", "two sources"]
)
def test_defect_17_each_row_of_a_stream_meets_all_timesteps(sources: list[tuple[int, int]], lanes: int) -> None:
    """20 rows, 64 times, in batches of 8 and what an epoch leaves."""
    shards = [in_memory(rows, number, first=100 * part) for part, (rows, number) in enumerate(sources)]
    weights = [float(rows) for rows, _ in sources]
    stream = stream_of(*shards, weights=weights, global_batch_size=8, shuffle_block=20, micro_batch_size=8)
    met: dict[int, list[int]] = defaultdict(list)  # eighths of the timesteps, by row
    seen, plans = 0, stream.micro_batches(0, begun_by(lanes))
    while seen < 64 * 20:
        plan = next(plans)
        seen = plan.samples_seen
        assert sorted(plan.strata) == list(range(plan.global_batch_size)), "those of a global batch are stratified"
        for row, position, stratum in zip(plan.examples or (), plan.positions, plan.strata, strict=True):
            drawn = draw(
                7, int(position), stratum=int(stratum), global_batch_size=plan.global_batch_size,
                latent_shape=(1, 1, 1), num_train_timesteps=1000,
            )  # fmt: skip
            met[row["id"]].append(drawn.timestep // 125)
    plans.close()
    assert len(met) == 20
    for eighths in met.values():
        observed, expected = np.bincount(eighths, minlength=8), len(eighths) / 8
        assert ((observed - expected) ** 2 / expected).sum() < 35, "chi-square of 7 degrees: 1e-5"
    # The first two rows are always of one shard.
    assert np.mean([one == other for one, other in zip(met[0], met[1], strict=False)]) < 0.3


def test_defect_17_the_processes_of_a_stream_share_the_strata_of_a_batch(tmp_path: Path) -> None:
    shards = opened(parquet_shards(tmp_path / "rows", LENGTHS))
    strata: dict[int, list[int]] = defaultdict(list)  # by the global batch
    for plans in in_processes(shards, 3, size_of=lambda row: (64, 64) if row["id"] % 3 else (32, 128)):
        for plan in plans:
            strata[plan.samples_seen] += plan.strata.tolist() if plan.weight else []
    assert len(strata) > 8
    for seen, before in zip(sorted(strata), [0, *sorted(strata)], strict=False):
        assert sorted(strata[seen]) == list(range(seen - before))


def test_defect_18_a_global_batch_below_the_lanes_is_refused(tmp_path: Path) -> None:
    shards = opened(parquet_shards(tmp_path / "rows", LENGTHS))
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        stream = stream_of(shards, rank=rank, world_size=world_size, global_batch_size=4)
        with pytest.raises(RecipeError, match=r"begun by 8 processes.*a global batch of 4.*it is at least 8"):
            next(stream.micro_batches(24, begun_by(8)))
    next(stream_of(shards, global_batch_size=8).micro_batches(24, begun_by(8))), "each lane has a row"


def test_defect_18_a_stream_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--dataset_name test has no rows to train on"):
        next(stream_of(opened(parquet_shards(tmp_path / "rows", [0]))).micro_batches(0, None))


def test_defect_23_a_source_of_small_weight_is_read() -> None:
    """One row of 100, which is none of a block of 12."""
    small, large = in_memory(3, 1), in_memory(40, 2, first=1000)
    for lanes in (1, 2):
        plans = stream_of(small, large, weights=[1.0, 99.0], micro_batch_size=6).micro_batches(0, begun_by(lanes))
        taken = ids([next(plans) for _ in range(200)])
        plans.close()
        assert len(taken) == 1200
        of_small = [number for number in taken if number < 1000]
        assert len(of_small) == 12
        assert set(of_small) == {0, 1, 2}


def test_defect_6_a_closed_reader_stays_closed(tmp_path: Path) -> None:
    reader = SourceReader(opened(parquet_shards(tmp_path / "rows", LENGTHS)), seed=7, lane=0, num_lanes=1, part=0)
    assert reader.peek() is not None
    reader.close()
    with pytest.raises(StreamClosed):
        reader.peek()


def test_defect_6_closing_ends_what_waits_for_the_end_of_an_outage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = set(threading.enumerate())
    shards = opened(parquet_shards(tmp_path / "rows", LENGTHS))
    failures = Counter({(shard, length - 1): 10**6 for shard, length in enumerate(LENGTHS)})
    away = Shards(Unreliable(shards.stream, failures, ConnectionError("reset")), "a stream", 600.0)
    plans = stream_of(away, shuffle_block=6).micro_batches(0, None)
    next(plans)
    while "trying again" not in caplog.text:
        time.sleep(0.01)
    plans.close()
    end = time.monotonic() + 5
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=max(0.0, end - time.monotonic()))
        assert not thread.is_alive(), thread.name


def test_defect_24_a_process_without_a_share_has_a_row_of_the_size_it_says() -> None:
    """Of a latent cache of two sizes, whose leftovers make batches of one row."""
    made_by = {"format": FORMAT, "vae": "x", "size": 32, "crop": "center", "flips": False, "dtype": "fp16"}
    rows = [
        {
            "id": number, "text": "a", "height": height, "width": width,
            "original_height": height, "original_width": width, "made_by": json.dumps(made_by),
            "moments": np.full((8, height // 8, width // 8), number, np.float16).tobytes(), "moments_flipped": None,
        }
        for number, (height, width) in enumerate([(32, 32)] * 9 + [(16, 32)] * 5)
    ]  # fmt: skip
    recipe = Recipe(pretrained_model_name_or_path="x", dataset_name="x", output_dir="x", resolution=32)
    shards = Shards(datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3), "--dataset_name test", 0.0)
    builder = BatchBuilder(
        None, recipe, seed=7, tokenize=partial(tokenize, tiny_tokenizer()),
        latent_shape=lambda size: (4, size[0] // 8, size[1] // 8), num_train_timesteps=1000, provenance=made_by,
    )  # fmt: skip
    of_processes = in_processes(shards, 3, size_of=size_of_row(recipe), global_batch_size=3, shuffle_block=9)
    stand_ins = 0
    for plan in [plan for plans in of_processes for plan in plans]:
        batch = builder[plan]
        assert batch.moments is not None
        assert batch.moments[:, 0, 0, 0].tolist() == [row["id"] for row in plan.examples or ()]
        stand_ins += not plan.weight
    assert stand_ins > 1
