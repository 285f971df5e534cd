"""A run's own step on the meta device: what it holds at every moment, before any weight is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import is_tensor
from torch.utils._pytree import tree_leaves

from sd_recipes.data.batches import Batch
from sd_recipes.data.order import MicroBatch
from sd_recipes.data.sizes import square_side
from sd_recipes.memory.kernels import Kernels
from sd_recipes.memory.tracer import META, Moment, Tracer
from sd_recipes.model.components import Components, latent_shape_of, load_scheduler
from sd_recipes.model.conditioning import unet_arguments
from sd_recipes.model.families import family_of
from sd_recipes.model.family import Family
from sd_recipes.model.latents import decode_latents, encode_pixels, most_pixels, to_pixel_values
from sd_recipes.model.narrow_heads import widen_narrow_heads
from sd_recipes.recipe import Recipe
from sd_recipes.runtime.accelerator import DTYPES
from sd_recipes.runtime.host_memory import nbytes_of, packed
from sd_recipes.training.bf16_weights import Bf16Weights
from sd_recipes.training.build_model import build_model
from sd_recipes.training.build_parts import choose_trained
from sd_recipes.training.loop import backward, update

BLOCK = {"cuda": 512, "cpu": 64}  # bytes that allocations are rounded up to (c10/cuda/CUDACachingAllocator.cpp)
# What needs the real device: the compiler's savings are not counted, and xFormers takes what torch's attention takes.
NOT_TRACED = {
    "compile": None, "compile_unet": False, "enable_xformers_memory_efficient_attention": False, "profile_steps": 0,
}  # fmt: skip
WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE, FROZEN = "weights", "gradients", "optimizer states", "average", "frozen models"
ENCODED, FLOWING, WORKSPACE = "VAE and text", "activations' gradients", "workspace"


class Outline:
    """As much of accelerate's Accelerator as `build_model` and a step ask for, on the meta device."""

    is_fsdp2 = False
    scaler = None
    optimizer_step_was_skipped = False
    sync_gradients = True
    num_processes = 1

    def __init__(self, recipe: Recipe, tracer: Tracer) -> None:
        self.device = META
        self.mixed_precision = recipe.mixed_precision or "no"
        self.gradient_accumulation_steps = recipe.gradient_accumulation_steps
        self.tracer = tracer

    def prepare_model(self, module: torch.nn.Module, **_: Any) -> torch.nn.Module:
        module.forward = self._forward(module.forward)
        return module

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return optimizer

    def _forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def autocast(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self.tracer.begin("forward")
            with self.autocast():
                return forward(*args, **kwargs)

        return autocast if self.mixed_precision == "no" else convert_outputs_to_fp32(autocast)

    def autocast(self) -> AbstractContextManager[None]:
        dtype = DTYPES[self.mixed_precision]
        return torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False)

    def backward(self, loss: torch.Tensor) -> None:
        self.tracer.begin("backward")
        with self.tracer.of_kind(FLOWING):
            # What torch.autograd.backward comes to, which would leave the kernels out of what checkpointing recomputes.
            torch.autograd.Variable._execution_engine.run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )

    def clip_grad_norm_(self, parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        self.tracer.begin("clipping")
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class TracedStep:
    """A recipe's model and state on the meta device, and the moments of a step's passes there, or of its update.

    `device` is the kind that the run is for, cuda or cpu. Only of an update, and of a step within the backward pass,
    there are optimizer states. Raises RecipeError for a model that cannot be built.
    """

    def __init__(self, recipe: Recipe, device: str, *, passes: bool) -> None:
        self.recipe = recipe = recipe.model_copy(update={"seed": 0, **NOT_TRACED})
        self.device = device
        self.tracer = Tracer(META, BLOCK[device])
        self.kernels = Kernels(self.tracer, device)
        self.outline = Outline(recipe, self.tracer)
        self.family = family_of(recipe)
        self.components = self.family.load(recipe, load_scheduler(recipe), (), weights=False)
        choose_trained(recipe, self.family, self.components)
        with self.tracer, self.kernels:
            self._build()
            if recipe.fused_backward_pass or not passes:
                self._first_step()
            self.resident = Counter(self.tracer.by_kind)  # bytes by kind, between two steps
            self.tracer.moments.clear()
            if passes:
                self._passes()
                if recipe.draws_pictures or recipe.validation_split:
                    self._validation()
            elif recipe.fused_backward_pass:
                self.state.update_averages()
            else:
                self._fill_gradients()
                update(self.state, cast(Accelerator, self.outline), recipe.max_grad_norm)

    @property
    def nbytes_of_gradients(self) -> int:
        return sum(each.nbytes for each in self.state.parameters.values())

    @property
    def nbytes_of_visitors(self) -> int:
        """Of the blocks on the device through which averages in the host's memory are updated, one for each of them."""
        averages = [each for part in self.state.parts.values() for each in part.averages.values()]
        sizes = [[nbytes_of(tensor) for tensor in each.named_tensors().values()] for each in averages]
        return sum(max(block.nbytes for block in packed(each)) for each in sizes)

    def encoding(self, number: int, *, is_sliced: bool) -> Moment:
        """The fullest moment while so many images and their captions are encoded, between two steps."""
        batch, encoder = self.batch(number), self.model.encoder
        encoder.vae.use_slicing = is_sliced
        self.tracer.moments.pop("encoding", None)
        with self.tracer, self.kernels:
            states = self.model.encode_text(batch.input_ids)
            batch.to(META).all_moments(encoder.encode, None)
            del states
        return self.tracer.moments.pop("encoding")

    @property
    def moments(self) -> dict[str, Moment]:
        """By phase, in the order of a step."""
        return self.tracer.moments

    def _build(self) -> None:
        batch_size = self.recipe.train_batch_size * self.recipe.gradient_accumulation_steps
        mark(self.components.unet, self.tracer)
        self.model, self.state = build_model(
            self.recipe,
            self.family,
            self.components,
            cast(Accelerator, self.outline),
            vae_dtype=self._vae_dtype(),
            batch_size=batch_size,
            num_steps=2,
            num_rows=None,
        )
        # What is settled by the kind of device, which is not the one that this is traced on.
        self.model.encoder.most_pixels = most_pixels(self.device)
        if self.device == "cpu":
            widen_narrow_heads(self.components.unet)
        tracer = self.tracer
        state: Any = self.state
        for name in ("unet", "vae", *self.family.text_models):
            module = getattr(self.components, name)
            tracer.name(FROZEN, [*module.parameters(), *module.buffers()])
        for module in self.model.frozen.copies if self.model.frozen else ():
            tracer.name(FROZEN, [*module.parameters(), *module.buffers()])
        tracer.name(WEIGHTS, state.parameters.values())
        for parameter in state.parameters.values():
            parameter.register_post_accumulate_grad_hook(self._name_gradient)
        for group in state.optimizer.param_groups:
            if self.device == "cuda" and "foreach" in group:  # the default there; on the meta device it is not
                group["foreach"] = True
        # On these objects alone.
        self.model.encode_text = tracer.in_phase("encoding", ENCODED, self.model.encode_text)
        encoder: Any = self.model.encoder
        encoder.encode = tracer.in_phase("encoding", ENCODED, encoder.encode)
        if isinstance(state.optimizer, Bf16Weights):
            state.optimizer.generators[META] = torch.Generator()  # the device has none
        if not self.recipe.fused_backward_pass:  # which is a phase of its own neither in code nor in time
            # AdamW's single kernel works in place, and the meta device does not have it.
            is_fused = self.recipe.optimizer == "adamw" and self.recipe.mixed_precision != "fp16"
            state.optimizer.register_step_pre_hook(lambda *_: tracer.begin("optimizer", muted=is_fused))
            state.optimizer.register_step_post_hook(lambda *_: tracer.begin("optimizer"))
        state.update_averages = tracer.in_phase("average", WORKSPACE, state.update_averages)

    def _vae_dtype(self) -> torch.dtype:
        dtype = DTYPES[self.outline.mixed_precision]
        overflows = self.family.vae_overflows and self.components.vae.config.force_upcast
        return torch.float32 if overflows and dtype == torch.float16 else dtype

    def _name_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:  # and not used already
            self.tracer.name(GRADIENTS, [parameter.grad])

    def _first_step(self) -> None:
        """An update alone: only after it do optimizer states exist."""
        self._fill_gradients()
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        self.state.update_averages()
        self.tracer.name(OPTIMIZER, [each for each in tree_leaves(dict(self.state.optimizer.state)) if is_tensor(each)])
        for part in self.state.parts.values():
            for average in part.averages.values():
                self.tracer.name(AVERAGE, average.named_tensors().values())

    def _fill_gradients(self) -> None:
        for parameter in self.state.parameters.values():
            parameter.grad = torch.empty_like(parameter)
        self.tracer.name(GRADIENTS, [each.grad for each in self.state.parameters.values() if each.grad is not None])

    def _passes(self) -> None:
        """Those of a step's last micro-batch: the gradients of the ones before it, if there are any, wait for it."""
        recipe = self.recipe
        if waits_for_gradients(recipe):
            self._fill_gradients()
        backward([self.batch(recipe.images_at_once)], self.model, None, cast(Accelerator, self.outline))
        self.state.optimizer.zero_grad()

    def batch(self, size: int) -> Batch:
        return blank_batch(self.recipe, self.family, self.components, size)

    @torch.no_grad()
    def _validation(self) -> None:
        """As in `Validator`: errors of a batch of samples, and pictures with guidance, decoded one by one."""
        recipe, outline = self.recipe, self.outline
        self.components.unet.eval()
        self.tracer.begin("validation")
        with self.tracer.of_kind("activations: validation"), self.state.evaluated(self.components):
            self.model.encoder.vae.to(META)
            if recipe.validation_split:
                batch = self.batch(recipe.images_at_once)
                encode_pixels(self.components.vae, to_pixel_values(batch.pixels.to(META), self.model.encoder.dtype))
                with outline.autocast():
                    self._predict(batch)
            if recipe.draws_pictures:
                prompts = len(recipe.validation_prompts or []) or recipe.validation_pictures
                with outline.autocast():
                    batch = self.batch(2 * min(recipe.train_batch_size, prompts))
                    decode_latents(self.components.vae, self._predict(batch)[:1])

    def _predict(self, batch: Batch) -> torch.Tensor:
        """What the UNet predicts of a batch."""
        conditioning = self.family.conditioning(self.family.encode_text(self.components, batch.input_ids), batch)
        predicted: torch.Tensor = self.components.unet(
            batch.noise.to(META), batch.timesteps.to(META), **unet_arguments(conditioning), return_dict=False
        )[0]
        return predicted


def waits_for_gradients(recipe: Recipe) -> bool:
    """Whether gradients of other micro-batches wait while the last one of a step is computed."""
    step = recipe.train_batch_size * recipe.gradient_accumulation_steps
    return recipe.images_at_once < step or recipe.has_class_pictures


def blank_batch(recipe: Recipe, family: Family, components: Components, size: int) -> Batch:
    """A step's only micro-batch, of `size` rows, in the host's memory: of the run's shapes, and all zeros."""
    side = square_side(recipe)
    channels, height, width = latent_shape_of(components.vae)((side, side))
    chunks = recipe.caption_chunks if recipe.long_captions == "chunk" else 1
    text_models = [getattr(components, name) for name in family.text_models]
    num_tokens = chunks * sum(each.config.max_position_embeddings for each in text_models)
    numbers = np.arange(size)
    noise = torch.zeros(size, channels, height, width)
    return Batch(
        pixels=torch.zeros(size, 3, side, side, dtype=torch.uint8),
        to_encode=torch.arange(size),
        moments=None,
        flip=torch.zeros(size, dtype=torch.bool),
        input_ids=torch.zeros(size, num_tokens, dtype=torch.int64),
        timesteps=torch.zeros(size, dtype=torch.int64),
        timestep_u=torch.zeros(size, dtype=torch.float64),
        noise=noise,
        input_noise=noise if recipe.input_perturbation else None,
        posterior_noise=noise,
        original_size=torch.zeros(size, 2, dtype=torch.int64),
        crop_corner=torch.zeros(size, 2, dtype=torch.int64),
        target_size=torch.zeros(size, 2, dtype=torch.int64),
        weights=torch.ones(size),
        latent_weights=torch.ones(size, 1, height, width) if recipe.masked_loss else None,
        names=("",) * size,
        plan=MicroBatch(
            rows=numbers,
            positions=numbers,
            strata=numbers,
            global_batch_size=size,
            weight=1.0,
            is_last=True,
            samples_seen=0,
            ends_epoch=False,
            epoch=0,
            size=(side, side),
        ),
        bad=(),
        records=[],
    )


# By their classes, what activations belong to.
KINDS: dict[type[torch.nn.Module], str] = {
    UNet2DConditionModel: "activations: other",
    ResnetBlock2D: "activations: ResNet blocks",
    Attention: "activations: attention",
    FeedForward: "activations: feed-forward",
    torch.nn.Conv2d: "activations: convolutions",
}


def mark(unet: UNet2DConditionModel, tracer: Tracer) -> None:
    """Let what is made in a forward pass be of the kind of the block that it is made in."""
    for module in unet.modules():
        if kind := KINDS.get(type(module)):
            module.register_forward_pre_hook(partial(_enter, tracer, kind))
            # Also where gradient checkpointing has recomputed as much as it needs, and breaks off.
            module.register_forward_hook(partial(_leave, tracer), always_call=True)


def _enter(tracer: Tracer, kind: str, *_: Any) -> None:
    tracer.kinds.append(kind)


def _leave(tracer: Tracer, *_: Any) -> None:
    tracer.kinds.pop()
