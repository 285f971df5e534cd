"""What a run takes besides the tensors that can be traced, each figure with its source."""

from __future__ import annotations

import torch

from sd_recipes.data.batches import READ_AHEAD
from sd_recipes.data.workers import num_workers_of
from sd_recipes.memory.step import TracedStep
from sd_recipes.model.placement import kept_as_loaded
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.host_memory import nbytes_of, packed

MIB = 2**20
GIB = 2**30

# On a GPU. What the driver keeps for a process that has loaded the kernels of a step: 527 MiB when it begins, and 700
# after products, convolutions and attention (H100, torch 2.11 with CUDA 13.0, by the driver's figures less torch's).
CUDA_CONTEXT = 700 * MIB
# Workspaces of cuBLAS, 32 MiB on an H100 and 8 on older ones, for the forward and the backward pass's thread each
# (aten/src/ATen/cuda/CublasHandlePool.cpp); torch counts them as allocated.
CUBLAS_WORKSPACES = 2 * 32 * MIB
# The part of what a step allocates and frees again by which torch's allocator reserves more: small blocks share
# segments of 2 MiB, larger ones segments of 20 MiB or multiples of 2, and pieces are left over
# (c10/cuda/CUDACachingAllocator.cpp). On an H100 it was 6 % of 10 GiB; with gradient checkpointing 70 % of 2.2 GiB,
# before segments could grow (runtime/allocator.py).
LEFT_OVER = 0.06
# NCCL's buffers for a ring between the GPUs of one machine, about as much for each of a few channels
# (NCCL_BUFFSIZE, 4 MiB, for each of up to 32 channels, both ways).
NCCL = 2 * 32 * 4 * MIB
# The part of the weights that FSDP holds whole while blocks compute: Stable Diffusion's largest block, the next one,
# which is gathered ahead, and what is in no block, by their numbers of parameters.
GATHERED_BLOCKS = 0.18

# Of the host. A Python process with torch, diffusers and datasets loaded (600 MiB with torch 2.13 for the CPU); with
# CUDA's libraries, not measured.
PROCESS, PROCESS_WITH_CUDA = 650 * MIB, 3 * GIB
# A data worker, which shares what it was forked with, and has its own picture buffers and Python objects.
WORKER = 250 * MIB


def on_device(passing: int, *, num_processes: int) -> dict[str, int]:
    """Bytes on a GPU by what takes them; `passing` is what the step allocates and frees again."""
    found = {
        "CUDA context": CUDA_CONTEXT,
        "cuBLAS workspaces": CUBLAS_WORKSPACES,
        "allocator's pieces": int(LEFT_OVER * passing),
    }
    if num_processes > 1:
        found["NCCL"] = NCCL
    return found


def on_host(recipe: Recipe, step: TracedStep, device: str) -> dict[str, int]:
    """Bytes in the host's memory, of the process that saves, by what takes them; without a CPU run's tensors."""
    cuda = device == "cuda"
    tensors = [
        tensor for named in step.state.state_dict(only_layout=True).tensors.values() for tensor in named.values()
    ]
    # Pinned memory comes in blocks of powers of two.
    buffers = sum(block.nbytes for block in packed([nbytes_of(each) for each in tensors])) if cuda else None
    buffers = buffers or sum(each.nbytes for each in tensors)
    found = {"Python and libraries": PROCESS_WITH_CUDA if cuda else PROCESS, "checkpoint buffers": buffers}
    if names := kept_as_loaded(step.family, recipe):
        parameters = [each for name in names for each in getattr(step.components, name).parameters()]
        found["frozen models as loaded"] = 4 * sum(each.numel() for each in parameters)
    if recipe.offload_ema and cuda:
        averages = [each for part in step.state.parts.values() for each in part.averages.values()]
        found["average"] = sum(tensor.nbytes for each in averages for tensor in each.named_tensors().values())
    # Read ahead, by each worker or the thread that reads, and a step's own.
    batch = nbytes_of_batch(step)
    num_workers = num_workers_of(recipe, device)
    waiting = READ_AHEAD * max(1, num_workers) + recipe.gradient_accumulation_steps
    found["batches"] = waiting * batch
    if num_workers:
        found["data workers"] = num_workers * WORKER
    return found


def nbytes_of_batch(step: TracedStep) -> int:
    """Of a batch of --train_batch_size rows."""
    batch = step.batch(step.recipe.train_batch_size)
    return sum(value.nbytes for value in vars(batch).values() if isinstance(value, torch.Tensor))
