"""Memory that runs out costs a repeated step, and changes nothing of what comes out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from conftest import ROOT
from launching import flags_of
from safetensors.torch import load_file
from schedulefree import AdamWScheduleFree
from shortages import BY_NUMBER, ONCE, shorten
from test_script import environment
from training_runs import assert_equal, average, build, fit_from, losses, train, weights

from sd_recipes.checkpoints.format import list_checkpoints
from sd_recipes.data.latent_store import open_cached
from sd_recipes.training import recovery
from sd_recipes.training.prodigy import Prodigy
from sd_recipes.training.recovery import OutOfMemory, Recovery, Undone
from sd_recipes.training.run import Run
from sd_recipes.training.schedule_free import begin_training
from sd_recipes.training.state import OPTIMIZER


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Seven rows in global batches of four, of one micro-batch: an epoch's last one has three."""
    return settings | {"max_train_samples": 7, "use_ema": True, "max_grad_norm": 0.5}


def train_short(settings: dict[str, Any], place: str, fits: int = 0, step: int = 1, **changes: Any) -> Run:
    run = build(settings, **changes)
    shorten(run, place, fits, step)
    fit_from(run)
    return run


def figures(run: Run) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("images_per_second", "data_wait", "memory_gb")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def incidents(run: Run) -> list[dict[str, Any]]:
    path = run.output_dir / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def assert_same(one: Run, other: Run) -> None:
    """Weights, average, losses and, in their last checkpoints, everything else."""
    assert_equal(weights(one), weights(other))
    assert_equal(average(one).named_tensors(), average(other).named_tensors())
    assert losses(one) == losses(other)
    checkpoints = [list_checkpoints(run.output_dir)[-1] for run in (one, other)]
    assert_equal(*(load_file(path / OPTIMIZER) for path in checkpoints))
    values = [json.loads((path / "state.json").read_text()) for path in checkpoints]
    for each in values:
        each["progress"].pop("micro_batch")
    assert values[0] == values[1]


