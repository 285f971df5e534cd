"""Checkpoints: whole or not there, found by what they hold, refused when they are not what was written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from poisoned import poison
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from training_runs import assert_equal, fit_from, forget_accelerator, train, weights

from sd_recipes.checkpoints import format as checkpoint
from sd_recipes.checkpoints import saver as saving
from sd_recipes.checkpoints.format import (
    FORMAT,
    MANIFEST,
    STATE,
    Contents,
    DamagedCheckpoint,
    Manifest,
    find_checkpoint,
    list_checkpoints,
    read_json,
    verify_checkpoint,
    write_checkpoint,
)
from sd_recipes.checkpoints.saver import NotSaved
from sd_recipes.commands.train import resolve, run
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import start_accelerator
from sd_recipes.runtime.output_dir import check_output_dir
from sd_recipes.runtime.signals import Stopped, stop_request
from sd_recipes.runtime.trackers import Tracker, read_metrics
from sd_recipes.training.build import build_run
from sd_recipes.training.build_parts import UNET_WEIGHTS
from sd_recipes.training.run import Run
from sd_recipes.training.state import OPTIMIZER, TrainState


def contents(step: int, **changes: Any) -> Contents:
    manifest = Manifest(
        format=FORMAT, step=step, samples_seen=4 * step, world_size=1, versions={}, settings={}, identity={}, **changes
    )
    return Contents(
        manifest,
        {STATE: json.dumps({"step": step}), "unet/config.json": "{}"},
        {f"unet/{UNET_WEIGHTS}": {"w": torch.full((64,), float(step))}, OPTIMIZER: {"unet/w/m": torch.arange(9.0)}},
    )


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for step in (2, 4, 10):
        write_checkpoint(contents(step), tmp_path, limit=None)
    return tmp_path


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """As somebody does who knows the format: with a digest that is right."""
    content = read_json(path / MANIFEST)
    content.pop("digest")
    change(content)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps({**content, "digest": digest}))


def entry(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# --------------------------------------------------------------------------------------------- a run's


def test_a_checkpoint_says_what_it_is_of(settings: dict[str, Any], tmp_path: Path) -> None:
    training = train(settings, use_ema=True, checkpointing_steps=3)
    path = tmp_path / "run" / "checkpoint-3"
    manifest = verify_checkpoint(path)
    assert (manifest.step, manifest.samples_seen, manifest.world_size) == (3, 12, 1)
    assert manifest.settings["learning_rate"] == 1e-3
    assert manifest.identity["num_rows"] == 8
    assert set(manifest.versions) == {"sd-recipes", "torch", "diffusers"}
    on_disk = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    on_disk.pop(MANIFEST)
    assert {name: each.size for name, each in manifest.files.items()} == on_disk
    assert {Path(name).suffix for name in on_disk} == {".safetensors", ".json"}
    for part in ("unet", "unet_ema"):
        UNet2DConditionModel.from_pretrained(path / part)
    last = tmp_path / "run" / "checkpoint-4"
    assert verify_checkpoint(last).step == 4, "the last step is saved too"
    saved = load_file(last / "unet" / UNET_WEIGHTS)
    assert all(torch.equal(saved[name], value) for name, value in weights(training).items())


def test_minutes_save_beside_steps(settings: dict[str, Any], tmp_path: Path) -> None:
    train(settings, checkpointing_minutes=1e-9)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]


def test_the_snapshot_is_of_its_step(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while the writer is held up; what it writes then is what was there before."""
    third_step = threading.Event()
    write = saving.write_checkpoint

    def late(snapshot: Contents, *rest: Any) -> Path:
        assert third_step.wait(timeout=30)
        return write(snapshot, *rest)

    monkeypatch.setattr(saving, "write_checkpoint", late)
    monkeypatch.setattr(Tracker, "log", lambda tracker, figures, step: third_step.set() if step == 3 else None)
    train(settings, checkpointing_steps=2, output_dir=str(tmp_path / "late"))
    monkeypatch.undo()
    plain = train(settings, max_train_steps=2)
    saved = load_file(tmp_path / "late" / "checkpoint-2" / "unet" / UNET_WEIGHTS)
    assert all(torch.equal(saved[name], value) for name, value in weights(plain).items())


