"""The optimizer's step inside the backward pass: each gradient is used and freed as soon as it is there."""

from __future__ import annotations

from functools import partial

import torch

from sd_recipes.errors import RecipeError
from sd_recipes.training.bf16_weights import Bf16Weights
from sd_recipes.training.param_groups import only


def check_fused_backward(num_processes: int, mixed_precision: str, num_micro_batches: int) -> None:
    """Raises RecipeError if a step's gradients are sums that are not complete within one backward pass."""
    way_out = "or drop --fused_backward_pass"
    if num_micro_batches > 1:
        raise RecipeError(
            f"--fused_backward_pass steps within each backward pass, and a global batch takes {num_micro_batches} of "
            f"them: use --gradient_accumulation_steps 1, and for a resumed run its --train_batch_size, {way_out}"
        )
    if num_processes > 1:
        raise RecipeError(
            f"--fused_backward_pass steps before processes have exchanged their gradients, and there are "
            f"{num_processes}: train on one process, {way_out}"
        )
    if mixed_precision == "fp16":
        raise RecipeError(
            "--fused_backward_pass steps before fp16's loss scaler knows whether to skip the step: use "
            f"--mixed_precision bf16 or no, {way_out}"
        )


class FusedBackward:
    """Lets `optimizer` step each parameter in the backward pass, which has to be that of a whole step.

    Where a parameter's gradient is not finite it counts as 0, so that the weights stay finite: momentum and weight
    decay still move the parameter. Whether that was so is known only afterwards, from the norm.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.norms: list[torch.Tensor] = []  # of each gradient, before it was changed
        stands_for = optimizer.stands_for if isinstance(optimizer, Bf16Weights) else {}
        for number, group in enumerate(optimizer.param_groups):
            for each in group["params"]:
                stands_for.get(each, each).register_post_accumulate_grad_hook(partial(self._step, number, each))

    def _step(self, number: int, optimized: torch.Tensor, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self.norms.append(norm)
        # Decided on the device, for which the host does not wait.
        parameter.grad = torch.where(norm.isfinite(), parameter.grad, 0)
        with only(self.optimizer, number, [optimized]):
            self.optimizer.step()
        parameter.grad = None

    def grad_norm(self) -> torch.Tensor:
        """The norm of the last step's gradients, () float32 on the device; not finite if one of them was not."""
        norm = torch.linalg.vector_norm(torch.stack(self.norms))
        self.norms.clear()
        return norm
