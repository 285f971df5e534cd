"""Prodigy, which finds the learning rate by itself (Mishchenko and Defazio 2023, "Prodigy"), by prodigyopt."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import prodigyopt


class Prodigy(prodigyopt.Prodigy):
    """prodigyopt's own prints a line when it is made, on every process."""

    def __init__(self, params: Any, lr: float, **settings: Any) -> None:
        with redirect_stdout(StringIO()):
            super().__init__(params, lr=lr, **settings)
