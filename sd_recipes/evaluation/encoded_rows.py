"""Rows as the network meets them, a latent each with and without its caption; and what the VAE keeps of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sd_recipes.data.batches import Batch
from sd_recipes.errors import RecipeError
from sd_recipes.evaluation.sample_errors import HELD_OUT, TRAIN
from sd_recipes.evaluation.validation import Validator
from sd_recipes.evaluation.watched_rows import describe
from sd_recipes.model.conditioning import Conditioning
from sd_recipes.model.latents import decode_latents, posterior_logvar
from sd_recipes.runtime.signals import stop_request

CAPTIONS, NO_CAPTIONS = "captions", "no_captions"
WORDS = {HELD_OUT: "held-out rows", TRAIN: "training rows", CAPTIONS: "with captions", NO_CAPTIONS: "without captions"}
ENCODING = "while rows were encoded; nothing was written"


@dataclass(frozen=True, eq=False)
class AboutRows:
    """What is known of a set's rows besides their latents, by number; of a process's, or of all."""

    numbers: np.ndarray  # (N,)
    # (N,), in bits: the entropy of q(z | x), the VAE's posterior before it is scaled.
    entropies: np.ndarray
    # (N,), in squared gray levels: the mean squared error of the picture that the VAE decodes; NaN for rows that have
    # moments instead of pictures.
    decoding_errors: np.ndarray

    @classmethod
    def joined(cls, parts: list[AboutRows]) -> AboutRows:
        """In the order of their numbers. There has to be a part."""
        columns = [np.concatenate(each) for each in zip(*(vars(part).values() for part in parts), strict=True)]
        order = np.argsort(columns[0])
        return cls(*(column[order] for column in columns))


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """One process's share of a set's rows, those that can be used, on the device."""

    about: AboutRows
    latents: Tensor  # (N, C, h, w), scaled
    conditioning: Mapping[str, Conditioning]  # what the UNet is called with, with captions and without, (N, …) each


def encode_rows(validator: Validator, which: str, rows: np.ndarray, at_once: int) -> EncodedRows | None:
    """Encode rows of a set by their numbers, `at_once` of them at a time; None if none of them can be used.

    Each has the posterior noise of its first sample in a validation. Raises RecipeError for latents that are not
    finite, and Stopped.
    """
    parts = []
    for start in range(0, len(rows), at_once):
        stop_request.check(ENCODING)
        part = _encode(validator, which, rows[start : start + at_once])
        if len(part.latents):
            parts.append(part)
    if not parts:
        return None
    conditioning = {
        kind: {name: torch.cat([part.conditioning[kind][name] for part in parts]) for name in found}
        for kind, found in parts[0].conditioning.items()
    }
    latents = torch.cat([part.latents for part in parts])
    return EncodedRows(AboutRows.joined([part.about for part in parts]), latents, conditioning)


def _encode(validator: Validator, which: str, rows: np.ndarray) -> EncodedRows:
    samples, encoder = validator.samples[which], validator.encoder
    batch = samples.builder[samples.plan(rows)].to(validator.accelerator.device)
    usable = batch.weights.bool()
    moments = batch.all_moments(encoder.encode)
    latents = encoder.sample(moments, batch.posterior_noise)
    strange = usable & ~latents.flatten(1).isfinite().all(dim=1)
    if strange.any():
        _refuse(validator, which, int(rows[int(strange.nonzero()[0])]))
    # ½ ln(2πe σ²) nats a dimension.
    entropies = (posterior_logvar(moments) + np.log(2 * np.pi * np.e)).flatten(1).sum(dim=1) / (2 * np.log(2))
    errors = torch.full_like(entropies, torch.nan)
    if len(batch.to_encode):
        levels = decode_latents(encoder.vae, latents[batch.to_encode])
        errors[batch.to_encode] = (levels - batch.pixels).square().flatten(1).mean(dim=1)
    nothing = samples.builder.tokenize([""], samples.builder.config).expand_as(batch.input_ids).to(batch.input_ids)
    conditioning = {
        kind: {name: each[usable] for name, each in _conditioning(validator, batch, ids).items()}
        for kind, ids in ((CAPTIONS, batch.input_ids), (NO_CAPTIONS, nothing))
    }
    kept = usable.cpu()
    about = AboutRows(rows[kept.numpy()], *(each.cpu()[kept].double().numpy() for each in (entropies, errors)))
    return EncodedRows(about, latents[usable], conditioning)


def _conditioning(validator: Validator, batch: Batch, input_ids: Tensor) -> Conditioning:
    states = validator.family.encode_text(validator.components, input_ids)
    return validator.family.conditioning(states, replace(batch, input_ids=input_ids))


def _refuse(validator: Validator, which: str, row: int) -> None:
    assert validator.watched is not None
    fixed = validator.watched.sets[which]
    name, _ = describe(fixed.rows[row], int(fixed.numbers[row]), validator.recipe)
    fp16 = validator.accelerator.mixed_precision == "fp16"
    way_out = "evaluate with --mixed_precision no" if fp16 else "leave the row out, or choose another --vae"
    raise RecipeError(f"--bound: the VAE's latents of {name} of the {WORDS[which]} are not finite: {way_out}")