@pytest.mark.parametrize("place", BY_NUMBER)
def test_a_step_without_memory_is_done_again_with_half_as_many_images_at_once(
    settings: dict[str, Any], tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = train(settings, micro_batch=2, output_dir=str(tmp_path / "expected"))
    run = train_short(settings, place, fits=2)
    assert_same(run, expected)
    assert run.state.progress.micro_batch == 2
    told = "No memory for 4 images at once (CUDA out of memory. Tried to allocate 4 GiB.): 2 at once from step 1 on"
    assert caplog.text.count(told) == 1
    (incident,) = incidents(run)
    assert incident["kind"] == "out_of_memory"
    assert (incident["step"], incident["micro_batch"]) == (1, 2)
    assert all(line["micro_batch"] == 2 for line in figures(run))


@pytest.mark.parametrize("place", ONCE)
def test_what_needs_no_less_memory_for_fewer_images_is_tried_again_by_itself(
    settings: dict[str, Any], tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = train(settings, output_dir=str(tmp_path / "expected"))
    for step in (1, 3):  # in the first one, the optimizer has no state yet
        run = train_short(settings, place, step=step, output_dir=str(tmp_path / f"short-{step}"))
        assert_same(run, expected)
    assert caplog.text.count("it is tried once more, with the cache emptied") == 2


@pytest.mark.parametrize("changes", [
    {"train_batch_size": 2, "gradient_accumulation_steps": 2},
    {"learned_uncertainty": True},
    {"timesteps_by_error": True},
    {"aspect_ratio_buckets": True, "bucket_step": 8},
    {"cache_text": True},
    {"optimizer": "adamw8bit"},
    {"max_bad_rows": 3, "caption_dropout": 0.5, "input_perturbation": 0.1},
], ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_whatever_a_step_notes_is_forgotten_with_it(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """From a step in the middle on; the reference is resumed there with the smaller number."""
    settings |= changes
    half = settings["train_batch_size"] // 2
    before = str(tmp_path / "expected")
    train(settings, max_train_steps=2, output_dir=before)
    expected = train(settings, micro_batch=half, resume_from_checkpoint="latest", output_dir=before)
    run = train_short(settings, "last backward", fits=half, step=3)
    assert_same(run, expected)


def test_the_latent_cache_keeps_what_was_encoded_in_the_step_that_counts(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"cache_latents": "disk", "center_crop": True, "random_flip": True, "latent_cache_dtype": "bf16"}
    expected = train(settings, micro_batch=2, output_dir=str(tmp_path / "expected"))
    run = train_short(settings, "backward", fits=2)
    assert_same(run, expected)
    tables = [
        pa.concat_tables(open_cached(path) for path in sorted((each.output_dir / "latents").rglob("*.arrow")))
        for each in (run, expected)
    ]
    assert len(tables[0]) == 7
    assert tables[0].sort_by("key").equals(tables[1].sort_by("key"))


def test_dropout_draws_the_same_in_the_step_that_counts(settings: dict[str, Any], tmp_path: Path) -> None:
    def with_dropout(run: Run) -> Run:
        for module in run.model.components.unet.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        run.model.dropout_seed = run.recipe.seed  # as of a UNet that is built with it
        return run

    expected = with_dropout(build(settings, micro_batch=2, output_dir=str(tmp_path / "expected")))
    fit_from(expected)
    run = with_dropout(build(settings))
    shorten(run, "backward", fits=2)
    fit_from(run)
    assert_same(run, expected)


def test_it_is_halved_until_it_fits_and_what_was_found_is_kept(settings: dict[str, Any], tmp_path: Path) -> None:
    """From four to one; in the checkpoint, and by the run that resumes from it, which does not ask for more."""
    expected = train(settings, micro_batch=1, output_dir=str(tmp_path / "expected"))
    run = train_short(settings, "forward", fits=1, max_train_steps=2)
    assert [each["micro_batch"] for each in incidents(run)] == [2, 1]
    resumed = build(settings, resume_from_checkpoint="latest")
    shorten(resumed, "forward", fits=1)
    fit_from(resumed)
    assert len(incidents(resumed)) == 2, "no further ones"
    assert_same(resumed, expected)


def test_somebody_who_asks_for_another_number_gets_it(settings: dict[str, Any]) -> None:
    train_short(settings, "forward", fits=1, max_train_steps=2)
    asked = train(settings, micro_batch=2, resume_from_checkpoint="latest", max_train_steps=3)
    assert [line.get("micro_batch") for line in figures(asked)] == [1, 1, None]
    assert Recovery(asked).size == 2


def test_auto_tries_more_again(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At a step where memory was short once, and enough later."""
    monkeypatch.setattr(recovery, "STEPS_TO_GROW", 2)
    run = build(settings, micro_batch="auto", max_train_steps=8)
    encode, calls = run.model.encode_text, []

    def short_in_the_second_step(ids: torch.Tensor) -> Any:
        calls.append(len(ids))
        if run.state.progress.global_step == 1 and len(ids) > 1:
            raise MemoryError
        return encode(ids)

    run.model.encode_text = short_in_the_second_step
    fit_from(run)
    assert calls[:4] == [4, 3, 2, 1], "a step, one of three images, and fewer of them"
    assert [line.get("micro_batch") for line in figures(run)] == [None, 1, 1, 2, 2, 2, 2, None]


def test_not_even_one_image_ends_the_run_with_a_checkpoint_and_what_helps(settings: dict[str, Any]) -> None:
    run = build(settings, checkpointing_steps=100)
    shorten(run, "backward", fits=0, step=3)
    with pytest.raises(OutOfMemory) as error:
        fit_from(run)
    assert error.value.status == 8
    told = str(error.value)
    assert told.startswith("no memory for even one image at once (CUDA out of memory. Tried to allocate 1 GiB.): use ")
    assert "--gradient_checkpointing, --optimizer adamw8bit, --offload_ema or a smaller --resolution; " in told
    assert told.endswith("the same command then resumes from checkpoint-2")
    expected = train(settings, output_dir=settings["output_dir"] + "-expected")
    assert_same(train(settings, resume_from_checkpoint="latest", micro_batch=4), expected)


def test_not_even_one_image_in_the_first_step_leaves_nothing_to_resume(settings: dict[str, Any]) -> None:
    run = build(settings)
    shorten(run, "text", fits=0)
    with pytest.raises(OutOfMemory, match=r"; \S+ has no checkpoint$"):
        fit_from(run)
    assert list_checkpoints(run.output_dir) == []


@pytest.mark.parametrize("what", ["optimizer", "average"])
def test_weights_that_are_half_updated_end_the_run_at_its_last_checkpoint(settings: dict[str, Any], what: str) -> None:
    run = build(settings, checkpointing_steps=2)

    def fail(*arguments: Any) -> None:
        if run.state.progress.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    if what == "optimizer":
        run.state.optimizer.optimizer.register_step_post_hook(fail)
    else:
        step = average(run)._step
        average(run)._step = lambda: (step(), fail())
    with pytest.raises(OutOfMemory, match=r"what follows step 2, which cannot be done again .*from checkpoint-2$"):
        fit_from(run)


def test_other_errors_are_bugs(settings: dict[str, Any]) -> None:
    run = build(settings)
    run.model.components.unet.mid_block.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_from(run)


OPTIMIZERS = {
    "fused": lambda weights: torch.optim.AdamW(weights, fused=True),
    "foreach": lambda weights: torch.optim.AdamW(weights, foreach=True),
    "sgd": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9),
    "adafactor": lambda weights: torch.optim.Adafactor(weights),
    "prodigy": lambda weights: Prodigy(weights, 1.0),
    "schedule_free_adamw": lambda weights: AdamWScheduleFree(weights),
    "adamw8bit": lambda weights: pytest.importorskip("bitsandbytes").optim.AdamW8bit(weights),
}


def begun(name: str, weights: list[torch.nn.Parameter]) -> Any:
    optimizer = OPTIMIZERS[name](weights)
    begin_training(optimizer)
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_undone_as_long_as_it_has_changed_nothing(name: str) -> None:
    """In the first step, where state is made, and in a later one."""
    weights = [torch.nn.Parameter(torch.full((64, 80), 1.0 + number)) for number in range(3)]
    optimizer = begun(name, weights)
    for had in (0, 3):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        is_undone = Undone(optimizer)
        assert is_undone()
        optimizer.state.setdefault(weights[1], {})  # as where memory ends while it is made
        assert is_undone()
        assert sum(map(bool, optimizer.state.values())) == had
        optimizer.step()
        assert len(optimizer.state) == 3
        assert not is_undone()
        optimizer = begun(name, weights)
        optimizer.step()


@pytest.mark.parametrize("optimizer_name", ["adamw", pytest.param("schedule_free_adamw", marks=pytest.mark.slow)])
def test_an_optimizer_that_runs_out_while_it_makes_its_state_steps_all_the_same(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer_name: str
) -> None:
    """Of the weights, some have their state by then, and one a half of it; what is counted of all is counted once."""
    settings |= {"optimizer": optimizer_name, "use_ema": optimizer_name == "adamw"}
    expected = train(settings, max_train_steps=2, output_dir=str(tmp_path / "expected"))
    run = build(settings, max_train_steps=2)
    zeros_like, calls = torch.zeros_like, []

    def short(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return zeros_like(*arguments, **options)

    optimizer = run.state.optimizer.optimizer
    optimizer.register_step_pre_hook(lambda *_: monkeypatch.setattr("torch.zeros_like", short))
    optimizer.register_step_post_hook(lambda *_: monkeypatch.undo())
    fit_from(run)
    assert len(calls) > 6
    assert_same(run, expected)


def test_an_allocator_that_has_to_make_room_in_two_steps_running_is_short_of_memory(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Retries in the first step, and in the fourth and fifth."""
    numbers = iter([0, 1, 1, 1, 2, 3, 3])
    monkeypatch.setattr(recovery, "num_alloc_retries", lambda device: next(numbers))
    run = train(settings, max_train_steps=6)
    assert [line.get("micro_batch") for line in figures(run)] == [None, None, None, None, 2, 2]
    told = "No memory for 4 images at once (the device's allocator had to make room in two steps running): 2 at once "
    assert told + "from step 6 on" in caplog.text


# What is freed goes back to the system, so that the limit is one on what is in use.
GIVES_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
LIMITED = """
import resource, runpy, sys
limit, *sys.argv = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    status = open("/proc/self/status").read()
    print("took", 1024 * int(status.split("VmPeak:")[1].split()[0]))
"""


@pytest.mark.slow
def test_the_script_gets_by_with_the_memory_that_there_is(settings: dict[str, Any], tmp_path: Path) -> None:
    """Really, on the host: the address space is limited to little more than one image at once takes."""
    settings |= {"resolution": 256, "train_batch_size": 8, "max_train_steps": 2, "check_data": "off"}
    settings.pop("max_train_samples")

    def run(name: str, limit: int = 0, **changes: Any) -> tuple[int, str]:
        flags = flags_of(settings | {"output_dir": tmp_path / name, **changes})
        command = [sys.executable, "-c", LIMITED, limit, ROOT / "train_text_to_image.py", "--device", "cpu", *flags]
        done = subprocess.run(
            [str(part) for part in command],
            env=environment(**GIVES_BACK), cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split("took ")[1].split()[0]), done.stderr

    few, _ = run("one", micro_batch=1)
    many, _ = run("eight")
    _, told = run("limited", limit=few + (many - few) // 4)
    assert "No memory for 8 images at once (" in told
    expected, found = (
        [json.loads(line)["train_loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "limited")
    )
    assert found == pytest.approx(expected, rel=1e-4)
