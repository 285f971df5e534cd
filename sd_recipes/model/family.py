"""The kinds of pipelines: one file each, and this interface between them and everything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from transformers import CLIPTokenizer

from sd_recipes.model.components import Components
from sd_recipes.model.conditioning import Conditioning, TextStates
from sd_recipes.recipe import CaptionConfig, ModelConfig

if TYPE_CHECKING:
    from sd_recipes.data.batches import Batch


class Family(ABC):
    """One kind of pipeline: how it is loaded, how captions become arguments of its UNet, how it is exported."""

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    text_models: ClassVar[tuple[str, ...]]  # attributes of the components: frozen unless trained, moved with them
    folders: ClassVar[tuple[str, ...]]  # of the exported pipeline
    # Whether its VAEs overflow in float16, unless their configuration says otherwise, for a plan that has no weights.
    vae_overflows: ClassVar[bool] = False

    # Which of a text model's layers, counted from the end, its states are of without --clip_skip; the last is 1.
    text_layer: ClassVar[int] = 1

    @abstractmethod
    def load_tokenizers(self, config: ModelConfig) -> tuple[CLIPTokenizer, ...]:
        """One of each text model; with the first, captions are checked before the model is loaded.

        Raises RecipeError.
        """

    @abstractmethod
    def tokenize(self, tokenizers: Sequence[CLIPTokenizer], captions: list[str], config: CaptionConfig) -> torch.Tensor:
        """Captions to input_ids (B, L), all text models' in a row, in a loader's worker. Raises CaptionError."""

    @abstractmethod
    def load(
        self,
        config: ModelConfig,
        scheduler: DDPMScheduler,
        tokenizers: Sequence[CLIPTokenizer],
        *,
        weights: bool = True,
    ) -> Components:
        """All parts in float32, all but the UNet frozen, checked to fit together. Raises RecipeError.

        Without `weights` they are on the meta device, of their configurations alone, and may lack the tokenizers.
        """

    @abstractmethod
    def encode_text(self, components: Components, input_ids: torch.Tensor) -> TextStates:
        """(B, L) int64, on any device, to text states on the text models' device; a row's depend only on its ids.

        With a graph, where a text model is trained and gradients are on.
        """

    def prompt_arguments(self, components: Components, prompts: list[str]) -> dict[str, Any]:
        """The arguments by which this family's pipeline, made of the components, draws prompts."""
        return {"prompt": prompts}

    def encoder_layer(self, clip_skip: int) -> int:
        """Which layer from the end text states are of with a --clip_skip; the last is 1."""
        return self.text_layer + clip_skip

    def a1111_clip_skip(self, clip_skip: int) -> int | None:
        """What A1111 calls a --clip_skip; None where it has no such setting for this family."""
        return clip_skip + 1

    def clip_skip_in_words(self, clip_skip: int) -> str:
        """How to draw with a --clip_skip elsewhere."""
        of_a1111 = self.a1111_clip_skip(clip_skip)
        there = f"Clip skip {of_a1111} in A1111" if of_a1111 else "for which A1111 has no setting"
        return f"clip_skip={clip_skip} in diffusers, {there}"

    def without_effect(self, components: Components) -> Mapping[str, tuple[str, ...]]:
        """By text model, how the names of its modules begin that no text state depends on: they are not trained."""
        return {}

    @abstractmethod
    def conditioning(self, states: TextStates, batch: Batch) -> Conditioning:
        """What the UNet is conditioned on, from a batch's text states and whatever else the batch carries."""

    @abstractmethod
    def build_pipeline(self, components: Components) -> DiffusionPipeline:
        """A pipeline of the components themselves, not of copies; without a safety checker, as none was loaded."""
