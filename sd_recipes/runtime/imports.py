"""Imports that take seconds, and what is left out of them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

BITSANDBYTES = "bitsandbytes"


def import_diffusers() -> None:
    """Import diffusers and peft as if bitsandbytes were absent.

    They would import it for quantized models, and it torch's compiler: 0.7 s of every start. Whoever asks for an 8-bit
    optimizer still imports it afterwards; models that bitsandbytes quantized cannot be loaded in this process. So only
    commands that train do this, and not those that load whatever pipeline they are given.
    """
    if BITSANDBYTES in sys.modules or "diffusers" in sys.modules:  # a script of one's own, which looked for it already
        return
    sys.modules[BITSANDBYTES] = None  # type: ignore[assignment]  # Python's way to say that a module is not there
    try:
        import diffusers.loaders.lora_base  # noqa: F401
    finally:
        del sys.modules[BITSANDBYTES]


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import within this context what brings torch and diffusers: a sixth faster.

    Python's search for garbage rests meanwhile, which would go over all that is being made again and again and find
    next to nothing. Nor does a later search go over what was imported: it stays until the process ends.
    """
    is_first = "diffusers" not in sys.modules and gc.isenabled()
    if is_first:
        gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
            gc.enable()