def test_defect_9_progress_of_a_checkpoint_in_writing_is_not_lost(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step is saved, and the one after it is not: what the writer raised is told none the less."""
    train(settings, max_train_steps=2)
    write = saving.write_checkpoint

    def broken_once(contents: Contents, *rest: Any) -> Path:
        if contents.manifest.step == 3:
            raise KeyError("a bug")
        return write(contents, *rest)

    monkeypatch.setattr(saving, "write_checkpoint", broken_once)
    with pytest.raises(KeyError, match="a bug"):
        train(settings, resume_from_checkpoint="latest", checkpointing_steps=3, max_train_steps=6)


def test_defect_9_progress_that_goes_on_is_not_in_the_snapshot(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a checkpoint in writing holds is of its step, though training has gone on by two."""
    fifth_step = threading.Event()
    write, log = saving.write_checkpoint, Tracker.log

    def late(snapshot: Contents, *rest: Any) -> Path:
        assert fifth_step.wait(timeout=30)
        return write(snapshot, *rest)

    def logged(tracker: Tracker, figures: dict[str, Any], step: int) -> None:
        log(tracker, figures, step)
        if step == 5:
            fifth_step.set()

    settings |= {"use_ema": True, "lr_scheduler": "cosine", "checkpointing_steps": 3, "max_train_steps": 5}
    train(settings, output_dir=str(tmp_path / "uninterrupted"))
    monkeypatch.setattr(saving, "write_checkpoint", late)
    monkeypatch.setattr(Tracker, "log", logged)
    train(settings)
    for step in (3, 5):
        one, other = (tmp_path / out / f"checkpoint-{step}" for out in ("uninterrupted", "run"))
        assert verify_checkpoint(one).files == verify_checkpoint(other).files


# ------------------------------------------------------------------------------- without optimizer tensors


def test_defect_11_a_checkpoint_without_optimizer_tensors_is_written_and_gone_on_from(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"optimizer": "sgd", "sgd_momentum": 0.0, "checkpointing_steps": 2}
    uninterrupted = train(settings, output_dir=str(tmp_path / "uninterrupted"))
    train(settings, max_train_steps=2)
    assert verify_checkpoint(tmp_path / "run" / "checkpoint-2").step == 2
    assert load_file(tmp_path / "run" / "checkpoint-2" / OPTIMIZER) == {}
    resumed = train(settings, resume_from_checkpoint="latest")
    assert_equal(weights(uninterrupted), weights(resumed))


def test_defect_11_a_signal_saves_it(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracker, "log", lambda *_: setattr(stop_request, "reason", "SIGTERM"))
    try:
        with pytest.raises(Stopped, match="saved at step 1"):
            train(settings, optimizer="sgd", sgd_momentum=0.0)
    finally:
        stop_request.reason = None
    assert verify_checkpoint(tmp_path / "run" / "checkpoint-1").step == 1


def train_scaled(settings: dict[str, Any], skipped: set[int], **changes: Any) -> Run:
    """With the loss scaler of fp16, on the CPU, which skips these steps of one micro-batch."""
    forget_accelerator()
    recipe = Recipe(**{**settings, **changes})
    check_output_dir(Path(recipe.output_dir))
    accelerator = start_accelerator(recipe)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    recipe, found = resolve(recipe, accelerator, recipe.resume_from_checkpoint)
    built = build_run(recipe, accelerator, found)
    poison(built, skipped)
    fit_from(built)
    return built


def test_defect_11_a_checkpoint_before_the_scaler_lets_a_step_pass(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"optimizer": "sgd", "lr_scheduler": "cosine", "checkpointing_steps": 2, "use_ema": True}
    uninterrupted = train_scaled(settings, {1, 2, 3}, output_dir=str(tmp_path / "uninterrupted"), max_train_steps=6)
    train_scaled(settings, {1, 2}, max_train_steps=2)
    path = tmp_path / "run" / "checkpoint-2"
    assert load_file(path / OPTIMIZER) == {}
    assert read_json(path / STATE)["scaler"]["scale"] == 65536 / 4
    resumed = train_scaled(settings, {1}, max_train_steps=6, resume_from_checkpoint="latest")
    assert_equal(weights(uninterrupted), weights(resumed))
    one, other = (verify_checkpoint(tmp_path / out / "checkpoint-6").files for out in ("uninterrupted", "run"))
    assert one == other
    assert all("grad_norm" not in line for line in read_metrics(tmp_path / "run" / "metrics.jsonl")[:3])


# ------------------------------------------------------------------------------------ found and kept


def test_the_newest_is_the_highest_step_whatever_the_clock_says(three: Path) -> None:
    for number, step in enumerate((10, 4, 2)):  # as if the clock had been set back between them
        for file in (three / f"checkpoint-{step}").rglob("*"):
            os.utime(file, (10**9 + number, 10**9 + number))
        os.utime(three / f"checkpoint-{step}", (10**9 + number, 10**9 + number))
    found = find_checkpoint(three, "latest")
    assert found is not None
    assert found[0].name == "checkpoint-10"
    newest = write_checkpoint(contents(12), three, limit=2)
    assert list_checkpoints(three) == [three / "checkpoint-10", newest]


def of_older_format(path: Path) -> None:
    """Format 2 as it was: the optimizer's tensors named by number, and of the UNet alone."""
    tensors = {name.replace("unet/w", "0"): tensor for name, tensor in load_file(path / OPTIMIZER).items()}
    save_file(tensors, path / OPTIMIZER)
    data = (path / OPTIMIZER).read_bytes()
    rewrite_manifest(path, lambda m: m.update(format=2, files=m["files"] | {OPTIMIZER: entry(data)}))


def flip(path: Path, at: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda c: os.truncate(c / OPTIMIZER, 40), "optimizer.safetensors has 40 bytes and had"),
    "bit-flipped": (lambda c: flip(c / "unet" / UNET_WEIGHTS), f"unet/{UNET_WEIGHTS} is not as it was written"),
    "removed": (lambda c: (c / STATE).unlink(), "state.json"),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), "it has no manifest.json"),
    "half a manifest": (lambda c: os.truncate(c / MANIFEST, 100), "manifest.json cannot be read"),
    "flipped manifest": (
        lambda c: (c / MANIFEST).write_text((c / MANIFEST).read_text().replace('"step": 10', '"step": 11')),
        "manifest.json is not as it was written",
    ),
    "an older format": (lambda c: of_older_format(c), "it has format 2 and this version reads 3"),
    "a far older format": (lambda c: (c / MANIFEST).write_text('{"format": 1}'), "it has format 1"),
    "empty": (lambda c: [shutil.rmtree(c), c.mkdir()], "it has no manifest.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_one_is_skipped_and_named(three: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    damage, words = DAMAGE[name]
    damage(three / "checkpoint-10")
    found = find_checkpoint(three, "latest")
    assert found is not None
    assert found[0].name == "checkpoint-4"
    assert f"Skipped {three}/checkpoint-10: " in caplog.text
    assert words in caplog.text
    with pytest.raises(RecipeError, match=r"\['checkpoint-2', 'checkpoint-4'\]") as error:
        find_checkpoint(three, "checkpoint-10")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wanted", ["latest", "checkpoint-1"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_run_of_an_older_format_is_refused_by_name_in_one_line(
    settings: dict[str, Any], tmp_path: Path, wanted: str, dry_run: bool
) -> None:
    path = tmp_path / "run" / "checkpoint-1"
    train(settings, max_train_steps=1)
    of_older_format(path)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    with pytest.raises(RecipeError) as error:
        run(Recipe(**settings, resume_from_checkpoint=wanted, dry_run=dry_run))
    told = str(error.value)
    assert "checkpoint-1: it has format 2 and this version reads 3: only the version that wrote it can resume" in told
    assert str(path.parent) in told
    assert "\n" not in told
    assert before == {file: file.stat().st_mtime_ns for file in path.rglob("*")}


