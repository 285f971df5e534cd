"""Find out on throw-away parameters whether an optimizer's state can be saved, and goes on from there to the bit."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import product
from typing import Any

import torch

from sd_recipes.errors import RecipeError, one_line
from sd_recipes.recipe import Recipe
from sd_recipes.training.bf16_weights import with_bf16_weights
from sd_recipes.training.optimizer_classes import FAILURES, OptimizerClass, optimizer_class
from sd_recipes.training.optimizer_state import (
    State,
    effective_rate,
    flat,
    load_by_name,
    running_values,
    state_by_name,
    unflat,
)
from sd_recipes.training.schedule_free import EvaluationWeights, has_modes
from sd_recipes.training.uncertainty import LEARNING_RATE

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
VECTOR, MATRIX, KERNEL = (8,), (4, 8), (4, 2, 3, 3)
NUM_BEFORE, NUM_AFTER = 3, 6  # steps before and after it is saved: some optimizers do something every few steps
PLAIN = (torch.Tensor, int, float, str, type(None))  # what a checkpoint holds of a state; bool is an int
OTHER = "use another optimizer"


def check_optimizer(recipe: Recipe, device: torch.device) -> None:
    """Step the recipe's optimizer on tiny parameters of `device`, save it, go on with a copy, and compare.

    Warns of a schedule or a rate that it has no use for. Raises RecipeError if there is no such optimizer, if it does
    not go with the recipe, cannot be stepped, or has a state that cannot be saved or does not go on.
    """
    kind, rates = optimizer_class(recipe, device, None), rates_of(recipe)
    shapes = _taken(kind, shapes_of(recipe), device)
    optimizer = _Trial(kind, rates, shapes, device).optimizer
    check_combinations(optimizer, recipe)
    for words in odd_rates(optimizer, recipe):
        logger.warning("%s", words)
    _check_goes_on(kind, rates, shapes, device)
    if recipe.weights_dtype == "bf16":
        with_bf16 = replace(kind, flag=f"{kind.flag} with --weights_dtype bf16")
        _check_goes_on(with_bf16, rates, shapes, device, torch.bfloat16)


def _taken(kind: OptimizerClass, shapes: Sequence[Shape], device: torch.device) -> list[Shape]:
    """Those that the constructor takes: whether the model has any other is seen once it is loaded.

    Raises RecipeError if there are none.
    """
    taken, refusals = [], []
    for shape in shapes:
        try:
            _Trial(kind, [1e-4], [shape], device)
            taken.append(shape)
        except RecipeError as error:
            refusals.append(error)
    if not taken:
        raise refusals[0]
    return taken


def _check_goes_on(
    kind: OptimizerClass, rates: list[float], shapes: Sequence[Shape], device: torch.device, dtype: Any = torch.float32
) -> None:
    """Raises RecipeError for an optimizer that cannot be stepped, saved and loaded."""
    tried = _Trial(kind, rates, shapes, device, dtype)
    try:
        for _ in range(NUM_BEFORE):
            tried.step()
        evaluated = tried.evaluated()
        saved = tried.saved()
        looks_alike = _are_equal(evaluated, tried.evaluated())
    except FAILURES as error:
        if isinstance(error, RecipeError):
            raise
        several = f" and the learning rates {', '.join(f'{rate:g}' for rate in rates)}" if len(rates) > 1 else ""
        why = f"{type(error).__name__}: {one_line(error, 200)}"
        raise RecipeError(
            f"{kind.flag} cannot be stepped with these settings{several} ({why}): change them, or {OTHER}"
        ) from error
    if not looks_alike:
        raise RecipeError(
            f"{kind.flag} evaluates other weights when it is asked again, for its eval() changes more than its "
            f"param_groups and the weights: {OTHER}"
        )
    again = _Trial(kind, rates, shapes, device, dtype)
    goes_on, why = True, "a resumed run would not go on as one that was not interrupted"
    try:
        again.load(tried, saved)
        for _ in range(NUM_AFTER):
            tried.step()
            again.step()
            goes_on = goes_on and _are_equal(tried.tensors(), again.tensors())
        goes_on = goes_on and _are_equal(tried.evaluated(), again.evaluated())
    except FAILURES as error:
        goes_on, why = False, f"{type(error).__name__}: {one_line(error, 200)}"
    if not goes_on:
        raise RecipeError(f"{kind.flag} keeps state that its state_dict does not hold ({why}): {OTHER}")


def _are_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.allclose(one, other, rtol=0, atol=0, equal_nan=True) for one, other in pairs)


def shapes_of(recipe: Recipe) -> Sequence[Shape]:
    """Of what a recipe trains: a LoRA is matrices alone, unless it is said to be of other layers."""
    is_plain_lora = recipe.trains_lora and recipe.lora_targets is None and not recipe.lora_use_dora
    return [MATRIX] if is_plain_lora else [VECTOR, MATRIX, KERNEL]


def rates_of(recipe: Recipe) -> list[float]:
    """The learning rates that a recipe gives to what it trains, up to 1: larger ones are answered by training."""
    rates = [recipe.learning_rate, *(group.learning_rate for group in recipe.param_groups or [])]
    if recipe.text_encoder_learning_rate is not None:
        rates.append(recipe.text_encoder_learning_rate)
    if recipe.learned_uncertainty:
        rates.append(LEARNING_RATE)
    return list(dict.fromkeys(min(rate, 1.0) for rate in rates if rate > 0)) or [recipe.learning_rate]


def check_combinations(optimizer: Any, recipe: Recipe) -> None:
    """Raises RecipeError for settings that an optimizer does not go with, for what it keeps or does."""
    name = f"--optimizer {recipe.optimizer}"
    if has_modes(optimizer):
        for flag in ("use_ema", "ema_snapshots"):
            if getattr(recipe, flag):
                raise RecipeError(f"--{flag} averages the weights, which {name} does by itself: drop one")
    kept = sorted({key for values in running_values(optimizer) for key in values})
    if not kept and not has_modes(optimizer):
        return
    for flag, is_given in (
        ("--fused_backward_pass", recipe.fused_backward_pass),
        ("--weights_dtype bf16", recipe.weights_dtype == "bf16"),
    ):
        if is_given:
            raise RecipeError(
                f"{flag} steps some parameters after the others, and {name} keeps numbers of all of them "
                f"({', '.join(kept) or 'train'}): drop one"
            )


def odd_rates(optimizer: Any, recipe: Recipe) -> list[str]:
    """Warnings about a rate and a schedule that an optimizer makes no sense with, whatever its name."""
    odd = []
    if effective_rate(optimizer) is not None and not 0.5 <= recipe.learning_rate <= 2:
        change = ""
        if "d_coef" in optimizer.param_groups[0]:
            change = ", and change d_coef by --optimizer_kwargs where that rate is too small or large"
        odd.append(
            f"--learning_rate {recipe.learning_rate:g} multiplies the rate that --optimizer {recipe.optimizer} finds "
            f"by itself: its authors leave it at 1{change}."
        )
    if has_modes(optimizer) and not recipe.lr_scheduler.startswith("constant"):
        odd.append(
            f"--lr_scheduler {recipe.lr_scheduler} lowers a rate that --optimizer {recipe.optimizer} needs constant, "
            "for its average of the weights takes the place of a schedule: use constant, or constant_with_warmup."
        )
    return odd


class _Trial:
    """An optimizer of tiny parameters: a group for each learning rate, with one parameter of each shape."""

    def __init__(
        self,
        kind: OptimizerClass,
        rates: list[float],
        shapes: Sequence[Shape],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.kind, self.num_steps = kind, 0
        self.parameters = {
            f"part/{rate}-{len(shape)}": torch.nn.Parameter(
                torch.linspace(0.5, 1.5, math.prod(shape)).view(shape).to(device, dtype)
            )
            for rate, shape in product(rates, shapes)
        }
        groups = [
            {"params": [self.parameters[f"part/{rate}-{len(shape)}"] for shape in shapes], "lr": rate} for rate in rates
        ]
        if dtype == torch.bfloat16:
            make = with_bf16_weights(kind.make, seed=0, step_number=lambda: self.num_steps)
            kind = replace(kind, make=make)
        with redirect_stdout(StringIO()):  # some print a line whenever they are made
            self.optimizer: Any = kind(groups, rates[0])

    def step(self) -> None:
        self.num_steps += 1
        for each in self.parameters.values():
            count = torch.arange(each.numel(), device=each.device, dtype=torch.float32)
            each.grad = (1 + torch.sin(count + self.num_steps)).view_as(each).to(each.dtype)
        self.optimizer.step(None)  # as accelerate calls it

    def tensors(self) -> list[torch.Tensor]:
        return [each.detach() for each in self.parameters.values()]

    def evaluated(self) -> list[torch.Tensor]:
        """The weights that it evaluates in the place of those that it trains, if it does."""
        if not has_modes(self.optimizer):
            return []
        return list(EvaluationWeights(self.parameters, self.optimizer).named_tensors().values())

    def saved(self) -> State:
        """As a checkpoint has it. Raises RecipeError for what it cannot hold."""
        saved = dict(flat(state_by_name(self.optimizer, list(self.parameters))))
        for name, value in saved.items():
            if not isinstance(value, PLAIN):
                raise RecipeError(
                    f"{self.kind.flag} keeps {name.rsplit('/', 1)[-1]} as {type(value).__name__}, and a checkpoint "
                    f"holds tensors and numbers: {OTHER}"
                )
        tensors = {name: value.cpu().clone() for name, value in saved.items() if isinstance(value, torch.Tensor)}
        rest = json.loads(json.dumps({name: value for name, value in saved.items() if name not in tensors}))
        return unflat({**tensors, **rest})

    def load(self, other: _Trial, saved: State) -> None:
        """Stand where another trial stood when its state was saved."""
        for mine, its in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(its)
        load_by_name(self.optimizer, self.parameters, saved)
        self.num_steps = other.num_steps
