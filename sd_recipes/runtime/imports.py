"""What diffusers imports for things that are not done here."""

from __future__ import annotations

import sys

BITSANDBYTES = "bitsandbytes"


def import_diffusers() -> None:
    """Import diffusers and peft as if bitsandbytes were absent.

    They would import it for quantized models, and it torch's compiler: 0.7 s of every start. Whoever asks for an 8-bit
    optimizer still imports it afterwards; models that bitsandbytes quantized cannot be loaded in this process.
    """
    if BITSANDBYTES in sys.modules or "diffusers" in sys.modules:  # a script of one's own, which looked for it already
        return
    sys.modules[BITSANDBYTES] = None  # type: ignore[assignment]  # Python's way to say that a module is not there
    try:
        import diffusers.loaders.lora_base  # noqa: F401
    finally:
        del sys.modules[BITSANDBYTES]
