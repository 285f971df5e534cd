"""What a start does without, in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from sd_recipes.runtime.imports import import_diffusers
import_diffusers()
import sd_recipes.commands.train
print(sorted(name for name in ("bitsandbytes", "torch._inductor.compile_fx", "matplotlib") if name in sys.modules))
from sd_recipes.training import eight_bit
import torch
weight = torch.nn.Parameter(torch.ones(4096))
weight.grad = torch.ones(4096)
eight_bit.AdamW8bit([weight], lr=0.5).step()
print(float(weight.max()) < 1)
"""


def test_bitsandbytes_and_the_compiler_are_imported_only_by_who_needs_them() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.split() == ["[]", "True"], done.stderr
