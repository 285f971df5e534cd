"""What a start does without, in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, sys
from sd_recipes.runtime.imports import heavy_imports, import_diffusers
with heavy_imports():
    collects_within = gc.isenabled()
    import_diffusers()
    import sd_recipes.commands.train
print(collects_within, gc.isenabled(), gc.get_freeze_count() > 100_000)
print(sorted(name for name in ("bitsandbytes", "torch._inductor.compile_fx", "matplotlib") if name in sys.modules))
from sd_recipes.training import eight_bit
import torch
weight = torch.nn.Parameter(torch.ones(4096))
weight.grad = torch.ones(4096)
eight_bit.AdamW8bit([weight], lr=0.5).step()
print(float(weight.max()) < 1)
"""


def test_bitsandbytes_and_the_compiler_are_imported_only_by_who_needs_them_and_garbage_is_not_sought() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["False True True", "[]", "True"], done.stderr
