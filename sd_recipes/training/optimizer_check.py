"""Find out on throw-away parameters whether an optimizer's state can be saved, and goes on from there to the bit."""

from __future__ import annotations

import json
from typing import Any

import torch

from sd_recipes.errors import RecipeError, one_line
from sd_recipes.recipe import Recipe
from sd_recipes.training.optimizer_classes import OptimizerClass, optimizer_class
from sd_recipes.training.optimizer_state import State, flat, load_by_name, running_values, state_by_name, unflat
from sd_recipes.training.schedule_free import EvaluationWeights, begin_training, has_modes
from sd_recipes.training.uncertainty import LEARNING_RATE

SHAPE = (4, 8)
PLAIN = (torch.Tensor, int, float, str, type(None))  # what a checkpoint holds of a state; bool is an int
OTHER = "use another optimizer"


def check_optimizer(recipe: Recipe, device: torch.device) -> None:
    """Step the recipe's optimizer on tiny parameters of `device`, save it, go on with a copy, and compare.

    Raises RecipeError if there is no such optimizer, if it does not go with the recipe, cannot be stepped, or has a
    state that cannot be saved or does not go on.
    """
    kind = optimizer_class(recipe, device, None)
    rates = rates_of(recipe)
    tried = _Trial(kind, rates, device)
    check_combinations(tried.optimizer, recipe)
    try:
        tried.step()
        tried.step()
        tried.look()
        saved = tried.saved()
    except Exception as error:  # whatever it raises
        if isinstance(error, RecipeError):
            raise
        several = f" and the learning rates {', '.join(f'{rate:g}' for rate in rates)}" if len(rates) > 1 else ""
        why = f"{type(error).__name__}: {one_line(error, 200)}"
        raise RecipeError(
            f"{kind.flag} cannot be stepped with these settings{several} ({why}): change them, or {OTHER}"
        ) from error
    again = _Trial(kind, rates, device)
    try:
        again.load(tried, saved)
        tried.step()
        again.step()
        goes_on = all(torch.equal(one, other) for one, other in zip(tried.tensors(), again.tensors(), strict=True))
        why = "a resumed run would not go on as one that was not interrupted"
    except Exception as error:
        goes_on, why = False, f"{type(error).__name__}: {one_line(error, 200)}"
    if not goes_on:
        raise RecipeError(f"{kind.flag} keeps state that its state_dict does not hold ({why}): {OTHER}")


def rates_of(recipe: Recipe) -> list[float]:
    """The learning rates that a recipe gives to what it trains."""
    rates = [recipe.learning_rate, *(group.learning_rate for group in recipe.param_groups or [])]
    if recipe.text_encoder_learning_rate is not None:
        rates.append(recipe.text_encoder_learning_rate)
    if recipe.learned_uncertainty:
        rates.append(LEARNING_RATE)
    return [rate for rate in dict.fromkeys(rates) if rate > 0] or [recipe.learning_rate]


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


class _Trial:
    """An optimizer of a tiny parameter for each learning rate, in a group of its own."""

    def __init__(self, kind: OptimizerClass, rates: list[float], device: torch.device) -> None:
        self.kind = kind
        self.parameters = {
            f"part/{number}": torch.nn.Parameter(torch.linspace(0.5, 1.5, SHAPE[0] * SHAPE[1]).view(SHAPE).to(device))
            for number in range(len(rates))
        }
        groups = [{"params": [each], "lr": rate} for each, rate in zip(self.parameters.values(), rates, strict=True)]
        self.optimizer: Any = kind(groups, rates[0])
        begin_training(self.optimizer)
        self.num_steps = 0

    def step(self) -> None:
        self.num_steps += 1
        for each in self.parameters.values():
            count = torch.arange(each.numel(), device=each.device, dtype=torch.float32)
            each.grad = 1 + torch.sin(count + self.num_steps).view_as(each)
        self.optimizer.step(None)  # as accelerate calls it

    def tensors(self) -> list[torch.Tensor]:
        return [each.detach() for each in self.parameters.values()]

    def look(self) -> None:
        """What a checkpoint asks for must not change what follows."""
        if has_modes(self.optimizer):
            EvaluationWeights(self.parameters, self.optimizer).named_tensors()

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
