import numpy as np
import pytest

from sd_recipes.checkpoints.format import Manifest
from sd_recipes.checkpoints.resume import finish_epoch
from sd_recipes.data.draws import draw
from sd_recipes.data.order import Order, apportion, share
from sd_recipes.recipe import ObjectiveConfig


def take(order: Order, samples_seen: int, number: int) -> list:
    batches = order.batches_from(samples_seen)
    return [next(batches) for _ in range(number)]


def test_every_row_comes_once_an_epoch_and_the_last_batch_is_smaller() -> None:
    order = Order((10,), global_batch_size=4, seed=7)
    batches = take(order, 0, order.num_steps(2))
    assert [len(batch.rows) for batch in batches] == [4, 4, 2] * 2
    epochs = [np.concatenate([batch.rows for batch in batches[start : start + 3]]) for start in (0, 3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert list(epochs[0]) != list(epochs[1])
    assert [batch.ends_epoch for batch in batches] == [False, False, True] * 2


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_position_is_one_number(steps: int) -> None:
    order = Order((10,), global_batch_size=4, seed=7)
    whole = take(order, 0, 8)
    seen = sum(len(batch.rows) for batch in whole[:steps])
    for expected, batch in zip(whole[steps:], take(order, seen, 8 - steps), strict=True):
        assert batch.position == expected.position
        np.testing.assert_array_equal(batch.rows, expected.rows)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_the_processes_share_a_global_batch_exactly(world_size: int, micro_batch_size: int) -> None:
    for batch in take(Order((11,), global_batch_size=6, seed=1), 0, 4):
        shares = [
            share(batch, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
            for rank in range(world_size)
        ]
        for plans in shares:
            assert [plan.is_last for plan in plans] == [False] * (len(plans) - 1) + [True]
        plans = [plan for plans in shares for plan in plans if plan.weight]
        positions = np.concatenate([plan.positions for plan in plans])
        assert sorted(positions) == list(range(batch.position, batch.position + len(batch.rows)))
        assert all(len(plan.rows) <= micro_batch_size for plan in plans)


def bucketed() -> Order:
    sizes = ((64, 64), (32, 128), (128, 32))
    buckets = np.array([0] * 9 + [1] * 5 + [2] * 1)
    return Order((15,), global_batch_size=4, seed=3, sizes=sizes, buckets=buckets)


def test_a_global_batch_is_of_one_bucket_and_leftovers_are_batched() -> None:
    order = bucketed()
    batches = take(order, 0, order.num_steps(2))
    for batch in batches:
        assert {order.sizes[order.buckets[row]] for row in batch.rows} == {batch.size}
    first = [batch for batch in batches if batch.epoch == 0]
    assert sorted(np.concatenate([batch.rows for batch in first])) == list(range(15))
    assert sorted(len(batch.rows) for batch in first) == [1, 1, 1, 4, 4, 4]
    assert [batch.ends_epoch for batch in first] == [False] * 5 + [True]
    sizes = [batch.size for batch in batches]
    assert sizes[:6] != sorted(sizes[:6]), "buckets come mixed"
    assert sizes[:6] != sizes[6:], "in another order every epoch"


@pytest.mark.parametrize("steps", [1, 4, 6, 9])
def test_the_position_among_buckets_is_one_number(steps: int) -> None:
    whole = take(bucketed(), 0, 12)
    seen = sum(len(batch.rows) for batch in whole[:steps])
    for expected, batch in zip(whole[steps:], take(bucketed(), seen, 12 - steps), strict=True):
        assert (batch.position, batch.size, batch.epoch) == (expected.position, expected.size, expected.epoch)
        np.testing.assert_array_equal(batch.rows, expected.rows)


def of_100_rows(batch_size: int, *, bucketed: bool) -> Order:
    sizes = ((64, 64), (32, 128), (128, 32))
    buckets = np.arange(100) % 3 if bucketed else None
    return Order((100,), batch_size, seed=3, sizes=sizes, buckets=buckets)


@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize(("before", "after"), [(10, 20), (20, 10), (7, 9)])
@pytest.mark.parametrize("epochs_done", [5, 5.3])
def test_defect_20_the_steps_that_remain_are_counted_from_the_position(
    before: int, after: int, epochs_done: float, bucketed: bool
) -> None:
    """Of 10 epochs of 100 rows, whatever the batches were until then."""
    first, second = of_100_rows(before, bucketed=bucketed), of_100_rows(after, bucketed=bucketed)
    seen = next(batch.position for batch in first.batches_from(0) if batch.position >= 100 * epochs_done)
    left = first.num_steps(10) - first.num_steps(10, seen)
    assert take(first, 0, left)[-1].position < seen == take(first, 0, left + 1)[-1].position
    last = take(second, seen, second.num_steps(10, seen))[-1]
    assert last.ends_epoch
    assert last.position + len(last.rows) == 1000
    assert second.num_steps(10, 1000) == second.num_steps(9, 1000) == 0
    assert bucketed or epochs_done > 5 or second.num_steps(10, 500) == 5 * -(-100 // after)


@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize("sizes", [(4, 8), (8, 4), (10, 7, 7, 10), (5, 9, 2), (3, 3)])
def test_defect_21_a_changed_batch_deals_no_row_twice(sizes: tuple[int, ...], bucketed: bool) -> None:
    """A run is resumed in the middle of an epoch, and again, from what its checkpoints say; then the next epoch."""
    seen, rows, identity = 0, [], {"num_rows": 100, "begun": None}
    for number, size in enumerate(sizes):
        order = of_100_rows(size, bucketed=bucketed)
        if number:
            order = finish_epoch(order, Manifest(samples_seen=seen, identity=identity, **OF_NO_MATTER))
        identity |= {"global_batch_size": size, "begun": order.begun and list(order.begun)}
        for batch in take(order, seen, 2 if number < len(sizes) - 1 else order.num_steps(3, seen)):
            assert len(set(order.buckets[batch.rows])) == 1 if bucketed else True
            rows += batch.rows.tolist()
            assert batch.position == seen
            seen += len(batch.rows)
    assert [np.bincount(rows[start : start + 100]).tolist() for start in (0, 100, 200)] == 3 * [[1] * 100]
    expected = of_100_rows(sizes[-1], bucketed=bucketed)
    for one, other in zip(take(order, 100, 9), take(expected, 100, 9), strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)


OF_NO_MATTER = {"format": 2, "step": 0, "world_size": 1, "versions": {}, "settings": {}}


def test_sources_are_mixed_by_weight_and_each_goes_through_its_rows() -> None:
    """Of 10 + 30 rows with weights 3 to 1, an epoch has 30 of the first, three times over, and 10 of the second."""
    order = Order((10, 30), global_batch_size=8, seed=5, source_weights=(3.0, 1.0))
    epochs = [np.concatenate([batch.rows for batch in take(order, 40 * number, 5)]) for number in range(3)]
    for rows in epochs:
        assert np.bincount(rows[rows < 10]).tolist() == [3] * 10
        assert (rows >= 10).sum() == 10
    assert sorted(np.concatenate([rows[rows >= 10] for rows in epochs])) == list(range(10, 40)), "none comes twice"


def test_parts_are_whole_and_proportional() -> None:
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(7, [0.1, 0.9]) == [1, 6]
    assert sum(apportion(1001, [0.2, 0.3, 0.7])) == 1001


def test_no_part_shrinks_as_the_total_grows() -> None:
    for weights in ([1.0, 99.0], [0.1, 0.9], [1.0, 1.0, 1.0], [5.3, 0.2, 0.2, 0.01, 2.5], [0.5] * 6):
        parts = np.array([apportion(total, weights) for total in range(500)])
        assert (parts.sum(axis=1) == np.arange(500)).all()
        assert (np.diff(parts, axis=0) >= 0).all()


def test_defect_23_a_source_of_small_weight_is_read() -> None:
    """A third of one row of 100 is none; in six epochs it is two rows, and every epoch has 100."""
    order = Order((4, 96), global_batch_size=16, seed=5, source_weights=(1.0, 299.0))
    batches = take(order, 0, order.num_steps(24))
    assert [batch.epoch for batch in batches if batch.ends_epoch] == list(range(24))
    assert batches[-1].position + len(batches[-1].rows) == 24 * 100
    rows = np.concatenate([batch.rows for batch in batches])
    assert np.bincount(rows[rows < 4]).tolist() == [2] * 4, "each of the first source twice"
    uses = np.bincount(rows[rows >= 4] - 4)
    assert uses.max() - uses.min() == 1, "and of the second none more than once over the others"
    for number in (3, 40, 71):  # the position is one number still
        for expected, batch in zip(batches[number:], take(order, batches[number].position, 20), strict=False):
            assert (batch.position, batch.epoch) == (expected.position, expected.epoch)
            np.testing.assert_array_equal(batch.rows, expected.rows)


SETTINGS = {"latent_shape": (4, 8, 8), "num_train_timesteps": 1000}


def test_a_sample_has_its_own_draws_and_keeps_them() -> None:
    one, again = (draw(3, 5, stratum=1, global_batch_size=4, **SETTINGS) for _ in range(2))
    np.testing.assert_array_equal(one.noise, again.noise)
    assert (one.timestep, one.crop_u, one.flip_u) == (again.timestep, again.crop_u, again.flip_u)
    others = [
        draw(3, 6, stratum=1, global_batch_size=4, **SETTINGS),
        draw(4, 5, stratum=1, global_batch_size=4, **SETTINGS),
    ]
    for other in others:
        assert not np.array_equal(one.noise, other.noise)
        assert one.flip_u != other.flip_u
    assert not np.array_equal(one.noise, one.posterior_noise)


def test_timesteps_are_stratified_and_uniform() -> None:
    timesteps = np.array([draw(0, p, stratum=p % 8, global_batch_size=8, **SETTINGS).timestep for p in range(8000)])
    assert (np.sort(timesteps.reshape(-1, 8)) // 125 == np.arange(8)).all()
    assert abs(timesteps.mean() - 499.5) < 3
    assert timesteps.min() < 5
    assert timesteps.max() > 994


@pytest.mark.parametrize(
    "order",
    [
        Order((12,), global_batch_size=8, seed=7),
        Order((3, 9), global_batch_size=8, seed=7, source_weights=(1.0, 2.0)),
        Order(
            (12,), global_batch_size=8, seed=7, sizes=((64, 64), (32, 128)), buckets=np.array([0] * 9 + [1] * 3)
        ),
    ],
    ids=["rows", "two sources", "buckets"],
)  # fmt: skip
def test_defect_17_each_row_meets_all_timesteps(order: Order) -> None:
    """In 80 epochs of 12 rows, in batches of 8 and what an epoch or a bucket leaves."""
    met: list[list[int]] = [[] for _ in range(12)]  # eighths of the timesteps, by row
    for batch in take(order, 0, order.num_steps(80)):
        strata = []
        for plan in [p for rank in range(2) for p in share(batch, rank=rank, world_size=2, micro_batch_size=2)]:
            if not plan.weight:
                continue
            strata += plan.strata.tolist()
            for row, position, stratum in zip(plan.rows, plan.positions, plan.strata, strict=True):
                size = plan.global_batch_size
                drawn = draw(7, int(position), stratum=int(stratum), global_batch_size=size, **SETTINGS)
                met[row].append(drawn.timestep // 125)
        assert sorted(strata) == list(range(len(batch.rows))), "those of a global batch are stratified"
    for eighths in met:
        observed, expected = np.bincount(eighths, minlength=8), len(eighths) / 8
        assert ((observed - expected) ** 2 / expected).sum() < 35, "chi-square of 7 degrees: 1e-5"


def test_noise_is_standard_normal() -> None:
    noise = np.stack([draw(0, p, stratum=0, global_batch_size=1, **SETTINGS).noise for p in range(1000)])
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01


def test_perturbation_leaves_the_other_draws_alone() -> None:
    plain, perturbed = (
        draw(0, 9, stratum=0, global_batch_size=1, objective=ObjectiveConfig(input_perturbation=scale), **SETTINGS)
        for scale in (0.0, 0.1)
    )
    assert plain.perturbation_noise is None
    assert perturbed.perturbation_noise is not None
    np.testing.assert_array_equal(plain.noise, perturbed.noise)