def test_when_none_is_whole_the_run_does_not_start_anew_in_silence(three: Path) -> None:
    for path in list_checkpoints(three):
        os.truncate(path / OPTIMIZER, 10)
    with pytest.raises(RecipeError, match=r"none of .* is whole .* --overwrite"):
        find_checkpoint(three, "latest")
    assert find_checkpoint(three / "elsewhere", "latest") is None


def test_half_written_and_half_removed_ones_are_no_checkpoints(three: Path) -> None:
    os.rename(three / "checkpoint-10", three / ".checkpoint-10.partial")
    os.rename(three / "checkpoint-2", three / ".checkpoint-2.removed")
    assert [path.name for path in list_checkpoints(three)] == ["checkpoint-4"]
    write_checkpoint(contents(12), three, limit=None)
    assert sorted(path.name for path in three.iterdir()) == ["checkpoint-12", "checkpoint-4"]


def test_pruning_waits_for_the_new_one_to_verify(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(path: Path) -> Manifest:
        raise DamagedCheckpoint("its disk lies")

    monkeypatch.setattr(checkpoint, "verify_checkpoint", damaged)
    with pytest.raises(OSError, match="its disk lies"):
        write_checkpoint(contents(12), three, limit=1)
    assert [path.name for path in list_checkpoints(three)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]


# ------------------------------------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB in memory."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs rights that this user has not")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_seen_before_writing(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9, free=1000))
    with pytest.raises(OSError, match=r"needs 0.00105 GB and .* has 1e-06 GB free"):
        write_checkpoint(contents(12), three, limit=1)
    assert len(list_checkpoints(three)) == 3


def test_a_disk_that_fills_up_keeps_the_old_one_and_training_goes_on(
    settings: dict[str, Any], small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = small_disk / "run"
    first = train(settings, output_dir=str(out), max_train_steps=1)
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-1"]
    one = sum(file.stat().st_size for file in (out / "checkpoint-1").rglob("*") if file.is_file())
    left = shutil.disk_usage(out).free
    (small_disk / "others").write_bytes(bytes(left - one // 2))
    again = train(
        settings, output_dir=str(out), max_train_steps=3, checkpointing_steps=1, resume_from_checkpoint="latest"
    )
    assert first.recipe.seed == again.recipe.seed
    assert caplog.text.count("cannot be written (it needs") == 2
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-1"]
    assert verify_checkpoint(out / "checkpoint-1").step == 1
    assert not list(out.glob(".checkpoint*"))


@pytest.mark.parametrize("limit", [100, 5_000, 2**20])
def test_a_quota_in_mid_file_drops_what_was_written(
    settings: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
) -> None:
    """A limit on the size of files strikes in json, in the header or in the middle of the weights, as a quota does."""
    write, before = saving.write_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments: Any) -> Path:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            return write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(saving, "write_checkpoint", limited)
    save = saving.BackgroundSaver.save

    def save_and_wait(saver: saving.BackgroundSaver) -> None:
        save(saver)
        saver.wait()  # the limit is the process's: nothing else may be written meanwhile

    monkeypatch.setattr(saving.BackgroundSaver, "save", save_and_wait)
    train(settings, checkpointing_steps=2)
    assert all(f"checkpoint-{step} cannot be written" in caplog.text for step in (2, 4))
    assert not [path for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name]


def test_a_run_that_could_save_nothing_says_so_at_its_end(settings: dict[str, Any], small_disk: Path) -> None:
    """First there is room for the pipeline but not for a checkpoint, then for neither."""
    out = small_disk / "run"
    (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free - 8 * 2**20))
    settings |= {"output_dir": str(out), "max_train_steps": 2}
    with pytest.raises(NotSaved, match=r"the pipeline is in .* but no checkpoint could be written") as error:
        run(Recipe(**settings, use_ema=True))
    assert error.value.status == 7
    assert (out / "model_index.json").is_file()
    (small_disk / "more").write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - 2**16)))
    shutil.rmtree(out / "unet")
    (small_disk / "again").write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - 2**16)))
    settings |= {
        "overwrite": True,
        "max_train_steps": 2,
        "validation_prompts": ["a disc"],
        "validation_inference_steps": 1,
    }
    with pytest.raises(NotSaved, match=r"the pipeline cannot be written to .* make room"):
        run(Recipe(**settings))


