"""Averages in pinned host memory, which visit the GPU in pieces, on a stream of their own beside the next step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sd_recipes.runtime.host_memory import allocate, nbytes_of, packed

# Of averages on the device, and of the parameters that they follow.
Update = Callable[[list[torch.Tensor], list[torch.Tensor]], None]


class HostTensors:
    """Copies of tensors on a GPU, float32, once in pinned host memory.

    An update takes one block after the other to the device and back, in the order of a side stream, through one block
    on the device. It begins when what was queued before it is done, such as the optimizer's step, and runs while the
    next step does. The parameters must not change meanwhile: `release` lets the device wait, `wait` the host.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self.parameters, self.device = parameters, parameters[0].device
        wide = [torch.empty_strided(each.size(), each.stride(), device="meta") for each in parameters]
        self.blocks = packed([nbytes_of(each) for each in wide])
        self.memory = [allocate(block, pinned=True) for block in self.blocks]
        visitor = torch.empty(max(block.nbytes for block in self.blocks), dtype=torch.uint8, device=self.device)
        self.visitors = [visitor[: block.nbytes] for block in self.blocks]
        self.views = [block.views(each, wide) for block, each in zip(self.blocks, self.visitors, strict=True)]
        self.stream, self.done = torch.cuda.Stream(self.device), torch.cuda.Event()
        found: dict[int, torch.Tensor] = {}
        for block, memory in zip(self.blocks, self.memory, strict=True):
            found |= block.views(memory, wide)
        self.tensors = [found[number] for number in range(len(parameters))]
        for tensor, parameter in zip(self.tensors, parameters, strict=True):
            tensor.copy_(parameter.detach())

    def update(self, update: Update) -> None:
        """Queue an update of all, of which the host waits for nothing."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for memory, visitor, views in zip(self.memory, self.visitors, self.views, strict=True):
                visitor.copy_(memory, non_blocking=True)
                update(list(views.values()), [self.parameters[number] for number in views])
                memory.copy_(visitor, non_blocking=True)
            self.done.record()

    def release(self) -> None:
        """Let what is queued on the device from here on wait until the updates are done: it may change parameters."""
        torch.cuda.current_stream(self.device).wait_event(self.done)

    def wait(self) -> None:
        """Let the host wait until the updates are done, and the tensors in its memory are theirs."""
        self.done.synchronize()
