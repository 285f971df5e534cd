"""What a device does that the meta device does not: autocast, and attention without its matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from sd_recipes.memory.tracer import META, Tracer

ROUNDED = "rounded weights"

# Functions by their names in torch and torch.nn.functional. Autocast runs the first in its type, on every device, and
# on a GPU the second in float32 (torch 2.13, aten/src/ATen/autocast_mode.h); the CPU's float32 list has none that the
# models here use.
ROUNDING = {
    "addbmm", "addmm", "baddbmm", "bmm", "chain_matmul", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d", "einsum", "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "mv",
    "prelu", "scaled_dot_product_attention",
}  # fmt: skip
IN_FLOAT32 = {
    "cuda": {
        "acos", "asin", "binary_cross_entropy_with_logits", "cosh", "cosine_embedding_loss", "cosine_similarity",
        "cumprod", "cumsum", "erfinv", "exp", "expm1", "group_norm", "huber_loss", "interpolate", "kl_div", "l1_loss",
        "layer_norm", "log", "log10", "log1p", "log2", "log_softmax", "logsumexp", "mse_loss", "nll_loss", "norm",
        "pow", "__pow__", "prod", "reciprocal", "renorm", "rms_norm", "rsqrt", "sinh", "smooth_l1_loss", "softmax",
        "softplus", "tan",
    },
    "cpu": set(),
}  # fmt: skip


class Kernels(TorchFunctionMode):
    """Within this context functions on the meta device take the types and the memory that they take on `device`.

    Where `torch.autocast("cpu")` is on, so is this autocast: gradient checkpointing turns that on again to recompute.
    """

    def __init__(self, tracer: Tracer, device: str) -> None:
        super().__init__()
        self.tracer = tracer
        self.in_float32 = IN_FLOAT32[device]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (name in ROUNDING or name in self.in_float32) and torch.is_autocast_enabled("cpu"):
            cast = self._round if name in ROUNDING else _to_float32
            args, kwargs = tree_map(cast, (args, kwargs))
        if name == "scaled_dot_product_attention" and args[0].is_meta:
            return self._attention(*args, **kwargs)
        if name == "randint" and kwargs.get("device") == META:
            kwargs.pop("generator", None)  # it has none
        return func(*args, **kwargs)

    def _round(self, value: Any) -> Any:
        dtype = torch.get_autocast_dtype("cpu")
        if not isinstance(value, Tensor) or not value.is_meta or not value.is_floating_point() or value.dtype == dtype:
            return value
        is_weight = value.requires_grad and value.is_leaf  # autocast keeps no copies: runtime/accelerator.py
        with self.tracer.of_kind(ROUNDED if is_weight else self.tracer.kinds[-1]):
            return value.to(dtype)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
    ) -> Tensor:
        """Of (B, H, L, D): (B, H, L, D), without the (L, L) matrix, which no device's own kernel keeps."""
        found: Tensor = Attention.apply(query, key, value, self.tracer)
        return found


def _to_float32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_meta and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


class Attention(torch.autograd.Function):
    """What flash, memory-efficient and cuDNN's attention keep: inputs, output, and a float32 a row (logsumexp)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tracer: Tracer) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        ctx.tracer = tracer
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        gradients = [torch.empty_like(each) for each in (query, key, value)]
        # Of the query's gradient in float32; on an H100 it measured 1.5 times that.
        ctx.tracer.passing(6 * query.numel())
        return *gradients, None
