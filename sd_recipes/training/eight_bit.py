"""bitsandbytes' optimizers: AdamW with a state of 8 bits (Dettmers et al. 2022), on a GPU also in pages; and Lion.

Paged state is the driver's managed memory: it moves to the host, and back when it is used, as room on the GPU asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit


class WithoutWaiting(Optimizer8bit):
    """bitsandbytes' own step waits for the GPU after every parameter, which only a paged state needs."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, of all parameters that have a gradient."""
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, number, place)
                self.update_step(group, parameter, number, place)


class AdamW8bit(WithoutWaiting, bitsandbytes.optim.AdamW8bit):
    """AdamW with both moments in 8 bits."""


class Lion(WithoutWaiting, bitsandbytes.optim.Lion):
    """Lion, whose only state is a momentum (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms")."""


class Lion8bit(WithoutWaiting, bitsandbytes.optim.Lion8bit):
    """Lion with its momentum in 8 bits."""


class PagedAdamW8bit(bitsandbytes.optim.PagedAdamW8bit):
    """bitsandbytes' own loads a state to the device, where it would stay for the rest of a resumed run."""

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
        """Restore what `state_dict` returned, into pages."""
        super().load_state_dict(state_dict, move_to_device)
        for parameter, state in self.state.items():
            for name in ("state1", "state2"):
                if name in state:
                    # A tensor of the host, which the device fills with zeros first.
                    paged = self.get_state_buffer(state[name], dtype=state[name].dtype)
                    torch.cuda.synchronize(parameter.device)
                    state[name] = paged.copy_(state[name])
