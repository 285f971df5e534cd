"""Room in host memory for many tensors, pinned for a GPU; and a number on its way from a device to the host.

torch rounds a pinned buffer up to a power of two: 3.2 GiB of weights, one buffer each, take 3.9. Here they share blocks
whose sizes are powers of two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

BLOCK_BYTES = 64 * 2**20
ALIGNMENT = 256  # bytes: that of a GPU's own buffers


def nbytes_of(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last, aligned."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    nbytes = (last + 1) * tensor.itemsize if tensor.numel() else 0
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass
class Block:
    """Where some of a sequence of tensors lie in a piece of memory."""

    places: dict[int, int]  # a tensor's number, and the byte at which it begins
    nbytes: int  # of the piece, a power of two

    def views(self, memory: torch.Tensor, like: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """The tensors in `memory`, (nbytes,) uint8, by their numbers, laid out and typed as those in `like`."""
        found: dict[int, torch.Tensor] = {}
        for number, start in self.places.items():
            tensor = like[number]
            flat = memory[start : start + nbytes_of(tensor)].view(tensor.dtype)
            found[number] = flat.as_strided(tensor.size(), tensor.stride())
        return found


def packed(sizes: Sequence[int], block_bytes: int = BLOCK_BYTES) -> list[Block]:
    """Blocks of at most `block_bytes`, or of one larger tensor, for tensors of these aligned sizes in bytes.

    The largest first, each in the first block that has room for it.
    """
    if not sizes:
        return []
    capacity = max(block_bytes, power_of_two(max(sizes)))
    blocks: list[Block] = []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        block = next((each for each in blocks if each.nbytes + sizes[number] <= capacity), None)
        if block is None:
            blocks.append(block := Block({}, 0))
        block.places[number] = block.nbytes
        block.nbytes += sizes[number]
    for block in blocks:
        block.nbytes = power_of_two(block.nbytes)
    return blocks


def pinned_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A tensor in the host's memory, in pinned memory if the other one is: copies to a GPU then do not block."""
    return tensor.pin_memory() if other.is_pinned() else tensor


class OnItsWay:
    """A number on its way from a device to the host, which may do other things meanwhile."""

    def __init__(self, number: torch.Tensor) -> None:
        """`number` is a tensor of one element."""
        self._number = number
        self._is_there: torch.cuda.Event | None = None
        if number.device.type == "cuda":
            self._number = torch.empty_like(number, device="cpu", pin_memory=True).copy_(number, non_blocking=True)
            self._is_there = torch.cuda.Event()
            self._is_there.record()

    def value(self) -> float:
        """The number. The host waits for what leads to it, and not for what the device was given to do since."""
        if self._is_there:
            self._is_there.synchronize()
        return self._number.item()


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def allocate(block: Block, *, pinned: bool) -> torch.Tensor:
    """A block's memory, (nbytes,) uint8, of zeros: touched, since first touching a page takes longer than a copy."""
    return torch.empty(block.nbytes, dtype=torch.uint8, pin_memory=pinned).zero_()


def buffers_like(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """A buffer in host memory for each tensor, of its size, strides and type; pinned for those on a GPU."""
    listed = list(tensors)
    buffers: dict[int, torch.Tensor] = {}
    for pinned in (False, True):
        numbers = [number for number, each in enumerate(listed) if (each.device.type == "cuda") == pinned]
        some = [listed[number] for number in numbers]
        for block in packed([nbytes_of(each) for each in some]):
            views = block.views(allocate(block, pinned=pinned), some)
            buffers |= {numbers[number]: view for number, view in views.items()}
    return [buffers[number] for number in range(len(listed))]
