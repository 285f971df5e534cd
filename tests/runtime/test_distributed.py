"""Several processes are one, whatever their number; launchers' configurations, and the scripts for schedulers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from conftest import ROOT
from launching import (
    ACCELERATE,
    finish,
    flags_of,
    last_step,
    launcher_arguments,
    launcher_environment,
    start,
    torchrun,
    trainers,
    until,
)
from safetensors.torch import load_file
from test_script import environment
from torch import distributed
from training_runs import average, forget_accelerator, train, weights

from sd_recipes.checkpoints.format import list_checkpoints
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import start_accelerator
from sd_recipes.runtime.console import mistakes_in_one_line
from sd_recipes.training.build_parts import UNET_WEIGHTS

CONFIGS = ROOT / "accelerate_configs"
EXAMPLES = ROOT / "examples"

# ------------------------------------------------------------------------------- several processes are one


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Seven rows in global batches of four: an epoch's last one has three."""
    return settings | {
        "optimizer": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.5, "use_ema": True, "max_train_samples": 7,
        "random_flip": True, "noise_offset": 0.1, "checkpointing_steps": 100, "train_batch_size": 4,
        "max_train_steps": 8,
    }  # fmt: skip


def samples(output_dir: Path) -> list[tuple[int, int]]:
    """(position in the run, row) of every sample that any process trained on, by position."""
    return sorted(
        (position, row)
        for path in output_dir.glob("samples-*.jsonl")
        for line in path.read_text().splitlines()
        for position, row in json.loads(line)[1]
    )


def losses(output_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["train_loss"] for line in lines if "train_loss" in line]


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal up to the order of summation."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6, msg=name)


def saved(output_dir: Path, step: int, folder: str) -> dict[str, torch.Tensor]:
    return load_file(output_dir / f"checkpoint-{step}" / folder / UNET_WEIGHTS)


# Two processes of two are the global batch of four; three share it unevenly, as a run that began on two does.
@pytest.mark.slow
@pytest.mark.parametrize("stages", [[(2, 3), (1, 5), (3, 8)]], ids=["2-1-3"])
def test_a_run_moved_between_numbers_of_processes_is_one_run(
    settings: dict[str, Any], tmp_path: Path, stages: list[tuple[int, int]]
) -> None:
    """Loss, weights, average; every sample once. The same command each time, but for the number of processes."""
    one = train(settings, output_dir=str(tmp_path / "one"))
    moved = tmp_path / "moved"
    flags = flags_of(settings | {"train_batch_size": 2, "output_dir": moved})
    for processes, step in stages:
        launcher = torchrun(processes) if processes > 1 else [sys.executable]
        output = finish(start(launcher, *flags, "--max_train_steps", step, script="tests/record_samples.py"))
        assert "global batch         4" in output
    assert "4, kept, on 3 processes: at most 2 x 1 on each" in output
    assert losses(moved) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert_close(weights(one), saved(moved, 8, "unet"))
    assert_close(average(one).named_tensors(), saved(moved, 8, "unet_ema"))
    order = one.batches.plans(0, None)
    expected = [next(order) for _ in range(8)]
    assert samples(moved) == [
        (int(position), int(row)) for plan in expected for position, row in zip(plan.positions, plan.rows, strict=True)
    ]
    assert sorted(row for _, row in samples(moved)[:7]) == list(range(7))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_of_a_new_run_are_one(settings: dict[str, Any], tmp_path: Path, processes: int) -> None:
    one = train(settings, train_batch_size=6, output_dir=str(tmp_path / "one"))
    flags = flags_of(settings | {"train_batch_size": 6 // processes, "output_dir": tmp_path / "several"})
    finish(start(torchrun(processes), *flags, script="tests/record_samples.py"))
    assert losses(tmp_path / "several") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert_close(weights(one), saved(tmp_path / "several", 8, "unet"))
    assert [position for position, _ in samples(tmp_path / "several")] == list(range(4 * 7))


@pytest.mark.slow
def test_a_stream_moved_between_numbers_of_processes_is_one_run(settings: dict[str, Any], tmp_path: Path) -> None:
    """2 -> 1 -> 3 against 2 all the time."""
    settings.pop("max_train_samples")
    settings |= {"streaming": True, "shuffle_block": 3, "train_batch_size": 2}
    uninterrupted = flags_of(settings | {"output_dir": tmp_path / "uninterrupted"})
    finish(start(torchrun(2), *uninterrupted))
    moved = flags_of(settings | {"output_dir": tmp_path / "moved"})
    for processes, step in ((2, 3), (1, 5), (3, 8)):
        launcher = torchrun(processes) if processes > 1 else [sys.executable]
        finish(start(launcher, *moved, "--max_train_steps", step))
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "uninterrupted"), rel=1e-5)
    assert_close(saved(tmp_path / "uninterrupted", 8, "unet"), saved(tmp_path / "moved", 8, "unet"))


