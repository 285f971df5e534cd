"""Optimizers by name, and how their settings are written; without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

from sd_recipes.errors import nearest

PRODIGY, SCHEDULE_FREE = "prodigy", "schedule_free_adamw"
EIGHT_BIT_ADAMW = ("adamw8bit", "paged_adamw8bit")
OF_BITSANDBYTES = (*EIGHT_BIT_ADAMW, "lion", "lion8bit")
OPTIMIZERS = ("adamw", *OF_BITSANDBYTES, "sgd", "adafactor", PRODIGY, SCHEDULE_FREE)
# A class of an installed package, by its dotted name.
CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
ADAM_FLAGS = ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
# What is given by flags of its own, whatever the optimizer.
BY_FLAGS = {"lr": "--learning_rate", "params": "--param_groups"}


def is_class(optimizer: str) -> bool:
    """Whether an optimizer is given by its class, not by one of our names."""
    return optimizer not in OPTIMIZERS


def check_name(optimizer: str) -> str:
    """The name, if it is one of ours or may be a class's. Raises ValueError."""
    if is_class(optimizer) and not CLASS.fullmatch(optimizer):
        raise ValueError(
            f"there is no such optimizer{nearest(optimizer, OPTIMIZERS)}: give one of {', '.join(OPTIMIZERS)}, or a "
            "class such as torch.optim.RAdam"
        )
    return optimizer


def unread_flags(optimizer: str) -> Iterable[str]:
    """Flags of other optimizers, to which this one does not listen."""
    if is_class(optimizer):
        return (*ADAM_FLAGS, "sgd_momentum")
    if optimizer.startswith("lion"):
        return ("adam_beta1", "adam_beta2", "adam_epsilon", "sgd_momentum")
    # Those that were always there ignore each other's.
    return ("sgd_momentum",) if optimizer in (PRODIGY, SCHEDULE_FREE) else ()


def steps_one_by_one(optimizer: str) -> bool:
    """Whether a parameter's step depends on nothing but its own state, as far as the name tells."""
    return not is_class(optimizer) and optimizer not in (PRODIGY, SCHEDULE_FREE)


def read_kwargs(value: Any) -> Any:
    """A mapping from the command line's `name=value` words; a value is read as in YAML, 1e-5 and None too.

    Raises ValueError.
    """
    if not isinstance(value, list):
        return value
    kwargs: dict[str, Any] = {}
    for word in value:
        name, equals, text = str(word).partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"give NAME=VALUE, such as d_coef=0.5 or betas=0.9,0.99, not {word}")
        if name in kwargs:
            raise ValueError(f"{name} is given twice: drop one")
        if text.startswith("(") and text.endswith(")"):  # as Python writes a tuple
            text = text[1:-1]
        is_list = "," in text and text[0] not in "[{"
        kwargs[name] = [_value(each) for each in text.rstrip(", ").split(",")] if is_list else _value(text)
    return kwargs


def _value(text: str) -> Any:
    if text == "None":
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):  # YAML 1.1 takes 1e-5 for text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def check_kwargs(kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    """The mapping, if each setting may be given by it. Raises ValueError."""
    for name in kwargs or {}:
        if name in BY_FLAGS:
            raise ValueError(f"{name} is given by {BY_FLAGS[name]}: drop it here")
    return kwargs


def read_param_groups(value: Any) -> Any:
    """Groups from the command line's `PATTERN=RATE` words. Raises ValueError."""
    if not isinstance(value, list):
        return value
    return [_group(each) if isinstance(each, str) else each for each in value]


def _group(word: str) -> dict[str, str]:
    pattern, equals, rate = word.rpartition("=")
    if not equals or not pattern:
        raise ValueError(f"give PATTERN=RATE, such as '*.attn2.*=1e-5', not {word}")
    return {"pattern": pattern, "learning_rate": rate}
