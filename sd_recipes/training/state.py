"""What a run has learned so far: its trained parts by name, optimizer, schedule, loss scaler and position.

A checkpoint is written from a `TrainState` and restored into one, and knows nothing else about a run. All tensors in it
are whole and named after the parameter they belong to, whether a part is sharded or not. So the number of processes,
and how a part is laid out on them, may change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import ConfigDict, Field
from torch.distributed.tensor import DTensor

from sd_recipes.runtime.fsdp import gather, shard_like
from sd_recipes.training.ema import Average
from sd_recipes.training.fused_backward import FusedBackward
from sd_recipes.training.optimizer_state import OF_GROUP, flat, load_by_name, state_by_name, unflat
from sd_recipes.training.quiet_loss import QuietLoss
from sd_recipes.training.timestep_errors import TimestepErrors

OPTIMIZER = "optimizer.safetensors"
TIMESTEP_ERRORS = "timestep_errors.safetensors"
CONFIG = "config.json"
# Suffixes of the folders with a part's averaged weights: of the one that is evaluated, and of those that are kept for
# `sd-recipes average`, with their relative widths, which are the paper's (Karras et al. 2024, section 3.1).
AVERAGE = "_ema"
SNAPSHOTS = {"_ema05": 0.05, "_ema10": 0.10}


@dataclass
class Progress:
    """Where a run stands. `samples_seen` is its position in the data and in the random draws."""

    # Also the schema of what a checkpoint saves of it.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    global_step: int = 0  # global batches done
    samples_seen: int = 0
    loss_sum: Annotated[float, Field(allow_inf_nan=False)] = 0.0  # of the steps that have not been logged yet
    logged_step: Annotated[int, Field(ge=0)] = 0
    # Of those not logged yet: no row could be used, or what came of them was not finite; so they have no loss.
    steps_without_rows: Annotated[int, Field(ge=0)] = 0
    skipped_in_a_row: Annotated[int, Field(ge=0)] = 0  # the last steps, for a gradient that was not finite
    awaits_validation: bool = False  # of this step, which comes after its checkpoint
    # Images that a device takes at once since memory ran out with more; None if it has not.
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    stream_state: dict[str, Any] | None = None  # where this process's stream stands, if there is one


class RateGroup(NamedTuple):
    """Parameters of a part that have the same learning rate, by name."""

    learning_rate: float
    parameters: dict[str, torch.nn.Parameter]


@dataclass
class TrainedPart:
    """What is trained: a model of the pipeline, a LoRA of one, or the learned uncertainty, which ends with the run.

    `name` is its folder in a checkpoint and, for a model, its attribute of the components. `rebuild` makes a model of
    the same kind from whole tensors by name, which evaluation and export use if the part itself is sharded; None for a
    part that is never sharded.
    """

    name: str
    module: torch.nn.Module  # with its own parameter names, so not wrapped; FSDP2 shards it in place
    weights_file: str  # in its folder, next to config.json
    config: str  # the content of that config.json
    learning_rate: float
    rebuild: Callable[[Mapping[str, torch.Tensor]], torch.nn.Module] | None = None
    # What it leaves in the run's folder of its whole evaluated tensors, besides its place in the pipeline.
    export: Callable[[Mapping[str, torch.Tensor], Path], None] | None = None
    is_whole: bool = True  # all of the module is its own, what is frozen of it too; not so a LoRA
    average: Average | None = None
    snapshots: dict[str, Average] = field(default_factory=dict)  # with --ema_snapshots, by suffix
    # With --param_groups, rates other than `learning_rate`, by parameter; above 0, for `freeze` takes care of the rest.
    own_rates: dict[str, float] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    prepared: torch.nn.Module = field(init=False)  # as accelerate prepares it, for training steps to call

    def __post_init__(self) -> None:
        self.prepared = self.module
        needs_gradient = {name: each.requires_grad for name, each in self.module.named_parameters()}
        self._trained = {name for name, is_trained in needs_gradient.items() if is_trained}
        # Of a LoRA, which lies in the layers of a frozen model.
        self._of_others = set() if self.is_whole else needs_gradient.keys() - self._trained

    def freeze(self, names: Iterable[str]) -> None:
        """Train these of its parameters no more; they remain part of its state."""
        parameters = self.parameters
        for name in names:
            parameters[name].requires_grad_(False)
            self.frozen.add(name)
        self._trained -= self.frozen

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained ones, by name."""
        return {name: each for name, each in self.module.named_parameters() if name in self._trained}

    @property
    def groups(self) -> list[RateGroup]:
        """The trained parameters by their learning rates, those with the part's own first."""
        by_rate: dict[float, dict[str, torch.nn.Parameter]] = {self.learning_rate: {}}
        for name, parameter in self.parameters.items():
            by_rate.setdefault(self.own_rates.get(name, self.learning_rate), {})[name] = parameter
        return [RateGroup(rate, parameters) for rate, parameters in by_rate.items() if parameters]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its state by name, without what is not its own."""
        return {name: each for name, each in self.module.state_dict().items() if name not in self._of_others}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take on the state of `tensors`, which returned it, on another device or elsewhere sharded."""
        here = self.tensors()
        if here.keys() != tensors.keys():
            raise RuntimeError(f"the state_dict of {self.name} has other names")
        laid_out = {name: shard_like(here[name], tensor) for name, tensor in tensors.items()}
        self.module.load_state_dict(laid_out, strict=False)  # a frozen model's own are left as they are

    @contextmanager
    def holding(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Within this context it has the state of `tensors`, and afterwards its own again."""
        own = {name: each.clone() for name, each in self.tensors().items()}
        self.load(tensors)
        try:
            yield
        finally:
            self.load(own)

    @property
    def averages(self) -> dict[str, Average]:
        """All averages, by suffix; they have seen the same updates."""
        return ({AVERAGE: self.average} if self.average else {}) | self.snapshots

    @property
    def is_sharded(self) -> bool:
        return any(isinstance(each, DTensor) for each in self.module.parameters())

    def evaluated_tensors(self) -> dict[str, torch.Tensor]:
        """The weights that are evaluated and exported, by name: the averaged ones, if there is an average."""
        return self.tensors() | (self.average.named_tensors() if self.average else {})


@dataclass
class StateDict:
    """A TrainState as files: tensors by file and name, texts by file, and values that JSON can hold."""

    tensors: dict[str, dict[str, torch.Tensor]]
    texts: dict[str, str]
    values: dict[str, Any]


@dataclass
class TrainState:
    """Everything that a run changes from step to step."""

    parts: dict[str, TrainedPart]
    optimizer: Any  # accelerate's wrapper
    schedule: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler | None
    quiet_loss: QuietLoss
    progress: Progress = field(default_factory=Progress)
    timestep_errors: TimestepErrors | None = None  # with --timesteps_by_error
    fused_backward: FusedBackward | None = None  # with --fused_backward_pass

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All trained parameters as PART/NAME."""
        return {
            f"{part.name}/{name}": parameter
            for part in self.parts.values()
            for name, parameter in part.parameters.items()
        }

    @property
    def optimized(self) -> dict[str, torch.nn.Parameter]:
        """All trained parameters as PART/NAME, in the order of the optimizer's groups."""
        return {
            f"{part.name}/{name}": parameter
            for part in self.parts.values()
            for group in part.groups
            for name, parameter in group.parameters.items()
        }

    @property
    def frozen(self) -> set[str]:
        """As PART/NAME, the parameters that --param_groups freezes."""
        return {f"{part.name}/{name}" for part in self.parts.values() for name in part.frozen}

    def update_averages(self) -> None:
        for part in self.parts.values():
            for average in part.averages.values():
                average.step()

    def export(self, output_dir: Path, *, is_main: bool) -> None:
        """Let the first process write what the parts export by themselves. Every process has to call it."""
        for part in self.parts.values():
            if part.export:
                whole = gather(part.evaluated_tensors(), is_wanted=is_main)
                if is_main:
                    part.export(whole, output_dir)

    @property
    def is_averaged(self) -> bool:
        """Whether the weights that are evaluated and exported are averages."""
        return any(part.average for part in self.parts.values())

    @contextmanager
    def evaluated(self, components: Any, *, wanted: bool = True, averaged: bool = True) -> Iterator[None]:
        """Within this context `components` have the weights that are evaluated and exported, where they are `wanted`.

        Or those that are trained, if they are not to be `averaged`. Every process has to enter it, since sharded parts
        are gathered.
        """
        with ExitStack() as undo:
            for part in self.parts.values():
                if part.is_sharded:
                    assert part.rebuild is not None
                    tensors = part.evaluated_tensors() if averaged else part.tensors()
                    whole = gather(tensors, is_wanted=wanted)
                    if wanted:
                        undo.callback(setattr, components, part.name, getattr(components, part.name))
                        setattr(components, part.name, part.rebuild(whole))
                elif part.average and wanted and averaged:
                    undo.enter_context(part.average.applied(part.module))
            yield

    @contextmanager
    def replaced(self, components: Any, weights: Mapping[str, Mapping[str, torch.Tensor]]) -> Iterator[None]:
        """Within this context `components` have these whole tensors, by part and name, in the place of their own."""
        with ExitStack() as undo:
            for name, tensors in weights.items():
                part = self.parts[name]
                if part.rebuild:
                    undo.callback(setattr, components, name, getattr(components, name))
                    setattr(components, name, part.rebuild(tensors))
                else:
                    undo.enter_context(part.holding(tensors))
            yield

    def state_dict(self, *, only_layout: bool = False) -> StateDict:
        """The state; tensors are not copied, and may be sharded. The same files and names on all processes.

        For its `only_layout`, names, sizes and types, no average is made: the weights stand for it.
        """
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        texts: dict[str, str] = {}
        for part in self.parts.values():
            folders = {part.name: part.tensors()}
            for suffix, average in part.averages.items():
                folders[part.name + suffix] = folders[part.name] | (
                    average.held() if only_layout else average.named_tensors()
                )
            for folder, named in folders.items():
                tensors[f"{folder}/{part.weights_file}"] = named
                texts[f"{folder}/{CONFIG}"] = part.config
        optimizer = dict(flat(state_by_name(self.optimizer, list(self.optimized))))
        tensors[OPTIMIZER] = {name: value for name, value in optimizer.items() if isinstance(value, torch.Tensor)}
        if self.timestep_errors:
            tensors[TIMESTEP_ERRORS] = self.timestep_errors.state_dict()
        values = {
            # Where a stream stands differs between the processes.
            "progress": {name: value for name, value in asdict(self.progress).items() if name != "stream_state"},
            "optimizer": {name: value for name, value in optimizer.items() if not isinstance(value, torch.Tensor)},
            "frozen": sorted(self.frozen),
            "schedule_step": self.schedule.last_epoch,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "quiet_loss": self.quiet_loss.state_dict(),
            "averages": {
                part.name: average.num_updates for part in self.parts.values() for average in part.averages.values()
            },
        }
        return StateDict(tensors, texts, values)

    def check_state_dict(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], values: Mapping[str, Any]) -> None:
        """Raises ValueError if the state does not have these parts, parameters and shapes; changes nothing."""
        for file, here in self.state_dict(only_layout=True).tensors.items():
            saved = tensors[file]
            if file == OPTIMIZER:
                continue  # it has none before the first step
            if different := sorted(saved.keys() ^ here.keys()):
                raise ValueError(f"{file} and the model differ in {different[0]}")
            for name, tensor in saved.items():
                if tensor.shape != here[name].shape:
                    raise ValueError(f"{name} of {file} is {[*tensor.shape]} and the model's {[*here[name].shape]}")
        of_optimizer = unflat({**tensors[OPTIMIZER], **values["optimizer"]})
        # --param_groups may have frozen others then.
        if of_optimizer and of_optimizer.keys() | values.get("frozen", []) != self.parameters.keys() | self.frozen:
            raise ValueError(
                f"the optimizer's state has {len(of_optimizer)} parameters, of which the model, with "
                f"{len(self.parameters)}, has {len(of_optimizer.keys() & self.parameters.keys())}"
            )
        counts = any(OF_GROUP in each for each in of_optimizer.values())
        if counts and (begun := sorted(self.parameters.keys() - of_optimizer.keys())):
            raise ValueError(
                f"{begun[0]} was frozen by --param_groups, and its optimizer counts the steps of whole groups, so that "
                "nothing in them can begin later"
            )
        if self.scaler and values["scaler"] and values["scaler"].keys() != self.scaler.state_dict().keys():
            raise ValueError("it has another loss scaler")
        for part in self.parts.values():
            if part.averages and part.name not in values["averages"]:
                raise ValueError(f"it has no average of {part.name}")

    def load_state_dict(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], values: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, with whole tensors. It fits, as `check_state_dict` has shown."""
        for part in self.parts.values():
            own = tensors[f"{part.name}/{part.weights_file}"]
            if part.average:  # what is frozen from here on has none: it stays what was evaluated of it
                averaged = tensors[f"{part.name}{AVERAGE}/{part.weights_file}"]
                own = {**own, **{name: averaged[name] for name in part.frozen}}
            part.load(own)
            for suffix, average in part.averages.items():
                average.load(tensors[f"{part.name}{suffix}/{part.weights_file}"], values["averages"][part.name])
        load_by_name(self.optimizer, self.optimized, unflat({**tensors[OPTIMIZER], **values["optimizer"]}))
        self._load_schedule(values["schedule_step"])
        if self.timestep_errors:
            self.timestep_errors.load_state_dict(tensors[TIMESTEP_ERRORS])
        if self.scaler and values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
        if values["quiet_loss"]:  # a checkpoint of an earlier version, or of another script, has none
            self.quiet_loss.load_state_dict(values["quiet_loss"])
        self.progress = Progress(**values["progress"])

    def _load_schedule(self, step: int) -> None:
        schedule = self.schedule
        rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step, "_last_lr": rates})
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
