"""How many processes read ahead, and that a run does not depend on it."""

from __future__ import annotations

import logging
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
from training_runs import assert_equal, train, weights

from sd_recipes.data.workers import MOST, num_workers_of
from sd_recipes.recipe import Recipe
from sd_recipes.runtime import cores
from sd_recipes.training.loop import remedy
from sd_recipes.training.odd_run import odd_workers


@pytest.mark.parametrize(
    ("given", "device", "num_cores", "processes", "expected"),
    [
        (None, "cpu", 16, 1, 0), (None, "cuda", 16, 1, 8), (None, "cuda", 16, 4, 4), (None, "cuda", 2, 4, 1),
        (0, "cuda", 16, 1, 0), (3, "cuda", 2, 1, 3), (3, "cpu", 2, 1, 3),
    ],
)  # fmt: skip
def test_a_gpu_has_workers_and_a_cpu_a_thread_unless_a_number_is_given(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, given: int | None, device: str, num_cores: int,
    processes: int, expected: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(cores, "num_cores", lambda: num_cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert num_workers_of(Recipe(**settings, dataloader_num_workers=given), device) == expected


@pytest.mark.parametrize(
    ("megabytes", "processes", "expected"), [(64, 1, 2), (10, 1, 0), (10_000, 1, 8), (128, 2, 2), (64, 2, 1)]
)
def test_shared_memory_has_room_for_what_the_workers_of_all_processes_read_ahead(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, megabytes: int, processes: int, expected: int
) -> None:
    """Where it has not, that is said, and more are not advised."""
    monkeypatch.setattr(cores, "num_cores", lambda: 16 * processes)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=megabytes * 10**6))
    recipe = Recipe(**settings | {"resolution": 512, "train_batch_size": 8})
    assert num_workers_of(recipe, "cuda") == expected
    if expected == MOST:
        assert odd_workers(recipe, "cuda") == []
        assert "--dataloader_num_workers 16" in remedy(recipe, expected)
    else:
        (words,) = odd_workers(recipe, "cuda")
        assert f"has room for what {expected} loader processes read ahead, instead of 8" in words
        assert "--dataloader_num_workers" not in remedy(recipe, expected)
        assert (
            odd_workers(recipe, "cpu")
            == odd_workers(recipe.model_copy(update={"dataloader_num_workers": 0}), "cuda")
            == []
        )


def test_a_run_goes_on_with_other_workers_to_the_bit_and_without_a_word(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(settings, output_dir=settings["output_dir"] + "-whole")
    settings |= {"checkpointing_steps": 2}
    train(settings, max_train_steps=2)
    with caplog.at_level(logging.WARNING):
        resumed = train(settings, dataloader_num_workers=1, resume_from_checkpoint="latest")
    assert "dataloader_num_workers" not in caplog.text
    assert resumed.state.progress.global_step == 4
    assert_equal(weights(whole), weights(resumed))
