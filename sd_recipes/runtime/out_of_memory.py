"""Work that is done in smaller parts when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from sd_recipes.errors import one_line

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The others have no class of their own, such as cuBLAS's when it cannot allocate its workspace.
    return isinstance(error, RuntimeError) and (
        should_reduce_batch_size(error) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
    )


def tell_out_of_memory(what: str, error: Exception) -> None:
    logger.warning("No memory for %s: training continues. %s", what, one_line(error, 200))


@dataclass
class AtOnce:
    """How many samples `what` takes at once: half as many after each out-of-memory error, and finally none."""

    number: int
    what: str

    def attempt(self, work: Callable[[int], Result]) -> Result | None:
        """What `work(number)` returns; None, then and from then on, if there is no memory even for one."""
        while self.number:
            try:
                return work(self.number)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                words = one_line(error, 200)
            # The error is gone by now, and with its traceback whatever the frames in it held.
            clear_device_cache(garbage_collection=True)
            told = f"{self.what}: no memory for {self.number} at once ({words})"
            self.number //= 2
            if self.number:
                logger.warning("%s: trying %d.", told, self.number)
            else:
                logger.warning("%s: left out from now on. Training continues.", told)
        return None
