"""Gradients summed over the processes while the backward pass still runs, in the place of DistributedDataParallel.

DDP would wait for ever where memory ends in one process's backward pass: the others' all-reduces lack a partner. Here
the one that failed joins those that are left, with whatever lies in its memory; the processes then agree that the step
failed, and drop the sums. There are no copies of the gradients beside them either, as DDP's buckets are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import _coalescing_manager

from sd_recipes.runtime.agreement import all_gather

BUCKET_BYTES = 25 * 2**20  # of gradients that are summed at once, as in DDP
IN_FLIGHT = 2  # buckets that gloo sums at a time, each from a buffer of its own


@dataclass
class Bucket:
    """Parameters whose gradients, of one type, are summed at once."""

    parameters: list[torch.nn.Parameter]
    num_missing: int = 0  # gradients that are not ready yet

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters)


class GradientExchange:
    """Sums the gradients of parameters over all processes, which have to call each of its methods alike.

    A step is `begin`, a backward pass for each micro-batch, before the last of which `is_last` is set, and `finish`. In
    the last one, a bucket of gradients is sent off as soon as all of them are ready, in the same order on all
    processes. That order is the one in which gradients became ready there in the first step, whose sums therefore are
    `set_up` after its backward pass. Gradients that only earlier micro-batches have come last.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], *, is_needed: bool) -> None:
        """All processes get the first one's values. Without being needed, it does nothing."""
        self.is_last = False
        self.is_set_up, self._is_needed = not is_needed, is_needed
        self._parameters = list(parameters)
        self._ready: list[int] = []  # numbers of the parameters, in the order of their gradients
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[int, Bucket] = {}
        self._num_sent = 0
        self._running: deque[tuple[Bucket, Tensor | None, Any]] = deque()  # with its buffer
        self._buffers: list[Tensor] = []
        if not is_needed:
            return
        # NCCL sums many tensors in one launch, where they lie. gloo would be called for each: they are put together.
        self._sums_in_place = self._parameters[0].device.type == "cuda"
        for number, parameter in enumerate(self._parameters):
            distributed.broadcast(memory(parameter.detach()), src=0)
            parameter.register_post_accumulate_grad_hook(partial(self._note_ready, number))

    def settle_anew(self) -> None:
        """From the next step on, other parameters have gradients: those that none has must be left alone."""
        self._buckets, self.is_set_up = [], not self._is_needed

    def begin(self) -> None:
        """Before the first backward pass of a step, or of another try at it."""
        self.is_last, self._num_sent = False, 0
        self._ready.clear()
        for bucket in self._buckets:
            bucket.num_missing = len(bucket.parameters)

    def finish(self, *, failed: bool) -> None:
        """Send off what the backward passes left, and wait; on a GPU its stream waits, and not the host.

        If they `failed` in any process, the sums are worth nothing.
        """
        while self._num_sent < len(self._buckets):
            self._send(failed=failed)
        while self._running:
            self._take(failed=failed)

    def set_up(self) -> None:
        """After the first step's backward passes, which did not fail in any process: settle the order, and sum up."""
        # What no process has met has no gradient, and the optimizer leaves it alone.
        met = [number for number, parameter in enumerate(self._parameters) if parameter.grad is not None]
        order = list(dict.fromkeys(chain(*all_gather([*self._ready, *met]))))
        self._buckets = in_buckets([self._parameters[number] for number in order])
        of_parameter = {id(parameter): bucket for bucket in self._buckets for parameter in bucket.parameters}
        self._bucket_of = {number: of_parameter[id(self._parameters[number])] for number in order}
        size, device = max(bucket.nbytes for bucket in self._buckets), self._parameters[0].device
        # Where sums are made in place, one for a process whose memory has run out: what it adds is worth nothing.
        number = 1 if self._sums_in_place else IN_FLIGHT
        self._buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(number)]
        self.is_set_up = True
        self.finish(failed=False)

    def _note_ready(self, number: int, parameter: Tensor) -> None:
        """A parameter has its gradient of this backward pass."""
        if not self.is_last:
            return
        if not self.is_set_up:
            self._ready.append(number)
            return
        self._bucket_of[number].num_missing -= 1
        while self._num_sent < len(self._buckets) and self._buckets[self._num_sent].num_missing == 0:
            self._send(failed=False)

    def _send(self, *, failed: bool) -> None:
        """Begin to sum up the next bucket."""
        bucket = self._buckets[self._num_sent]
        if self._sums_in_place:
            buffer = None
            if failed:  # its gradients may not be there, nor memory for others
                gradients = views(bucket, self._buffers[0])
            else:
                gradients = [memory(gradient_of(each)) for each in bucket.parameters]
            with _coalescing_manager(async_ops=True) as work:
                for gradient in gradients:
                    distributed.all_reduce(gradient)
        else:
            if len(self._running) == IN_FLIGHT:
                self._take(failed=failed)
            buffer = self._buffers[self._num_sent % IN_FLIGHT]
            if not failed:
                for view, parameter in zip(views(bucket, buffer), bucket.parameters, strict=True):
                    view.copy_(memory(gradient_of(parameter)))
            whole = buffer[: bucket.nbytes].view(bucket.parameters[0].dtype)
            work = distributed.all_reduce(whole, async_op=True)
        self._running.append((bucket, buffer, work))
        self._num_sent += 1

    def _take(self, *, failed: bool) -> None:
        """Wait for the bucket that was sent off first; its gradients then are the sums."""
        bucket, buffer, work = self._running.popleft()
        work.wait()
        if buffer is not None and not failed:
            for view, parameter in zip(views(bucket, buffer), bucket.parameters, strict=True):
                memory(gradient_of(parameter)).copy_(view)


def in_buckets(parameters: Sequence[torch.nn.Parameter]) -> list[Bucket]:
    """The parameters in this order, in buckets of one type and of about `BUCKET_BYTES`."""
    buckets: list[Bucket] = []
    for parameter in parameters:
        last = buckets[-1] if buckets else None
        if last is None or last.parameters[0].dtype != parameter.dtype or last.nbytes >= BUCKET_BYTES:
            buckets.append(last := Bucket([]))
        last.parameters.append(parameter)
    return buckets


def gradient_of(parameter: torch.nn.Parameter) -> Tensor:
    """Zeros if this process had none and another may have one."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def memory(tensor: Tensor) -> Tensor:
    """A dense tensor's values in the order in which they lie in memory, (N,): gradients lie as their parameters do."""
    return tensor.as_strided((tensor.numel(),), (1,))


def views(bucket: Bucket, buffer: Tensor) -> list[Tensor]:
    """A bucket's gradients in a buffer of bytes, (N,) each."""
    whole = buffer[: bucket.nbytes].view(bucket.parameters[0].dtype)
    return list(whole.split([parameter.numel() for parameter in bucket.parameters]))
