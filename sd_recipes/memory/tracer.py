"""Follow the storages of code that runs on the meta device: how much of them lives at every moment, and what it is."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
META = torch.device("meta")
Result = TypeVar("Result")
ELEMENTWISE = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.silu.default, aten.silu_backward.default,
    aten.gelu.default, aten.gelu_backward.default,
}  # fmt: skip


@dataclass
class Moment:
    """What lives when a phase takes the most."""

    total: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)  # bytes


class Tracer(TorchDispatchMode):
    """Within this context every storage on `device` is counted from its first operation until it is freed.

    `moments` has the fullest moment of every phase, in bytes, each storage rounded up to `block` bytes as the device's
    allocator does. A storage is of the kind that is the innermost when it is made (`of_kind`), until it is `named`
    another. On the meta device it also stands in for what has no meta kernel: values that the host asks for are 1, and
    what is copied into the host's memory is empty there.
    """

    def __init__(self, device: torch.device = META, block: int = 1) -> None:
        super().__init__()
        self.device, self.block = device, block
        self.moments: dict[str, Moment] = {}
        self.current = 0
        self.by_kind: Counter[str] = Counter()
        self.kinds = ["other"]
        self.muted = False
        self._phase = Moment()
        # By the storage's address in C++, which it keeps while its Python object lives, which lives as long.
        self._live: dict[int, tuple[int, str, weakref.ref[Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._without_kernel(func, args, kwargs or {}) if self.device is META else NotImplemented
        if out is NotImplemented:
            out = func(*args, **kwargs or {})
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor):
                self._see(each)
            elif isinstance(each, (tuple, list)):
                self.see(each)
        return out

    def see(self, tensors: Iterable[Any]) -> None:
        """Count storages that were made before this context, or are of the kind that is now the innermost."""
        for each in tree_leaves(list(tensors)):
            if isinstance(each, Tensor):
                self._see(each)

    def name(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """From now on these are of that kind; those that are not known yet are counted."""
        with self.of_kind(kind):
            self.see(found := list(tensors))
        for each in found:
            if each.device.type != self.device.type:
                continue
            key = each.untyped_storage()._cdata
            size, old, reference = self._live[key]
            self._live[key] = size, kind, reference
            self.by_kind[old] -= size
            self.by_kind[kind] += size

    @contextmanager
    def of_kind(self, kind: str) -> Iterator[None]:
        """Within this context new storages are of that kind."""
        self.kinds.append(kind)
        try:
            yield
        finally:
            self.kinds.pop()

    def begin(self, phase: str, *, muted: bool = False) -> None:
        """A phase begins; it may have been there before. While it is `muted` only what it began with counts."""
        self.muted = False
        self._phase = self.moments.setdefault(phase, Moment())
        self._look()
        self.muted = muted

    def in_phase(self, phase: str, kind: str, work: Callable[..., Result]) -> Callable[..., Result]:
        """`work` as a phase of its own, in which storages are of that kind."""

        @wraps(work)
        def run(*args: Any, **kwargs: Any) -> Result:
            self.begin(phase)
            with self.of_kind(kind):
                return work(*args, **kwargs)

        return run

    def passing(self, nbytes: int) -> None:
        """A kernel takes that much beside its tensors while it runs."""
        self._look(nbytes)

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        kind = self.kinds[-1]
        self._live[key] = size, kind, weakref.ref(storage, lambda _: self._free(key))
        self.current += size
        self.by_kind[kind] += size
        self._look()

    def _free(self, key: int) -> None:
        size, kind, _ = self._live.pop(key)
        self.current -= size
        self.by_kind[kind] -= size

    def _look(self, passing: int = 0) -> None:
        if self.muted or self.current + passing <= self._phase.total:
            return
        self._phase.total = self.current + passing
        self._phase.by_kind = self.by_kind.copy()
        if passing:
            self._phase.by_kind["workspace"] += passing

    def _without_kernel(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operation that meta tensors do not have; NotImplemented if they have it."""
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten._to_copy.default and args[0].is_meta and kwargs.get("device", META).type == "cpu":
            return torch.empty_like(args[0], dtype=kwargs.get("dtype"), device="cpu")
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]
        if func.namespace == "bitsandbytes":  # its optimizers work in place
            return None
        # Torch's own meta kernels of the following take half of a trace's time.
        name = func._schema.name
        if name.startswith("aten::_foreach_") and name.endswith("_") and args[0][0].is_meta:
            return None
        if func is aten.linalg_vector_norm.default and len(args) < 3 and args[0].is_meta:
            return args[0].new_empty(())
        if func in ELEMENTWISE and args[0].is_meta:
            first, second = args[0], args[1] if len(args) > 1 else args[0]
            if isinstance(second, Tensor) and first.dtype == second.dtype and first.shape == second.shape:
                return torch.empty_like(first)
        return NotImplemented
