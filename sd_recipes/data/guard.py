"""Errors of `datasets` about a user's files, in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import datasets

from sd_recipes.errors import RecipeError, one_line
from sd_recipes.recipe import DataSource

T = TypeVar("T")


def guarded(source: DataSource, read: Callable[[], T]) -> T:
    """What `read`, a call of `datasets`, returns; its errors become a RecipeError about the source."""
    try:
        return read()
    except RecipeError:
        raise
    except StopIteration:  # raised where `datasets` looks at a file's first rows
        raise without_rows(source) from None
    # Whatever `datasets` raises while it reads a user's files is about those files. Its errors have no
    # common base class, so each is passed on in one line with its own words.
    except Exception as error:
        told: BaseException = error
        while isinstance(told, datasets.exceptions.DatasetGenerationError) and told.__cause__ is not None:
            told = told.__cause__  # the cause says what went wrong
        words = one_line(told, 500)
        if "Config name is missing" in words:
            names = words.partition("available configs: ")[2].partition("]")[0]
            raise RecipeError(
                f"{source.flag} has the configurations {names}]: name one by --dataset_config_name"
            ) from error
        raise RecipeError(f"{source.flag} cannot be read: {words}") from error


def without_rows(source: DataSource) -> RecipeError:
    return RecipeError(f"{source.flag} has a file without rows: remove it, or give a folder with rows")
