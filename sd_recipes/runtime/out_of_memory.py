"""What to do when memory runs out: notice it, free what the failed work held, and do less at once."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import distributed

from sd_recipes.errors import one_line

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Of errors that have no class of their own, besides those that accelerate knows (CUDA's, MPS's, the CPU allocator's):
# when cuBLAS or cuDNN cannot allocate a workspace or, for want of memory, a handle; the driver's; those of oneDNN, by
# which CPUs convolve; and C++'s.
WORDS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDA error: out of memory",
    "could not create a primitive",
    "could not create a memory",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory; not in an exchange between processes, which cannot go on."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError) or isinstance(error, distributed.DistError):
        return False
    return should_reduce_batch_size(error) or any(words in str(error) for words in WORDS)


def attempt(work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """What `work()` returned, and no words; or nothing, and the error's words, if memory ran out.

    All that the failed work held is free by then, if nobody else holds it.
    """
    try:
        return work(), None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        words = one_line(error, 200)
    # The error is gone by now, and with its traceback whatever the frames in it held.
    clear_device_cache(garbage_collection=True)
    return None, words


def once_more(what: str, work: Callable[[], Result], is_undone: Callable[[], bool]) -> Result:
    """What `work()` returns. If memory runs out, it is done once more with the cache emptied, where that is safe.

    Raises the error of the first time if the work then is not undone: if it has changed something.
    """
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error) or not is_undone():
            raise
        words = one_line(error, 200)
    clear_device_cache(garbage_collection=True)
    logger.warning("No memory for %s (%s): it is tried once more, with the cache emptied.", what, words)
    return work()


def done_once(what: str, work: Callable[[], Result], is_undone: Callable[[], bool]) -> Result:
    """Like `once_more`, where it is never safe."""
    return work()


def unchanged(tensors: Callable[[], Iterable[torch.Tensor]]) -> Callable[[], bool]:
    """Whether nothing has changed tensors since this call. Fused optimizers do so without a trace."""
    before = [times_changed(tensor) for tensor in tensors()]
    return lambda: [times_changed(tensor) for tensor in tensors()] == before


def times_changed(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place, as autograd counts it."""
    return tensor._version


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
            result, words = attempt(lambda: work(self.number))
            if words is None:
                return result
            told = f"{self.what}: no memory for {self.number} at once ({words})"
            self.number //= 2
            if self.number:
                logger.warning("%s: trying %d.", told, self.number)
            else:
                logger.warning("%s: left out from now on.", told)
        return None
