"""The memory plan of a run: what it takes on the device and on the host, when, and of how much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sd_recipes.errors import RecipeError, one_line
from sd_recipes.memory.overheads import CUDA_CONTEXT, GATHERED_BLOCKS, on_device, on_host
from sd_recipes.memory.step import AVERAGE, FROZEN, GRADIENTS, OPTIMIZER, WEIGHTS, TracedStep, waits_for_gradients
from sd_recipes.memory.tracer import Moment
from sd_recipes.model.latents import images_at_once, most_pixels
from sd_recipes.optimizers import is_class
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import check_weights_dtype
from sd_recipes.training.fused_backward import check_fused_backward

RESIDENT = (WEIGHTS, OPTIMIZER, AVERAGE, FROZEN)  # between two steps
SHARDED = (WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE)  # by FSDP
OF_PASSES = ("encoding", "forward", "backward")
OF_UPDATE = ("clipping", "optimizer", "average")  # phases that know neither batch nor activations
# Settings that the passes of a step do not depend on, but for memory that is there in all of its phases.
AVERAGES = {"use_ema", "ema_snapshots"}
STATE = {"optimizer", "use_8bit_adam", "optimizer_kwargs", *AVERAGES}
UNTRACED = {"offload_ema", "memory"}  # the first is put in afterwards, the other decides nothing by itself


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


class Untraceable(RecipeError):
    """An optimizer of another package asks for values while it steps, which nothing has on the meta device."""


class Planner:
    """Plans of one run on each of so many processes, and of variations of it; what they have in common is traced once.

    `told` is called whenever something has been traced.
    """

    def __init__(
        self,
        device: str,
        capacity: int | None = None,
        *,
        num_processes: int = 1,
        told: Callable[[], object] = lambda: None,
    ) -> None:
        self.device, self.capacity, self.num_processes, self.told = device, capacity, num_processes, told
        self._passes: dict[str, TracedStep] = {}
        self._updates: dict[str, TracedStep] = {}
        self._hosts: dict[str, dict[str, int]] = {}
        self._encodings: dict[tuple[str, int, bool], Moment] = {}

    def least(self, recipe: Recipe) -> int:
        """What the recipe takes at the least: whatever its batch, when it steps, or between two steps."""
        update = self._traced_update(recipe.model_copy(update={"fused_backward_pass": False}))
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
        num_processes: int | None = None,
        is_sharded: bool = False,
        latents_are_kept: bool = False,
        about: bool = False,
    ) -> MemoryPlan:
        """The plan of a recipe on each of so many processes, or of the planner's number.

        With `latents_are_kept` moments come from a full store, and the VAE rests. If `about` is enough, numbers of
        images between one and the batch are not traced: what they take is on a straight line between these. Raises
        RecipeError for a model that cannot be built, and for settings that a run refuses.
        """
        num_processes = num_processes or self.num_processes
        precision = recipe.mixed_precision or "no"
        check_weights_dtype(recipe, precision)
        if recipe.fused_backward_pass:
            check_fused_backward(num_processes, precision, 1)
        update = self._traced_update(recipe)
        moments = self._passes_about(recipe, update) if about else self._passes_of(recipe, update)
        if latents_are_kept:
            moments = _without_vae(moments, update)
        moments |= {name: update.moments[name] for name in OF_UPDATE if name in update.moments}
        if recipe.offload_ema and self.device == "cuda":
            visitors = update.nbytes_of_visitors
            moments = {name: _with_average_on_host(name, each, visitors) for name, each in moments.items()}
        if is_sharded:
            moments = {name: _sharded(each, num_processes) for name, each in moments.items()}
        host = self._on_host(recipe, update)
        passing = max(
            each.total - sum(each.by_kind[kind] for kind in (*RESIDENT, GRADIENTS)) for each in moments.values()
        )
        overhead = on_device(passing, num_processes=num_processes) if self.device == "cuda" else host
        return MemoryPlan(recipe, self.device, num_processes, moments, overhead, host, self.capacity)

    def _on_host(self, recipe: Recipe, update: TracedStep) -> dict[str, int]:
        key = f"{_state_of(recipe)} {recipe.offload_ema}"
        if key not in self._hosts:
            self._hosts[key] = on_host(recipe, update, self.device)
        return self._hosts[key]

    def _passes_of(self, recipe: Recipe, update: TracedStep) -> dict[str, Moment]:
        """By phase, with the optimizer states and averages of `update`, whatever the passes were traced with."""
        step = self._traced_passes(recipe)
        moved = Counter({kind: update.resident[kind] - step.resident[kind] for kind in (OPTIMIZER, AVERAGE)})
        return {name: _moved(each, moved) for name, each in step.moments.items() if name not in OF_UPDATE}

    def _passes_about(self, recipe: Recipe, update: TracedStep) -> dict[str, Moment]:
        if recipe.validation_split:  # whose images are encoded too
            return self._passes_between(recipe, update)
        unsliced = recipe.model_copy(update={"vae_slicing": False})
        return self._passes_between(unsliced, update) | {"encoding": self._encoding_about(recipe, update)}

    def _encoding_about(self, recipe: Recipe, update: TracedStep) -> Moment:
        """As many images as the VAE takes at once; of more there are only the pixels and moments of the others."""
        most = images_at_once(most_pixels(self.device), recipe.resolution**2)
        key = _state_of(recipe), min(recipe.images_at_once, most), recipe.vae_slicing
        if key not in self._encodings:
            self._encodings[key] = update.encoding(key[1], is_sliced=recipe.vae_slicing)
            self.told()
        gradients = Counter({GRADIENTS: update.nbytes_of_gradients if waits_for_gradients(recipe) else 0})
        return _moved(self._encodings[key], gradients)

    def _passes_between(self, recipe: Recipe, update: TracedStep) -> dict[str, Moment]:
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
        key = recipe.model_dump_json(exclude=UNTRACED | (AVERAGES if recipe.fused_backward_pass else STATE))
        if key not in self._passes:
            without = recipe.model_copy(update=dict.fromkeys(AVERAGES, False))
            self._passes[key] = _traced(without, self.device, passes=True)
            self.told()
        return self._passes[key]

    def _traced_update(self, recipe: Recipe) -> TracedStep:
        key = _state_of(recipe)
        if key not in self._updates:
            self._updates[key] = _traced(recipe, self.device, passes=False)
            self.told()
        return self._updates[key]


def plan_memory(recipe: Recipe, device: str, capacity: int | None = None, *, num_processes: int = 1) -> MemoryPlan:
    """What a run of this recipe will take on each of so many processes, of `capacity` bytes.

    Nothing is loaded but the model's configuration. Raises RecipeError if that is not there, or describes no model.
    """
    return Planner(device, capacity, num_processes=num_processes).plan(recipe)


def _traced(recipe: Recipe, device: str, *, passes: bool) -> TracedStep:
    """Raises Untraceable, and RecipeError."""
    try:
        return TracedStep(recipe, device, passes=passes)
    except Exception as error:  # whatever the optimizer raises
        if isinstance(error, RecipeError) or not is_class(recipe.optimizer):
            raise
        raise Untraceable(
            f"--optimizer {recipe.optimizer} cannot be planned, since it does not step without values "
            f"({type(error).__name__}: {one_line(error, 200)}): plan with an optimizer of as much state, such as adamw"
        ) from error


def _state_of(recipe: Recipe) -> str:
    # The frozen models' precision is the run's.
    frozen = {"weights_dtype", "fused_backward_pass", "mixed_precision", "prior_preservation"}
    return recipe.model_dump_json(include=STATE | frozen)


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


def _with_average_on_host(phase: str, moment: Moment, visitors: int) -> Moment:
    """Blocks of the averages visit the device beside a step; a validation takes all of them there."""
    moved = 0 if phase == "validation" else moment.by_kind[AVERAGE]
    return _moved(moment, Counter({AVERAGE: -moved, "workspace": visitors}))


def _sharded(moment: Moment, num_processes: int) -> Moment:
    """A share of what FSDP shards, and the blocks that are whole while they compute."""
    kinds = moment.by_kind.copy()
    gathered = int(kinds[WEIGHTS] * GATHERED_BLOCKS)
    for kind in SHARDED:
        kinds[kind] //= num_processes
    kinds["workspace"] += gathered
    return Moment(moment.total + sum(kinds.values()) - sum(moment.by_kind.values()), kinds)
