"""Rows that stand out: found among others that differ by nature, at timesteps that differ far more."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loss_tables import write_losses

from sd_recipes.evaluation.row_rankings import (
    evenly_spaced,
    hardest,
    learned_first,
    memorised,
    read_validations,
)
from sd_recipes.evaluation.sample_errors import HELD_OUT, TRAIN

NUM_ROWS = 200


def by_nature(spread: float = 0.15) -> np.ndarray:
    """What pictures differ by: a crowded one has a higher loss at all timesteps."""
    return np.exp(spread * np.random.default_rng(7).standard_normal(NUM_ROWS))


def numbers(ranked: list) -> list[int]:
    return [each.row for each in ranked]


@pytest.mark.parametrize("samples", [2, 4])
def test_the_hardest_at_the_end_are_found_whatever_their_timesteps(tmp_path: Path, samples: int) -> None:
    factors = by_nature()
    factors[[17, 99]] *= 2.2
    write_losses(tmp_path, 100, {HELD_OUT: factors}, samples=samples)
    (validation,) = read_validations(tmp_path, 40)
    found = hardest([validation[HELD_OUT]], 10)
    assert set(numbers(found)[:2]) == {17, 99}
    assert len(found) == 10
    assert [each.ratio for each in found] == sorted((each.ratio for each in found), reverse=True)
    assert found[0].ratio == pytest.approx(factors[found[0].row], rel=0.2)


def test_a_row_equal_to_its_like_has_the_ratio_1(tmp_path: Path) -> None:
    write_losses(tmp_path, 0, {HELD_OUT: np.ones(NUM_ROWS)}, noise=0)
    found = hardest([read_validations(tmp_path, 40)[0][HELD_OUT]], NUM_ROWS)
    assert 1 < max(each.ratio for each in found) < 1.03
    factors = np.ones(NUM_ROWS)
    factors[3] = 2.0
    write_losses(tmp_path, 0, {HELD_OUT: factors}, noise=0)
    found = hardest([read_validations(tmp_path, 40)[0][HELD_OUT]], 1)
    assert (found[0].row, found[0].ratio) == (3, pytest.approx(2.0, rel=0.02)), "itself is not among its like"


def test_over_all_validations_what_was_learned_by_heart_still_stands_out(tmp_path: Path) -> None:
    wrong, fallen = by_nature(), by_nature()
    wrong[42] *= 3
    for step, factors in ((0, wrong), (100, wrong), (200, fallen)):
        write_losses(tmp_path, step, {TRAIN: factors})
    losses = [each[TRAIN] for each in read_validations(tmp_path, 40)]
    assert numbers(hardest(losses, 1)) == [42]
    assert 42 not in numbers(hardest(losses[-1:], 10))


def test_learned_first_are_those_that_fell_most_when_half_was_learned(tmp_path: Path) -> None:
    start = by_nature()
    early, late = np.full(NUM_ROWS, 0.6), np.full(NUM_ROWS, 0.4)  # half of log 0.4 is log 0.63
    early[8], late[5] = 0.3, 0.1  # one falls first, another falls most
    for step, factor in ((0, 1.0), (50, 0.7), (100, early), (200, late)):
        write_losses(tmp_path, step, {TRAIN: start * factor})
    found = learned_first([each[TRAIN] for each in read_validations(tmp_path, 40)], 5)
    assert found is not None
    step, ranked = found
    assert (step, ranked[0].row) == (100, 8)
    assert ranked[0].own == pytest.approx(0.3, rel=1e-6), "the noise is the same at every validation"
    assert ranked[0].ratio == pytest.approx(0.5, rel=0.01)


def test_nothing_is_learned_first_where_nothing_was_learned(tmp_path: Path) -> None:
    for step, factor in ((0, 1.0), (100, 1.1)):
        write_losses(tmp_path, step, {HELD_OUT: by_nature() * factor})
    losses = [each[HELD_OUT] for each in read_validations(tmp_path, 40)]
    assert learned_first(losses, 5) is None
    assert learned_first(losses[:1], 5) is None
    assert learned_first([], 5) is None


def test_memorised_fell_below_training_rows_and_held_out_rows(tmp_path: Path) -> None:
    start, fell = by_nature(), np.full(NUM_ROWS, 0.8)
    fell[[11, 12]] = 0.2
    write_losses(tmp_path, 0, {HELD_OUT: start, TRAIN: start})
    write_losses(tmp_path, 300, {HELD_OUT: start * 0.9, TRAIN: start * fell})
    first, last = read_validations(tmp_path, 40)
    found = memorised(first[TRAIN], last[TRAIN], 10, (first[HELD_OUT], last[HELD_OUT]))
    assert set(numbers(found)[:2]) == {11, 12}
    assert found[0].ratio == pytest.approx(0.2 / 0.8, rel=0.05)
    assert found[0].to_held_out == pytest.approx(0.2 / 0.9, rel=0.01)
    assert found[0].own == pytest.approx(0.2)
    alone = memorised(first[TRAIN], last[TRAIN], 10)
    assert numbers(alone)[:2] == numbers(found)[:2]
    assert alone[0].to_held_out is None
    # Where held-out rows fell farther, none is learned by heart.
    write_losses(tmp_path, 300, {HELD_OUT: start * 0.1, TRAIN: start * fell})
    last = read_validations(tmp_path, 40)[1]
    assert memorised(first[TRAIN], last[TRAIN], 10, (first[HELD_OUT], last[HELD_OUT])) == []


def test_few_rows_have_no_like(tmp_path: Path) -> None:
    for step in (0, 10):
        write_losses(tmp_path, step, {TRAIN: np.ones(4)})
    losses = [each[TRAIN] for each in read_validations(tmp_path, 40)]
    assert hardest(losses, 3) == []
    assert learned_first(losses, 3) is None
    assert memorised(losses[0], losses[1], 3) == []


@pytest.mark.parametrize("rows", [5, 6, 30])
def test_few_samples_give_finite_ratios(tmp_path: Path, rows: int) -> None:
    for step, factor in ((0, 1.0), (10, 0.5)):
        write_losses(tmp_path, step, {TRAIN: factor * np.linspace(1, 2, rows)}, samples=1)
    losses = [each[TRAIN] for each in read_validations(tmp_path, 40)]
    found = [*hardest(losses, rows), *memorised(*losses, rows)]
    assert found
    assert all(np.isfinite(each.ratio) and each.ratio > 0 for each in found)


def test_averaged_weights_are_ranked_where_there_are(tmp_path: Path) -> None:
    raw = pq.read_table(write_losses(tmp_path, 0, {HELD_OUT: np.full(NUM_ROWS, 9.0)}, noise=0))
    path = write_losses(tmp_path, 0, {HELD_OUT: np.ones(NUM_ROWS)}, weights="averaged", noise=0)
    pq.write_table(pa.concat_tables([raw, pq.read_table(path)]), path)
    ((validation),) = read_validations(tmp_path, 40)
    assert np.exp(validation[HELD_OUT].log_loss).max() < 1


def test_rows_that_only_one_validation_has_are_left_out(tmp_path: Path) -> None:
    start = by_nature()
    write_losses(tmp_path, 0, {TRAIN: start})
    path = write_losses(tmp_path, 10, {TRAIN: start * 0.5})
    table = pq.read_table(path)
    pq.write_table(table.filter(pa.compute.not_equal(table.column("row"), 7)).take(pa.array(range(795, -1, -1))), path)
    first, last = (each[TRAIN] for each in read_validations(tmp_path, 40))
    found = memorised(first, last, NUM_ROWS)
    assert 7 not in numbers(found)
    assert {round(each.own, 9) for each in found} == {0.5}, "by row and timestep, whatever the order of the file"


def test_what_is_no_table_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = write_losses(tmp_path, 5, {TRAIN: np.ones(9)})
    folder = tmp_path / "validation"
    (folder / "step-000001.parquet").write_bytes(whole.read_bytes()[:-50])
    (folder / "step-000002.parquet").write_bytes(b"")
    pq.write_table(pa.table({"other": [1]}), folder / "step-000003.parquet")
    table = pq.read_table(whole)
    pq.write_table(table.replace_schema_metadata(None), folder / "step-000004.parquet")
    late = table.set_column(3, "timestep", pa.array([10**6] * table.num_rows))
    pq.write_table(late, folder / "step-000006.parquet")
    pq.write_table(pa.table({"set": [""]}), folder / "rows.parquet")
    with caplog.at_level(logging.WARNING):
        (found,) = read_validations(tmp_path, 40)
    assert found[TRAIN].step == 5
    assert [record.args[0].name for record in caplog.records] == [f"step-00000{n}.parquet" for n in (1, 2, 3, 4, 6)]
    assert read_validations(tmp_path / "none", 40) == []


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    factors = np.ones(9)
    factors[[2, 4]] = np.nan, np.inf
    factors[6] = 0
    write_losses(tmp_path, 0, {TRAIN: factors})
    (found,) = read_validations(tmp_path, 40)
    assert sorted(set(found[TRAIN].row.tolist())) == [0, 1, 3, 5, 6, 7, 8]
    assert np.isfinite(found[TRAIN].log_loss).all()


def test_evenly_spaced_keeps_both_ends() -> None:
    assert evenly_spaced(range(100), 4) == [0, 33, 66, 99]
    assert evenly_spaced([1, 2], 4) == [1, 2]
