"""Averages by their length: profiles, their sums, and what a run keeps of them."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from killing import KillAt, wait
from launching import finish, flags_of, start, torchrun
from safetensors.torch import load_file
from scipy.integrate import quad
from test_format_and_saver import contents
from test_fsdp import fsdp  # noqa: F401 - a fixture
from test_resume import run_it, saved_tensors
from training_runs import assert_equal, average, build, fit_from, train

from sd_recipes.checkpoints.format import Manifest, list_checkpoints, step_of, verify_checkpoint, write_checkpoint
from sd_recipes.checkpoints.snapshots import keep_snapshot, list_snapshots
from sd_recipes.errors import RecipeError
from sd_recipes.flags import build_recipe
from sd_recipes.recipe import OptimConfig, odd_settings
from sd_recipes.training.build_parts import UNET_WEIGHTS
from sd_recipes.training.ema import AveragedWeights
from sd_recipes.training.profiles import Profile, combine, decay_at, gamma_of, inner_products, length_of
from sd_recipes.training.state import SNAPSHOTS

LENGTHS = (0.01, 0.03, 0.05, 0.09, 0.1, 0.15, 0.2, 0.25, 0.288)


# ------------------------------------------------------------------------------------------ profiles


def density(tau: float, profile: Profile) -> float:
    """Written anew from the paper's equation 7."""
    gamma, end = profile.gamma, profile.updates
    return (gamma + 1) * tau**gamma / end ** (gamma + 1)


def step_weights(gamma: float, updates: int) -> np.ndarray:
    """(updates,): the integral of the density over each step."""
    edges = (np.arange(updates + 1) / updates) ** (gamma + 1)
    return np.diff(edges)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_length_is_the_profiles_standard_deviation(length: float) -> None:
    profile = Profile(gamma_of(length), 1)
    moments = [quad(lambda tau, n=n: tau**n * density(tau, profile), 0, 1)[0] for n in range(3)]
    assert moments[0] == pytest.approx(1)
    assert np.sqrt(moments[2] - moments[1] ** 2) == pytest.approx(length, rel=1e-6)
    assert length_of(profile.gamma) == pytest.approx(length, rel=1e-12)


def test_the_ends_of_the_range() -> None:
    assert length_of(0) == pytest.approx(12**-0.5)
    assert gamma_of(12**-0.5 * (1 - 1e-9)) == pytest.approx(0, abs=1e-6)
    assert gamma_of(1e-5) == pytest.approx(1e5, rel=1e-4)
    assert length_of(8) == pytest.approx(0.0905, abs=5e-5)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.2])
def test_the_updates_make_the_profile(length: float) -> None:
    """Of a random walk, against the sum with each step's integral; nothing is left of the weights before it."""
    walk = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)).double().cumsum(0)
    parameter = torch.nn.Parameter(torch.full((16,), 1e6, dtype=torch.float64))
    kept = AveragedWeights({"it": parameter}, OptimConfig(ema_length=length))
    for position in walk:
        parameter.data.copy_(position)
        kept.step()
    direct = step_weights(gamma_of(length), len(walk)) @ walk.numpy()
    np.testing.assert_allclose(kept.named_tensors()["it"].numpy(), direct, rtol=1e-9, atol=1e-9)


def test_diffusers_decay_is_that_of_gamma_8_five_updates_ahead() -> None:
    diffusers = EMAModel([torch.nn.Parameter(torch.zeros(1))])
    for update in (10, 100, 1000, 10000, 80000):
        decay, ahead = diffusers.get_decay(update), update + 5
        assert decay == pytest.approx(update / (update + 9), rel=1e-15)
        assert 0 < decay_at(ahead, 8) - decay < 60 / ahead**3 + 1e-15
        assert 0 < decay - decay_at(update, 8) < 45 / update**2