def test_a_folder_that_becomes_read_only_in_the_middle_of_a_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints, pictures, pipeline and the owner's name: nothing can be written, and the run gets to its end."""

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    unlink = Path.unlink
    for place in (
        "sd_recipes.checkpoints.saver.write_checkpoint",
        "sd_recipes.commands.train.export_trained",
        "PIL.Image.Image.save",
    ):
        monkeypatch.setattr(place, denied)
    monkeypatch.setattr(Path, "unlink", lambda path, **o: denied() if path.name == ".owner.json" else unlink(path, **o))
    settings |= {"validation_prompts": ["a disc"], "validation_steps": 2, "validation_inference_steps": 1}
    with pytest.raises(NotSaved, match=r"make room, and the same command starts over, for there is no checkpoint"):
        run(Recipe(**settings))
    assert "checkpoint-4 cannot be written ([Errno 13]" in caplog.text
    assert caplog.text.count("What a validation leaves cannot be written") == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 4


def test_asked_to_stop_where_nothing_can_be_saved(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train(settings, max_train_steps=1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "write_checkpoint", full)
    monkeypatch.setattr(Tracker, "log", lambda *_: setattr(stop_request, "reason", "SIGTERM"))
    try:
        with pytest.raises(NotSaved, match=r"step 2 could not be saved \(.*No space.* resumes from checkpoint-1"):
            train(settings, resume_from_checkpoint="latest")
    finally:
        stop_request.reason = None


def test_a_file_system_that_becomes_read_only(settings: dict[str, Any], small_disk: Path) -> None:
    out = small_disk / "run"
    train(settings, output_dir=str(out), max_train_steps=1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match="Read-only file system") as error:
        write_checkpoint(contents(9), out, limit=1)
    assert error.value.errno == errno.EROFS
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-1"]
    assert verify_checkpoint(out / "checkpoint-1").step == 1


def test_a_bug_in_the_writer_is_raised(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(saving, "write_checkpoint", broken)
    with pytest.raises(KeyError, match="a bug"):
        train(settings, checkpointing_steps=2)


# ------------------------------------------------------------------------------------------- hostile


class Marker:
    """What a pickle runs when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{")


def hostile(path: Path, name: str, marker: Path) -> str:
    """Make a checkpoint hostile; the words with which it is refused."""
    pickled = pickle.dumps(Marker(marker))
    if name == "a planted pickle":
        (path / "random_states_0.pkl").write_bytes(pickled)
        return "it holds 'random_states_0.pkl'"
    if name == "a named pickle":
        (path / "optimizer.bin").write_bytes(pickled)
        rewrite_manifest(path, lambda m: m["files"].update({"optimizer.bin": entry(pickled)}))
        return "'optimizer.bin', which is not a file of a checkpoint"
    if name == "pickled tensors":
        (path / OPTIMIZER).write_bytes(pickled)
        rewrite_manifest(path, lambda m: m["files"].update({OPTIMIZER: entry(pickled)}))
        return "does not fit this run (SafetensorError"
    if name == "a path that leads out":
        rewrite_manifest(path, lambda m: m["files"].update({"../../secret.json": entry(b"x")}))
        return "'../../secret.json', which is not a file of a checkpoint"
    if name == "a link that leads out":
        outside = path.parent.parent / "outside.safetensors"
        shutil.move(path / OPTIMIZER, outside)
        (path / OPTIMIZER).symlink_to(outside)
        return "optimizer.safetensors is a link"
    if name == "a linked folder":
        shutil.move(path / "unet", path.parent.parent / "outside")
        (path / "unet").symlink_to(path.parent.parent / "outside")
        return "unet is a link"
    if name == "a huge header":
        huge_header(path / OPTIMIZER)
        rewrite_manifest(path, lambda m: m["files"].update({OPTIMIZER: entry((path / OPTIMIZER).read_bytes())}))
        return "does not fit this run (SafetensorError"
    if name == "a huge manifest":
        os.truncate(path / MANIFEST, 2**30)
        return "manifest.json is larger than 64 MiB"
    if name == "a deep manifest":
        (path / MANIFEST).write_text("[" * 10**6)
        return "manifest.json cannot be read"
    if name == "other types":
        rewrite_manifest(path, lambda m: m.update(step="__import__('os')"))
        return "manifest.json: 1 validation error"
    assert name == "state of another shape"
    data = json.dumps({"progress": {}, "streams": [], "optimizer": {}}).encode()
    (path / STATE).write_bytes(data)
    rewrite_manifest(path, lambda m: m["files"].update({STATE: entry(data)}))
    return "does not fit this run (ValidationError"


@pytest.mark.parametrize("name", [
    "a planted pickle", "a named pickle", "pickled tensors", "a path that leads out", "a link that leads out",
    "a linked folder", "a huge header", "a huge manifest", "a deep manifest", "other types", "state of another shape",
])  # fmt: skip
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(settings: dict[str, Any], tmp_path: Path, name: str) -> None:
    train(settings, max_train_steps=1)
    path, marker = tmp_path / "run" / "checkpoint-1", tmp_path / "marker"
    words = hostile(path, name, marker)
    with pytest.raises(RecipeError) as error:
        train(settings, resume_from_checkpoint=str(path))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def in_place_of(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return change


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda path: rewrite_manifest(path, change)


def state_changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def rewrite(path: Path) -> None:
        state = json.loads((path / STATE).read_text())
        change(state)
        data = json.dumps(state).encode()
        (path / STATE).write_bytes(data)
        rewrite_manifest(path, lambda m: m["files"].update({STATE: entry(data)}))

    return rewrite


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "an endless manifest": (
        in_place_of(MANIFEST, lambda file: file.symlink_to("/dev/zero")), "manifest.json is not a regular file"
    ),
    "a FIFO for a manifest": (in_place_of(MANIFEST, os.mkfifo), "manifest.json is not a regular file"),
    "a folder for a manifest": (in_place_of(MANIFEST, Path.mkdir), "manifest.json is not a regular file"),
    "a FIFO for the state": (in_place_of(STATE, os.mkfifo), "state.json is not a regular file"),
    "a FIFO for weights": (in_place_of(f"unet/{UNET_WEIGHTS}", os.mkfifo), f"{UNET_WEIGHTS} is not a regular file"),
    "a folder for tensors": (in_place_of(OPTIMIZER, Path.mkdir), "optimizer.safetensors is not a regular file"),
    "no seed": (rewritten(lambda m: m["settings"].pop("seed")), "does not describe a run (1 validation error"),
    "no batch size": (rewritten(lambda m: m["settings"].pop("train_batch_size")), "train_batch_size Field required"),
    "no global batch": (rewritten(lambda m: m["identity"].pop("global_batch_size")), "_batch_size Field required"),
    "no rate's scale": (rewritten(lambda m: m["settings"].pop("scale_lr")), "scale_lr Field required"),
    "half an epoch": (rewritten(lambda m: m["identity"].update(begun=[3])), "does not describe a run (1 validation"),
    "empty batches": (rewritten(lambda m: m["identity"].update(begun=[0, 0])), "does not describe a run (1 validation"),
    "no base": (
        rewritten(lambda m: m["identity"].update(parts={"unet": "x"}, base=None)), "base Input should be a valid string"
    ),
    "lines in a setting": (rewritten(lambda m: m["settings"].update(optimizer="a\n\nb")), "was a b"),
    "a step beyond all numbers": (rewritten(lambda m: m.update(step=10**300)), "manifest.json: 1 validation error"),
    "a loss that is NaN": (state_changed(lambda s: s["progress"].update(loss_sum=float("nan"))), "does not fit this"),
    "no position": (state_changed(lambda s: s["progress"].pop("samples_seen")), "name different steps"),
    "a strange position": (state_changed(lambda s: s["progress"].update(x=1)), "does not fit this run (Validation"),
    "another step": (state_changed(lambda s: s["progress"].update(global_step=7)), "name different steps"),
    "a schedule beyond": (state_changed(lambda s: s.update(schedule_step=10**300)), "does not fit this run (Val"),
    "a stream of nothing": (state_changed(lambda s: s.update(streams=[{}])), "does not fit this run (ValidationError"),
    "values of no parameter": (
        state_changed(lambda s: s["optimizer"].update({"x/y/z": 1})), "does not fit this run (ValueError"
    ),
    "a value under a tensor": (
        state_changed(lambda s: s["optimizer"].update({"unet/conv_in.weight/exp_avg/z": 1})),
        "does not fit this run (TypeError",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("seconds")
@pytest.mark.parametrize("name", FOREIGN)
def test_defect_30_a_foreign_checkpoint_is_refused_in_one_line(
    settings: dict[str, Any], tmp_path: Path, name: str
) -> None:
    train(settings, max_train_steps=1)
    change, words = FOREIGN[name]
    change(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(RecipeError) as error:
        train(settings, resume_from_checkpoint="checkpoint-1")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------- what is no misfit


def full(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1 GiB")


def without_memory(*_: Any, **__: Any) -> None:
    raise MemoryError


def host_full(*_: Any, **__: Any) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")


def disk_fails(*_: Any, **__: Any) -> None:
    raise OSError(errno.EIO, "Input/output error")


def mapping_fails(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while opening: Cannot allocate memory (os error 12)")


@pytest.mark.parametrize(
    ("place", "failure", "words"),
    [
        ("sd_recipes.training.state.shard_like", full, "not enough memory to load"),
        ("sd_recipes.training.state.load_by_name", host_full, "not enough memory to load"),
        ("sd_recipes.checkpoints.resume.load_file", without_memory, "not enough memory to load"),
        ("sd_recipes.checkpoints.resume.load_file", disk_fails, "cannot be read"),
        ("sd_recipes.checkpoints.resume.load_file", mapping_fails, "cannot be read"),
        ("sd_recipes.checkpoints.resume.read_json", disk_fails, "cannot be read"),
        ("sd_recipes.checkpoints.format.read_json", disk_fails, "cannot be read"),
        ("sd_recipes.checkpoints.format._entry", disk_fails, "cannot be read"),
    ],
)
@pytest.mark.parametrize("wanted", ["latest", "checkpoint-2"])
def test_defect_4_what_is_no_misfit_is_told_as_what_it_is(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    failure: Callable[..., None],
    words: str,
    wanted: str,
) -> None:
    """Least of all does it advise to throw the run away, or go back to an older checkpoint in silence."""
    train(settings, max_train_steps=2, checkpointing_steps=1)
    monkeypatch.setattr(place, failure)
    with pytest.raises(RecipeError, match=words) as error:
        train(settings, resume_from_checkpoint=wanted)
    monkeypatch.undo()
    assert str(tmp_path / "run" / "checkpoint-2") in str(error.value)
    assert "fit" not in str(error.value)
    assert "overwrite" not in str(error.value)
    assert "\n" not in str(error.value)
    assert train(settings, resume_from_checkpoint=wanted).num_steps == 4, "nothing is lost"


def test_defect_4_a_bug_while_loading_is_a_bug(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    train(settings, max_train_steps=1)

    def broken(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(TrainState, "_load_schedule", broken)
    with pytest.raises(KeyError, match="a bug"):
        train(settings, resume_from_checkpoint="latest")


@pytest.mark.parametrize("change", ["another shape", "one missing", "one too many"])
def test_defect_4_a_misfit_says_so_before_anything_is_loaded(
    settings: dict[str, Any], tmp_path: Path, change: str
) -> None:
    train(settings, max_train_steps=1)
    path = tmp_path / "run" / "checkpoint-1"
    file = path / "unet" / UNET_WEIGHTS
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if change == "another shape":
        tensors[name] = torch.zeros(3, 3)
    elif change == "one missing":
        del tensors[name]
    else:
        tensors["more"] = torch.zeros(3)
    save_file(tensors, file, {"format": "pt"})
    rewrite_manifest(path, lambda m: m["files"].update({f"unet/{UNET_WEIGHTS}": entry(file.read_bytes())}))
    with pytest.raises(
        RecipeError, match=r"does not fit this run \(ValueError: .*: go back to it, start over with"
    ) as error:
        train(settings, resume_from_checkpoint="latest")
    assert ("more" if change == "one too many" else name) in str(error.value)


def test_the_marker_can_be_left(tmp_path: Path) -> None:
    """So that its absence says something."""
    pickle.loads(pickle.dumps(Marker(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()