def test_a_changed_batch_is_the_persons_wish(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """The global batch is kept only where the settings that make it are the same."""
    train(settings, max_train_steps=2)
    changed = train(settings, max_train_steps=3, train_batch_size=2, resume_from_checkpoint="latest")
    assert changed.data.global_batch_size == 2
    assert "is 2 and was 4" in caplog.text


# --------------------------------------------------------------------------------- launchers' configurations


@pytest.mark.parametrize(
    ("name", "on_cpu", "precision", "gpus"), [("cpu", "true", "no", None), ("single_gpu", "false", "bf16", "0")]
)
def test_accelerate_reads_the_configurations_of_one_process(
    name: str, on_cpu: str, precision: str, gpus: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    command, variables = prepare_simple_launcher_cmd_env(launcher_arguments(CONFIGS / f"{name}.yaml"))
    assert command[-1] == "script.py"
    assert variables["ACCELERATE_USE_CPU"].lower() == on_cpu
    assert variables["ACCELERATE_MIXED_PRECISION"] == precision
    assert variables.get("CUDA_VISIBLE_DEVICES") == gpus


def test_accelerate_knows_every_key_of_the_configurations() -> None:
    paths = sorted(CONFIGS.glob("*.yaml"))
    assert {path.stem for path in paths} == {"cpu", "single_gpu", "multi_gpu", "multi_node", "fsdp2"}
    for path in paths:
        config = load_config_from_file(str(path))
        assert config.num_processes >= 1


@pytest.mark.parametrize(
    ("name", "processes", "machines"), [("multi_gpu", 8, 1), ("multi_node", 16, 2), ("fsdp2", 8, 1)]
)
def test_accelerate_reads_the_configurations(
    name: str, processes: int, machines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    variables, arguments = launcher_environment(CONFIGS / f"{name}.yaml")
    assert variables["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert (int(getattr(arguments, "nnodes", 1)), int(arguments.nproc_per_node)) == (machines, processes // machines)
    if name == "fsdp2":
        assert (variables["ACCELERATE_USE_FSDP"], variables["FSDP_VERSION"]) == ("true", "2")
        # The classes that it wraps exist.
        from diffusers import UNet2DConditionModel
        from tiny_models import UNET_CONFIG

        classes = {type(module).__name__ for module in UNet2DConditionModel(**UNET_CONFIG).modules()}
        assert set(variables["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",")) <= classes


def test_deepspeed_is_refused_in_one_line(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    forget_accelerator()
    with pytest.raises(RecipeError, match=r"DeepSpeed, .* is not supported: .* accelerate_configs/fsdp2\.yaml"):
        start_accelerator(Recipe(**settings))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_configuration_for_gpus_on_a_machine_without_any(settings: dict[str, Any]) -> None:
    config = ["--config_file", str(CONFIGS / "multi_gpu.yaml"), "--num_processes", "2"]
    flags = [str(flag) for flag in flags_of(settings)]
    done = subprocess.run(
        [*ACCELERATE, *config, str(ROOT / "train_text_to_image.py"), *flags],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    errors = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1, done.stderr
    assert "2 processes were started for GPUs and torch sees none" in errors.pop()


# ------------------------------------------------------------------------------------ scripts for schedulers


def bash_accepts(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def assert_flags_are_known(words: list[str]) -> None:
    names = {word.split("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    assert names
    assert names <= set(Recipe.model_fields)


def test_the_skypilot_file_is_a_task() -> None:
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert task["num_nodes"] == 2
    assert all(isinstance(value, str) for value in task["envs"].values())
    assert bash_accepts(task["setup"])
    assert bash_accepts(task["run"])
    assert_flags_are_known(task["run"].partition("train_text_to_image.py")[2].split())
    output_dir = task["run"].split("--output_dir ")[1].split()[0]
    assert any(output_dir.startswith(folder) for folder in task["file_mounts"]), "it outlives the machines"


def test_the_kubernetes_file_is_a_job_that_has_time_to_save() -> None:
    job = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["backoffLimit"] > 0
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}, "torchrun hides statuses"
    assert pod["restartPolicy"] == "Never", "podFailurePolicy asks for it"
    (container,) = pod["containers"]
    assert container["command"][:3] == ["python", "-m", "torch.distributed.run"], "the first process takes SIGTERM"
    assert_flags_are_known(container["args"])
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    mounted = {each["name"] for each in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


FAKE_SRUN = """#!/bin/bash
# As Slurm's: one task on the one machine of the job, in this process, so that it gets the signals.
[[ $1 == --kill-on-bad-exit=1 ]] && shift
SLURM_NODEID=0 SLURM_NNODES=1 exec "$@"
"""
FAKE_SCONTROL = """#!/bin/bash
case $1 in
    show) echo 127.0.0.1 ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
    *) exit 1 ;;
esac
"""


@pytest.mark.slow
@pytest.mark.parametrize("requeued", [False, True])
def test_the_slurm_job_saves_before_its_time_is_up_and_goes_on_when_requeued(
    settings: dict[str, Any], tmp_path: Path, requeued: bool
) -> None:
    """Two processes under the script itself; only srun and scontrol are stand-ins."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, content in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (tools / name).write_text(content)
        (tools / name).chmod(0o755)
    with socket.socket() as free:  # the script derives its port from the job's number
        free.bind(("127.0.0.1", 0))
        job = free.getsockname()[1] - 20000
    variables = {
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "here", "NPROC_PER_NODE": "2", "REQUEUED": str(tmp_path / "requeued"),
    }  # fmt: skip
    output_dir = tmp_path / "out"
    flags = flags_of(settings | {"output_dir": output_dir, "train_batch_size": 2, "device": None})

    def submit(max_train_steps: int) -> subprocess.Popen:
        command = ["bash", EXAMPLES / "slurm.sbatch", *flags, "--device", "cpu", "--max_train_steps", max_train_steps]
        return subprocess.Popen(
            [str(part) for part in command],
            env=environment(**variables), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    process = submit(10**6)
    try:
        until(lambda: last_step(output_dir) >= 3, "three steps")
        process.send_signal(signal.SIGUSR1)  # to the batch script alone, as by --signal=B:USR1@300
        until(lambda: not trainers(str(output_dir)), "the processes' end", timeout=30)  # Slurm gives minutes
        output, _ = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    assert process.returncode != 0
    assert (tmp_path / "requeued").read_text() == f"{job}\n"
    (checkpoint,) = list_checkpoints(output_dir)
    step = last_step(output_dir)
    assert checkpoint.name == f"checkpoint-{step}", output
    assert f"stopped by SIGUSR1: saved at step {step}" in output
    if not requeued:
        return
    output = finish(submit(step + 1))
    assert f"Resuming from {checkpoint}" in output
    assert (tmp_path / "requeued").read_text() == f"{job}\n", "a run that is done is not requeued"


def test_the_slurm_job_tells_torchrun_less_time_than_it_has() -> None:
    script = (EXAMPLES / "slurm.sbatch").read_text()
    seconds = int(script.split("--signal=B:USR1@")[1].split()[0])
    assert int(script.split("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=")[1].split()[0]) < seconds
    assert script.index("#SBATCH") < script.index("MASTER_ADDR="), "Slurm reads them up to the first command"


# ------------------------------------------------------------------------------------------------- waiting


def test_defect_13_devices_wait_minutes_for_each_other_and_the_host_hours(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits(**changes: Any) -> tuple[timedelta, list[tuple[str, timedelta]]]:
        """Time-outs of the default group, which is NCCL's on GPUs, and of the groups that are made besides."""
        taken: list[Any] = []
        made: list[tuple[str, timedelta]] = []

        def accelerator(**options: Any) -> Any:
            taken.extend(options["kwargs_handlers"])
            return SimpleNamespace(num_processes=2)

        with monkeypatch.context() as patch:
            patch.setattr("sd_recipes.runtime.accelerator.Accelerator", accelerator)
            patch.setattr("torch.distributed.is_initialized", lambda: True)
            patch.setattr("torch.distributed.get_world_size", lambda *_: 2)
            patch.setattr("torch.distributed.new_group", lambda backend, timeout: made.append((backend, timeout)))
            start_accelerator(Recipe(**settings | changes))
        return taken[0].timeout, made

    default, made = waits()
    assert timedelta(minutes=5) <= default <= timedelta(minutes=15)
    assert made == [("gloo", timedelta(hours=2))]
    # A process whose stream is away must not be taken for one that hangs.
    streamed, _ = waits(streaming=True, stream_outage_minutes=30, max_train_samples=None)
    assert streamed == default + timedelta(minutes=30)


@pytest.mark.slow
def test_defect_13_what_one_process_does_alone_may_take_longer_than_devices_wait(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {
        "train_batch_size": 2, "max_train_steps": 2, "checkpointing_steps": 1, "validation_prompts": "a disc",
        "validation_inference_steps": 1, "validation_steps": 1,
    }  # fmt: skip
    output = finish(start(torchrun(2), *flags_of(settings), script="tests/slow_first.py"), timeout=240)
    for work in ("_prepare", "data_fingerprint", "StableDiffusion.load", "Validator.__call__", "wait", "write_results"):
        assert f"{work} takes long" in output
    assert saved(Path(settings["output_dir"]), 2, "unet")


@pytest.mark.parametrize(
    "error",
    [
        distributed.DistBackendError(
            "NCCL communicator was aborted on rank 1. Original reason for failure was: [Rank 1] Watchdog caught\n"
            "collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, Timeout(ms)=600000)"
        ),
        distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3384, remote process exited or there was a\n"
            "network error, NCCL version 2.27.5"),
        distributed.DistStoreError("Socket Timeout"),
        RuntimeError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=BROADCAST)"),
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 600000ms for recv operation"),
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:13374"),
    ],
)  # fmt: skip
def test_defect_13_an_error_between_processes_is_one_line(
    error: RuntimeError, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left, mistakes_in_one_line():
        raise error
    assert left.value.code == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert re.match("error: .*(ended|hangs).*says why", told)
    assert " ".join(str(error).split())[:60] in told


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 must have the same dtype"), torch.OutOfMemoryError("x")])
def test_other_errors_keep_their_traceback(error: RuntimeError) -> None:
    with pytest.raises(type(error)) as raised, mistakes_in_one_line():
        raise error
    assert raised.value is error