def sha256(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("begun", [0, 20])
def test_by_default_the_average_is_diffusers(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, begun: int
) -> None:
    """To the bit; but for rounding in the first updates, of which half of the average or more is new."""
    theirs: dict[str, EMAModel] = {}
    step = AveragedWeights.step

    def step_both(kept: AveragedWeights) -> None:
        if not theirs:
            theirs["unet"] = EMAModel(before, decay=0.9999, foreach=True)
            theirs["unet"].optimization_step = kept.num_updates = begun
        theirs["unet"].step(kept.parameters)
        step(kept)

    run = build(settings, use_ema=True, max_train_steps=6)
    before = [each.detach().clone().requires_grad_() for each in average(run).parameters]
    monkeypatch.setattr(AveragedWeights, "step", step_both)
    fit_from(run)
    ours = average(run).named_tensors()
    found = dict(zip(ours, theirs["unet"].shadow_params, strict=True))
    if begun:
        assert sha256(ours) == sha256(found)
    else:
        torch.testing.assert_close(ours, found, rtol=1e-6, atol=1e-8)
    assert average(run).num_updates == begun + 6


def test_the_average_is_the_same_whether_snapshots_are_kept_beside_it_or_not(settings: dict[str, Any]) -> None:
    """And another length gives another one."""
    plain = average(train(settings, use_ema=True, max_train_steps=6))
    out = settings["output_dir"]
    settings |= {"use_ema": True, "max_train_steps": 6}
    again = train(settings, ema_snapshots=True, output_dir=f"{out}-again")
    assert sha256(average(again).named_tensors()) == sha256(plain.named_tensors())
    other = train(settings, ema_length=0.1, output_dir=f"{out}-other")
    assert sha256(average(other).named_tensors()) != sha256(plain.named_tensors())
    assert sha256(average(other).named_tensors()) == sha256(
        again.state.parts["unet"].snapshots["_ema10"].named_tensors()
    )


# ---------------------------------------------------------------------------------- sums of profiles


def test_inner_products_are_the_integrals() -> None:
    profiles = [Profile(gamma_of(length), updates) for length in (0.05, 0.1, 0.25) for updates in (3, 7, 20)]
    products = inner_products(profiles, profiles[::-1])
    for row, one in zip(products, profiles, strict=True):
        for value, other in zip(row, profiles[::-1], strict=True):
            end = min(one.updates, other.updates)
            integral = quad(lambda tau, one=one, other=other: density(tau, one) * density(tau, other), 0, end)[0]
            assert value == pytest.approx(integral, rel=1e-9)


@pytest.fixture(scope="module")
def trajectory() -> np.ndarray:
    """(400, 200): parameters around 1 that a noisy gradient descent moves to a random optimum."""
    rng = np.random.default_rng(0)
    optimum, here = 1 + 0.3 * rng.standard_normal(200), np.ones(200)
    sharpness = np.geomspace(0.003, 0.5, 200)
    path = []
    for _ in range(400):
        here = here - sharpness * (here - optimum + 0.3 * rng.standard_normal(200))
        path.append(here)
    return np.array(path)


@pytest.fixture(scope="module")
def kept(trajectory: np.ndarray) -> dict[int, dict[float, np.ndarray]]:
    """The two averages after every 10 updates, in float32, as a run keeps them."""
    parameter = torch.nn.Parameter(torch.zeros(200))
    models = {length: AveragedWeights({"it": parameter}, OptimConfig(), length) for length in SNAPSHOTS.values()}
    found: dict[int, dict[float, np.ndarray]] = {}
    for update, position in enumerate(trajectory, 1):
        parameter.data.copy_(torch.from_numpy(position))
        for model in models.values():
            model.step()
        if update % 10 == 0:
            found[update] = {length: model.named_tensors()["it"].numpy().copy() for length, model in models.items()}
    return found


# Largest errors of the reconstruction, as a part of the way from the true average to the last weights.
@pytest.mark.parametrize(
    ("length", "allowed"),
    [(0.03, 0.02), (0.05, 1e-5), (0.07, 2e-3), (0.09, 1e-3), (0.1, 1e-5), (0.12, 1e-3), (0.15, 2e-3), (0.2, 5e-3)],
)
@pytest.mark.parametrize("step", [200, 330, 400])
def test_a_reconstruction_is_the_average_of_that_length(
    trajectory: np.ndarray, kept: dict[int, dict[float, np.ndarray]], length: float, allowed: float, step: int
) -> None:
    true = step_weights(gamma_of(length), step) @ trajectory[:step]
    ends = [(updates, each) for updates in kept if updates <= step for each in kept[updates]]
    combination = combine([Profile(gamma_of(each), updates) for updates, each in ends], Profile(gamma_of(length), step))
    made = combination.coefficients @ np.array([kept[updates][each] for updates, each in ends])
    assert combination.coefficients.sum() == pytest.approx(1, abs=1e-9)
    assert np.linalg.norm(made - true) < allowed * np.linalg.norm(true - trajectory[step - 1])


def test_one_step_of_averages_still_gives_weights_of_the_right_size(
    trajectory: np.ndarray, kept: dict[int, dict[float, np.ndarray]]
) -> None:
    """The coefficients sum to 1, though the error of the profile is large; and it is said to be."""
    combination = combine([Profile(gamma_of(length), 400) for length in kept[400]], Profile(gamma_of(0.2), 400))
    made = combination.coefficients @ np.array([*kept[400].values()])
    true = step_weights(gamma_of(0.2), 400) @ trajectory
    assert combination.error > 0.1
    assert np.linalg.norm(made - true) < 0.1 * np.linalg.norm(true)
    assert combination.coefficients.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("number", [30, 300])
def test_many_averages_are_no_trouble(number: int) -> None:
    """Coefficients stay small, so that float32 is enough, and the error falls as the square of the spacing."""
    stored = [Profile(gamma_of(length), 100 * (1 + n)) for n in range(number) for length in SNAPSHOTS.values()]
    for length, factor in ((0.03, 16), (0.09, 0.6), (0.2, 12)):
        combination = combine(stored, Profile(gamma_of(length), 100 * number))
        assert np.abs(combination.coefficients).sum() < 20
        assert combination.error < factor / number**2


# ------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"ema_length": 0.05, "ema_decay": 0.999},
            r"--ema_decay 0\.999 contradicts --ema_length 0\.05, .*: leave --ema_decay at 0\.9999, or .* at 0\.09",
        ),
        ({"ema_length": 0}, "--ema_length: input should be greater than 0"),
        ({"ema_length": 0.3}, r"--ema_length: input should be less than 0\.288"),
        ({"ema_snapshots_limit": 1}, "--ema_snapshots_limit: input should be greater than or equal to 2"),
    ],
)
def test_lengths_that_cannot_be(settings: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build_recipe({**settings, **changes})


def test_a_decay_still_cuts_the_default_length(settings: dict[str, Any]) -> None:
    assert build_recipe({**settings, "ema_decay": 0.5}).ema_decay == 0.5
    odd = odd_settings(build_recipe({**settings, "ema_length": 0.05, "ema_snapshots_limit": 4}))
    assert odd == [
        "--ema_length 0.05 does nothing without --use_ema.",
        "--ema_snapshots_limit 4 does nothing without --ema_snapshots.",
    ]


# ------------------------------------------------------------------------------------- what a run keeps


@pytest.fixture
def keeping(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {
        "use_ema": True, "ema_snapshots": True, "max_train_steps": 4, "checkpointing_steps": 1, "train_batch_size": 2,
        "gradient_accumulation_steps": 2, "checkpoints_total_limit": 2,
    }  # fmt: skip


def kept_steps(out: Path) -> list[int]:
    return [step_of(path) for path in list_snapshots(out)]


def kept_tensors(out: Path) -> dict[str, torch.Tensor]:
    return saved_tensors(out / "averages")


def test_averages_outlive_their_checkpoints_and_take_no_room_beside_them(
    keeping: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = train(keeping)
    assert kept_steps(out) == [1, 2, 3, 4]
    assert [step_of(path) for path in list_checkpoints(out)] == [3, 4]
    for path in list_snapshots(out):
        manifest = verify_checkpoint(path)
        assert set(manifest.files) == {"state.json"} | {
            f"unet{suffix}/{name}" for suffix in SNAPSHOTS for name in ("config.json", UNET_WEIGHTS)
        }
    last = out / "averages" / "snapshot-4" / "unet_ema05"
    assert (last / UNET_WEIGHTS).samefile(out / "checkpoint-4" / "unet_ema05" / UNET_WEIGHTS)
    assert_equal(load_file(last / UNET_WEIGHTS), run.state.parts["unet"].snapshots["_ema05"].named_tensors())
    UNet2DConditionModel.from_pretrained(last)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"ema_snapshots_limit": 2, "use_ema": False, "mixed_precision": "bf16"}])
