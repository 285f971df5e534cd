"""What the tracer counts, and the kernels that it stands in for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sd_recipes.memory.kernels import IN_FLOAT32, ROUNDED, ROUNDING, Kernels
from sd_recipes.memory.tracer import META, Tracer


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def test_storages_count_once_until_they_are_freed() -> None:
    tracer = Tracer()
    with tracer:
        tracer.begin("one")
        values = meta(256) + 1
        view = values.view(16, 16).t()
        assert tracer.current == 1024
        more = view * 2
        assert tracer.current == 2048
        del values
        assert tracer.current == 2048, "the view holds it"
        del view
        assert tracer.current == 1024
        tracer.begin("two")
        assert (tracer.moments["one"].total, tracer.moments["two"].total) == (2048, 1024)
        del more
    assert tracer.current == 0


def test_sizes_are_rounded_up_as_the_allocator_does() -> None:
    tracer = Tracer(block=512)
    with tracer:
        found = meta(3) * 2
        assert tracer.current == 512
        del found


def test_what_is_named_is_of_that_kind_from_then_on() -> None:
    tracer = Tracer()
    with tracer:
        tracer.begin("phase")
        with tracer.of_kind("activations"):
            found = meta(256)
        tracer.name("gradients", [found])
        again = meta(256)
        moment = tracer.moments["phase"]
        assert {kind: size for kind, size in moment.by_kind.items() if size} == {"gradients": 1024, "other": 1024}
        del again


def test_a_kernel_that_works_in_place_leaves_no_trace() -> None:
    tracer = Tracer()
    with tracer:
        tracer.begin("optimizer", muted=True)
        found = meta(256) * 2
        del found
        tracer.begin("optimizer")
        tracer.passing(100)
    assert tracer.moments["optimizer"].total == 100
    assert tracer.moments["optimizer"].by_kind["workspace"] == 100


def test_the_host_gets_ones_and_empty_copies() -> None:
    with Tracer() as tracer:
        values = meta(4, 4) + 1
        assert values.sum().item() == 1.0
        copy = values.to("cpu")
        assert (copy.device.type, copy.shape) == ("cpu", (4, 4))
        copy.copy_(values)
        assert tracer.by_kind["other"] >= 64


FUNCTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "linear": lambda x: F.linear(x, x),
    "matmul": lambda x: x @ x,
    "bmm": lambda x: torch.bmm(x[None], x[None]),
    "conv2d": lambda x: F.conv2d(x[None, None], x[None, None, :3, :3]),
    "group_norm": lambda x: F.group_norm(x[None], 2),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "softmax": lambda x: x.softmax(-1),
    "silu": F.silu,
    "gelu": F.gelu,
    "pow": lambda x: x**2,
    "exp": torch.exp,
    "add": lambda x: x + x,
    "interpolate": lambda x: F.interpolate(x[None, None], scale_factor=2.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_on_the_cpu_is_as_torch_has_it(name: str, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        real = FUNCTIONS[name](torch.ones(8, 8, dtype=dtype))
        with (tracer := Tracer()), Kernels(tracer, "cpu"):
            found = FUNCTIONS[name](meta(8, 8, dtype=dtype))
    assert (found.dtype, found.shape) == (real.dtype, real.shape)


@pytest.mark.parametrize("name", ["group_norm", "layer_norm", "softmax", "pow", "exp", "interpolate"])
def test_autocast_on_a_gpu_takes_norms_and_powers_in_float32(name: str) -> None:
    assert name in IN_FLOAT32["cuda"] - ROUNDING
    with torch.autocast("cpu", torch.bfloat16), (tracer := Tracer()), Kernels(tracer, "cuda"):
        assert FUNCTIONS[name](meta(8, 8, dtype=torch.bfloat16)).dtype == torch.float32
        assert FUNCTIONS["linear"](meta(8, 8)).dtype == torch.bfloat16


def test_casts_of_weights_are_told_from_those_of_activations() -> None:
    weight = torch.nn.Parameter(meta(64, 64))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), (tracer := Tracer()), Kernels(tracer, "cuda"):
        tracer.begin("forward")
        out = F.linear(meta(64, 64, dtype=torch.bfloat16).requires_grad_(), weight)
        assert tracer.by_kind[ROUNDED] == 64 * 64 * 2, "the graph keeps it for the backward pass"
        del out


@pytest.mark.parametrize("length", [256, 1024])
def test_attention_keeps_no_matrix(length: int) -> None:
    query, key, value = (meta(1, 8, length, 40).requires_grad_() for _ in range(3))
    with (tracer := Tracer()), Kernels(tracer, "cuda"):
        tracer.begin("forward")
        out = F.scaled_dot_product_attention(query, key, value)
        assert tracer.current == query.nbytes + 4 * 8 * length  # output and logsumexp; the inputs were there before
        tracer.begin("backward")
        out.sum().backward()
        assert tracer.moments["backward"].by_kind["workspace"] == 6 * query.numel()
        assert query.grad is not None
        del out
