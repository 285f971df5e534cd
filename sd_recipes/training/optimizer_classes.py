"""Which class an optimizer's name stands for, and what of it can be known before anything is trained."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sd_recipes.errors import RecipeError, nearest, one_line
from sd_recipes.optimizers import PRODIGY, SCHEDULE_FREE, is_class
from sd_recipes.recipe import OptimConfig
from sd_recipes.training.adafactor import Adafactor
from sd_recipes.training.optimizer_state import GIVEN, constructors
from sd_recipes.training.schedule_free import begin_training

FAILURES = (Exception, SystemExit)  # whatever code of others raises, but not where the user interrupts it


@dataclass(frozen=True)
class OptimizerClass:
    """An optimizer's class, and what its constructor gets besides parameters and learning rate."""

    flag: str  # how messages name it
    make: type[torch.optim.Optimizer]
    settings: Mapping[str, Any]

    def __call__(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        """The optimizer of groups of parameters, ready to train. Raises RecipeError if it refuses them."""
        make: Any = self.make
        try:
            optimizer: torch.optim.Optimizer = make(groups, lr=lr, **self.settings)
            begin_training(optimizer)
        except FAILURES as error:
            raise RecipeError(
                f"{self.flag} refuses what it is given ({type(error).__name__}: {one_line(error, 200)}): change "
                "--optimizer_kwargs, or use another optimizer"
            ) from error
        return optimizer


def optimizer_class(config: OptimConfig, device: torch.device, fused: bool | None) -> OptimizerClass:
    """The class that --optimizer names on that device, with its settings. Raises RecipeError.

    `fused` asks for AdamW's single kernel, None for whatever torch takes.
    """
    flag = "--use_8bit_adam" if config.use_8bit_adam else f"--optimizer {config.optimizer}"
    make, settings = _class_and_settings(config, device, fused, flag)
    kwargs = config.optimizer_kwargs or {}
    _check_taken(flag, make, kwargs)
    # YAML has no tuples, which some constructors ask for.
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in kwargs.items()}
    return OptimizerClass(flag, make, {**settings, **given})


def _class_and_settings(
    config: OptimConfig, device: torch.device, fused: bool | None, flag: str
) -> tuple[Any, dict[str, Any]]:
    decay = {"weight_decay": config.adam_weight_decay}
    adam = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon, **decay}
    name = config.optimizer
    if is_class(name):
        return _imported(name), {}
    if name == "adamw":
        return torch.optim.AdamW, {"fused": fused, **adam}
    if name == "sgd":
        return torch.optim.SGD, {"momentum": config.sgd_momentum, **decay}
    if name == "adafactor":
        return Adafactor, decay
    if name == PRODIGY:
        try:
            from sd_recipes.training.prodigy import Prodigy
        except ImportError as error:
            raise _not_installed(flag, "prodigyopt", "optimizers") from error
        # As its authors recommend for diffusion models.
        return Prodigy, {"use_bias_correction": True, "safeguard_warmup": True, **adam}
    if name == SCHEDULE_FREE:
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError as error:
            raise _not_installed(flag, "schedulefree", "optimizers") from error
        return AdamWScheduleFree, adam
    try:
        from sd_recipes.training import eight_bit
    except ImportError as error:
        raise _not_installed(flag, "bitsandbytes", "bitsandbytes") from error
    if name.startswith("lion"):
        return eight_bit.Lion8bit if name == "lion8bit" else eight_bit.Lion, decay
    paged = name == "paged_adamw8bit" and device.type == "cuda"
    return eight_bit.PagedAdamW8bit if paged else eight_bit.AdamW8bit, adam


def _not_installed(flag: str, package: str, extra: str) -> RecipeError:
    return RecipeError(f"{flag} needs {package}: pip install 'sd-recipes[{extra}]', or drop the flag")


def _imported(name: str) -> type[torch.optim.Optimizer]:
    """A class by its dotted name, of a package that is installed. Raises RecipeError."""
    module_name, _, class_name = name.rpartition(".")
    place = f"--optimizer {name}"
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, class_name, None)  # which may import, too
    except FAILURES as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise RecipeError(
                f"{place}: no module {missing} is installed here: install the package that has it, or correct the name"
            ) from error
        raise RecipeError(
            f"{place}: {module_name} cannot be imported ({type(error).__name__}: {one_line(error, 200)}): mend its "
            "installation, or use another optimizer"
        ) from error
    there = {key: each for key, each in vars(module).items() if _is_optimizer(each)}
    if not _is_optimizer(found):
        what = "is no class of an optimizer" if found is not None else "does not exist"
        raise RecipeError(
            f"{place} {what}{nearest(class_name, there)}: {module_name} has {', '.join(sorted(there)) or 'none'}"
        )
    assert found is not None
    return found


def _is_optimizer(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer


def _check_taken(flag: str, make: type, kwargs: Mapping[str, Any]) -> None:
    """Raises RecipeError for settings that an optimizer's constructor does not take."""
    taken: set[str] = set()
    for parameters in constructors(make):
        taken |= {each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break  # it hands nothing on that it does not name
    if "lr" not in taken:
        raise RecipeError(f"{flag} takes no learning rate as lr, which schedules change: use another optimizer")
    for name in kwargs:
        if name not in taken:
            known = sorted(taken - GIVEN)
            raise RecipeError(
                f"--optimizer_kwargs {name}: {flag} takes no such setting{nearest(name, known)}: it takes "
                f"{', '.join(known)}"
            )