def test_a_killed_run_keeps_the_quiet_runs_averages(
    keeping: dict[str, Any], tmp_path: Path, more: dict[str, Any]
) -> None:
    """Killed after step 3; and killed between checkpoint-3 and what it keeps of it."""
    keeping |= more
    quiet, cut, late = tmp_path / "quiet", tmp_path / "cut", tmp_path / "late"
    train(keeping, output_dir=str(quiet), max_train_steps=3)
    for out in (cut, late):
        shutil.copytree(quiet, out)
    shutil.rmtree(late / "averages" / "snapshot-3")
    (late / "averages" / ".snapshot-3.partial").mkdir()
    for out in (quiet, cut, late):
        train(keeping, output_dir=str(out), resume_from_checkpoint="latest")
    uninterrupted = tmp_path / "uninterrupted"
    train(keeping, output_dir=str(uninterrupted))
    for out in (quiet, cut, late):
        assert_equal(kept_tensors(uninterrupted), kept_tensors(out))
        assert_equal(saved_tensors(uninterrupted / "checkpoint-4"), saved_tensors(out / "checkpoint-4"))
        assert not list(out.glob("averages/.*"))


def test_what_another_line_of_history_kept_is_set_aside(keeping: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    keeping["checkpoints_total_limit"] = None
    train(keeping)
    train(keeping, resume_from_checkpoint="checkpoint-2", checkpointing_steps=3, max_train_steps=5, learning_rate=1e-4)
    assert kept_steps(out) == [1, 2, 3, 5]
    aside = {path.name for path in (out / "averages").iterdir()} - {path.name for path in list_snapshots(out)}
    assert aside == {"snapshot-3.abandoned", "snapshot-4.abandoned"}
    assert [step_of(path) for path in list_checkpoints(out)] == [1, 2, 3, 5]
    manifest = verify_checkpoint(out / "averages" / "snapshot-3")
    assert manifest.settings["learning_rate"] == 1e-4
    run_it(keeping, overwrite=True, max_train_steps=1)
    assert [path.name for path in (out / "averages").iterdir()] == ["snapshot-1"]


def test_a_run_without_checkpoints_begins_without_averages(keeping: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_it(keeping, max_train_steps=2)
    for path in list_checkpoints(out):
        shutil.rmtree(path)
    run_it(keeping, max_train_steps=3, checkpointing_steps=3)
    assert kept_steps(out) == [3]


def test_averages_cannot_begin_in_the_middle(keeping: dict[str, Any], tmp_path: Path) -> None:
    train(keeping, ema_snapshots=False, max_train_steps=1)
    with pytest.raises(RecipeError, match=r"--ema_snapshots is True and was False in .*, whose state"):
        train(keeping, resume_from_checkpoint="latest")


def fake_checkpoint(out: Path, step: int) -> tuple[Path, Manifest]:
    """A checkpoint of a made-up run, with averages of one tensor."""
    made = contents(step)
    for suffix in SNAPSHOTS:
        made.texts[f"unet{suffix}/config.json"] = "{}"
        made.tensors[f"unet{suffix}/{UNET_WEIGHTS}"] = {"it": torch.full((3,), float(step))}
    return write_checkpoint(made, out, None), made.manifest


def test_the_limit_keeps_evenly_spaced_ones_and_the_newest(tmp_path: Path) -> None:
    for step in range(1, 20):
        keep_snapshot(*fake_checkpoint(tmp_path, step), tmp_path, 5)
        assert kept_steps(tmp_path)[-1] == step
    steps = kept_steps(tmp_path)
    assert len(steps) == 5
    assert max(later - earlier for earlier, later in pairwise([0, *steps])) <= 8


def test_a_file_system_without_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint, manifest = fake_checkpoint(tmp_path, 2)
    keep_snapshot(checkpoint, manifest, tmp_path, None)
    (kept_one,) = list_snapshots(tmp_path)
    verify_checkpoint(kept_one)
    assert not (kept_one / "state.json").samefile(checkpoint / "state.json")


def test_a_full_disk_costs_the_averages_and_not_the_run(
    keeping: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    run = train(keeping, max_train_steps=1)
    assert run.state.progress.global_step == 1
    assert "The averages of checkpoint-1 cannot be kept" in caplog.text
    assert not list((tmp_path / "run" / "averages").iterdir())
    monkeypatch.undo()
    train(keeping, max_train_steps=2, resume_from_checkpoint="latest")
    assert kept_steps(tmp_path / "run") == [1, 2], "what was missing is made up for"


def test_a_kill_at_any_file_operation_leaves_whole_averages(tmp_path: Path) -> None:
    begun, out = tmp_path / "begun", tmp_path / "out"
    begun.mkdir()
    for step in (2, 3):
        keep_snapshot(*fake_checkpoint(begun, step), begun, 2)
    fake_checkpoint(begun, 4)
    number, left = 1, []
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(begun, out)
        manifest = verify_checkpoint(out / "checkpoint-4")
        child = os.fork()
        if child == 0:
            KillAt(number).install()
            keep_snapshot(out / "checkpoint-4", manifest, out, 2)
            os._exit(0)
        status = wait(child)
        for path in list_snapshots(out):
            verify_checkpoint(path)
        left.append(tuple(kept_steps(out)))
        keep_snapshot(out / "checkpoint-4", manifest, out, 2)
        assert sorted(path.name for path in (out / "averages").iterdir()) == ["snapshot-2", "snapshot-4"]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        number += 1
    assert {(2, 3), (2, 3, 4), (2, 4)} == set(left[:-1])


@pytest.fixture
def exact(settings: dict[str, Any]) -> dict[str, Any]:
    """SGD, so that rounding stays rounding."""
    return settings | {
        "optimizer": "sgd", "learning_rate": 0.01, "ema_snapshots": True, "train_batch_size": 1,
        "gradient_accumulation_steps": 2, "max_train_steps": 4, "checkpointing_steps": 2,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_keep_what_one_keeps(
    exact: dict[str, Any],
    tmp_path: Path,
    sharded: bool,
    fsdp: dict[str, str],  # noqa: F811
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(exact, output_dir=str(one), train_batch_size=2)
    finish(start(torchrun(2), *flags_of(exact | {"output_dir": str(two)}), **(fsdp if sharded else {})))
    assert kept_steps(two) == [2, 4]
    for name, tensor in kept_tensors(one).items():
        torch.testing.assert_close(kept_tensors(two)[name], tensor, rtol=1e-4, atol=1e-5)
