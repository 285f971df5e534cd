"""The memory plan of a run: what it takes on the device and on the host, when, and of how much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sd_recipes.memory.overheads import CUDA_CONTEXT, GATHERED_BLOCKS, on_device, on_host
from sd_recipes.memory.step import AVERAGE, FROZEN, GRADIENTS, OPTIMIZER, WEIGHTS, TracedStep
from sd_recipes.memory.tracer import Moment
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.host_memory import BLOCK_BYTES

RESIDENT = (WEIGHTS, OPTIMIZER, AVERAGE, FROZEN)  # between two steps
SHARDED = (WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE)  # by FSDP
OF_PASSES = ("encoding", "forward", "backward")
OF_UPDATE = ("clipping", "optimizer", "average")  # phases that know neither batch nor activations
# Settings that the passes of a step do not depend on, but for memory that is there in all of its phases.
STATE = {"optimizer", "use_8bit_adam", "use_ema", "offload_ema", "ema_snapshots"}


@dataclass(frozen=True)
class MemoryPlan:
    """What a run takes, in bytes. On a CPU, device and host are one memory, and `host` is counted with the tensors."""

    recipe: Recipe
    device: str  # cuda or cpu
    num_processes: int
    moments: Mapping[str, Moment]  # of the tensors, by phase
    overhead: Mapping[str, int]  # of the device
    host: Mapping[str, int]
    capacity: int | None  # of the device

    @property
    def phase(self) -> str:
        """When the peak is."""
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def by_kind(self) -> dict[str, int]:
        """The tensors at the peak, without kinds that are not there."""
        return {kind: size for kind, size in self.moments[self.phase].by_kind.items() if size > 0}

    @property
    def tensors(self) -> int:
        return self.moments[self.phase].total

    @property
    def allocated(self) -> int:
        """What torch says that it has allocated at the peak."""
        return self.tensors + self.overhead.get("cuBLAS workspaces", 0)

    @property
    def measurable(self) -> int:
        """What a run measures of itself: on a GPU what torch has allocated, on the CPU all that the process holds."""
        return self.allocated if self.device == "cuda" else self.total

    @property
    def total(self) -> int:
        return self.tensors + sum(self.overhead.values())

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.total <= self.capacity


class Planner:
    """Plans of one run and of variations of it; what they have in common is traced once."""

    def __init__(self, device: str, capacity: int | None = None) -> None:
        self.device, self.capacity = device, capacity
        self._passes: dict[str, TracedStep] = {}
        self._updates: dict[str, TracedStep] = {}
        self._hosts: dict[str, dict[str, int]] = {}

    def least(self, recipe: Recipe) -> int:
        """What the recipe takes at the least: whatever its batch, when it steps, or between two steps."""
        update = self._traced_update(recipe)
        kinds = update.resident.copy()
        if not recipe.fused_backward_pass:
            kinds[GRADIENTS] = update.nbytes_of_gradients
        if recipe.offload_ema and self.device == "cuda":
            del kinds[AVERAGE]
        return sum(kinds.values()) + (CUDA_CONTEXT if self.device == "cuda" else 0)

    def plan(
        self,
        recipe: Recipe,
        *,
        num_processes: int = 1,
        is_sharded: bool = False,
        latents_are_kept: bool = False,
        about: bool = False,
    ) -> MemoryPlan:
        """The plan of a recipe on each of so many processes. Raises RecipeError for a model that cannot be built.

        With `latents_are_kept` moments come from a full store, and the VAE rests. If `about` is enough, numbers of
        images between one and the batch are not traced: what they take is on a straight line between these.
        """
        if not about:  # which traces the update too
            self._traced_passes(recipe)
        update = self._traced_update(recipe)
        moments = self._passes_about(recipe, update) if about else self._passes_of(recipe, update)
        if latents_are_kept:
            moments = _without_vae(moments, update)
        moments |= {name: update.moments[name] for name in OF_UPDATE if name in update.moments}
        if recipe.offload_ema and self.device == "cuda":
            moments = {name: _with_average_on_host(name, each) for name, each in moments.items()}
        if is_sharded:
            moments = {name: _sharded(each, num_processes) for name, each in moments.items()}
        host = self._on_host(recipe, update)
        passing = max(
            each.total - sum(each.by_kind[kind] for kind in (*RESIDENT, GRADIENTS)) for each in moments.values()
        )
        overhead = on_device(passing, num_processes=num_processes) if self.device == "cuda" else host
        return MemoryPlan(recipe, self.device, num_processes, moments, overhead, host, self.capacity)

    def _on_host(self, recipe: Recipe, update: TracedStep) -> dict[str, int]:
        key = f"{_state_of(recipe)} {recipe.mixed_precision}"
        if key not in self._hosts:
            self._hosts[key] = on_host(recipe, update, self.device)
        return self._hosts[key]

    def _passes_of(self, recipe: Recipe, update: TracedStep) -> dict[str, Moment]:
        """By phase, with the optimizer states and averages of `update`, whatever the passes were traced with."""
        step = self._traced_passes(recipe)
        moved = Counter({kind: update.resident[kind] - step.resident[kind] for kind in (OPTIMIZER, AVERAGE)})
        return {name: _moved(each, moved) for name, each in step.moments.items() if name not in OF_UPDATE}

    def _passes_about(self, recipe: Recipe, update: TracedStep) -> dict[str, Moment]:
        number, most = recipe.images_at_once, recipe.train_batch_size
        if not 1 < number < most:
            return self._passes_of(recipe, update)
        one, all_at_once = (
            self._passes_of(recipe.model_copy(update={"micro_batch": each}), update) for each in (1, None)
        )
        waiting = update.nbytes_of_gradients  # of other micro-batches, for the last one
        for name in OF_PASSES:
            other = all_at_once[name]
            all_at_once[name] = _moved(other, Counter({GRADIENTS: waiting - other.by_kind[GRADIENTS]}))
        share = (number - 1) / (most - 1)
        return {name: _between(one[name], all_at_once[name], share) for name in one}

    def _traced_passes(self, recipe: Recipe) -> TracedStep:
        # A step within the backward pass has the optimizer's own tensors in it.
        key = recipe.model_dump_json(exclude=None if recipe.fused_backward_pass else STATE)
        if key not in self._passes:
            step = self._passes[key] = TracedStep(recipe, self.device)
            self._updates.setdefault(_state_of(recipe), step)
        return self._passes[key]

    def _traced_update(self, recipe: Recipe) -> TracedStep:
        key = _state_of(recipe)
        if key not in self._updates:
            self._updates[key] = TracedStep(recipe, self.device, passes=False)
        return self._updates[key]


def plan_memory(recipe: Recipe, device: str, capacity: int | None = None, *, num_processes: int = 1) -> MemoryPlan:
    """What a run of this recipe will take on each of so many processes, of `capacity` bytes.

    Nothing is loaded but the model's configuration. Raises RecipeError if that is not there, or describes no model.
    """
    return Planner(device, capacity).plan(recipe, num_processes=num_processes)


def _state_of(recipe: Recipe) -> str:
    # The frozen models' precision is the run's.
    return recipe.model_dump_json(include=STATE | {"weights_dtype", "fused_backward_pass", "mixed_precision"})


def _between(one: Moment, other: Moment, share: float) -> Moment:
    kinds = {
        kind: round(one.by_kind[kind] * (1 - share) + other.by_kind[kind] * share)
        for kind in one.by_kind | other.by_kind
    }
    return Moment(round(one.total * (1 - share) + other.total * share), Counter(kinds))


def _without_vae(moments: dict[str, Moment], step: TracedStep) -> dict[str, Moment]:
    vae = sum(each.nbytes for each in step.components.vae.parameters())
    by = Counter({FROZEN: -vae})
    return {name: _moved(each, by) if name != "validation" else each for name, each in moments.items()} | {
        "encoding": Moment()
    }


def _moved(moment: Moment, by: Counter[str]) -> Moment:
    kinds = moment.by_kind.copy()
    kinds.update(by)
    return Moment(moment.total + sum(by.values()), kinds)


def _with_average_on_host(phase: str, moment: Moment) -> Moment:
    """A block of the average visits the device beside a step; a validation takes all of it there."""
    if phase == "validation":
        return moment
    return _moved(moment, Counter({AVERAGE: -moment.by_kind[AVERAGE], "workspace": BLOCK_BYTES}))


def _sharded(moment: Moment, num_processes: int) -> Moment:
    """A share of what FSDP shards, and the blocks that are whole while they compute."""
    kinds = moment.by_kind.copy()
    gathered = int(kinds[WEIGHTS] * GATHERED_BLOCKS)
    for kind in SHARDED:
        kinds[kind] //= num_processes
    kinds["workspace"] += gathered
    return Moment(moment.total + sum(kinds.values()) - sum(moment.by_kind.values()), kinds)
