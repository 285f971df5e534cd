"""Everything that an inspection found, as the JSON file states it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sd_recipes.inspection.distribution import LatentDistribution, forward_kl, stable_diffusion_alphas_cumprod
from sd_recipes.inspection.duplicates import Groups, equal_groups, near_groups
from sd_recipes.inspection.findings import LISTED, kinds
from sd_recipes.inspection.image_checks import SAMPLED_SIDE, picture_name
from sd_recipes.inspection.scan import Rows, Scan
from sd_recipes.inspection.settings import Inspection

GROUPS = 1000  # of duplicates that are listed
STATUS_NAMES = {0: "clean", 1: "problems", 2: "unusable"}
SHOWN_TIMESTEPS = (0.05, 0.1, 0.2, 0.4, 0.6, 1.0)  # of T


@dataclass
class Duplicates:
    """Groups of rows with the same file, with different files that look alike, and with the same caption."""

    images: Groups
    near_images: Groups
    captions: Groups


@dataclass
class Inspected:
    """An inspection's results."""

    config: Inspection
    rows: Rows
    scan: Scan
    duplicates: Duplicates
    pictures: list[tuple[str, np.ndarray]]  # name and uint8 (3, H, W) of rows drawn at random, as trained on
    model: Any | None  # a `latents.Model`
    latents: LatentDistribution | None
    seconds: float

    @property
    def status(self) -> int:
        """0 clean, 1 problems, 2 unusable: the process's exit status."""
        if self.scan.num_bad == self.scan.num_rows:
            return 2
        told = kinds(self.config)
        return int(any(told[kind].severity != "note" for kind in self.scan.findings.counts))

    @property
    def source(self) -> str:
        """The first source's name or folder."""
        source = self.config.sources[0]
        return source.dataset_name or source.train_data_dir or ""

    def schedule(self) -> np.ndarray:
        """ᾱ_t for t = 1…T: the model's, or Stable Diffusion's."""
        return stable_diffusion_alphas_cumprod() if self.model is None else self.model.alphas_cumprod

    def row_label(self, row: int) -> str:
        found = self.rows.read(row)
        return f"row {row}" if found is None else picture_name(found[self.config.image_column], row, self.root)

    @property
    def root(self) -> str | None:
        return self.config.train_data_dir


def find_duplicates(scan: Scan) -> Duplicates:
    """The duplicates among all rows that decoded, and among all captions."""
    rows, contents, looks = map(np.asarray, (scan.rows, scan.contents, scan.looks))  # not copied
    first = np.sort(np.unique(contents, return_index=True)[1])  # one row of those with the same file
    return Duplicates(
        images=_of_rows(equal_groups(contents, GROUPS), rows),
        near_images=_of_rows(near_groups(looks[first], GROUPS), rows[first]),
        captions=_of_rows(equal_groups(scan.captions.digests, GROUPS), scan.captions.rows),
    )


def _of_rows(groups: Groups, rows: np.ndarray) -> Groups:
    """Groups of places in `rows` as groups of row numbers."""
    for group in groups.largest:
        group.first_rows = rows[group.first_rows].tolist()
    return groups


def bucket_fill(inspected: Inspected) -> Iterator[dict[str, Any]]:
    """For each bucket, largest first: its images, its batches per epoch, and the images in the last, smaller batch."""
    batch_size = inspected.config.train_batch_size
    for (height, width), number in inspected.scan.images.buckets.most_common():
        yield {
            "width": width,
            "height": height,
            "images": number,
            "batches": -(-number // batch_size),
            "last_batch": (number - 1) % batch_size + 1,
        }


def as_json(inspected: Inspected) -> dict[str, Any]:
    """The JSON file's content: every number that the page shows."""
    scan, config = inspected.scan, inspected.config
    images, captions = scan.images, scan.captions
    content: dict[str, Any] = {
        "status": STATUS_NAMES[inspected.status],
        "exit_status": inspected.status,
        "source": inspected.source,
        "settings": config.model_dump(exclude_defaults=True),
        "seconds": round(inspected.seconds, 2),
        "rows": {
            "available": inspected.rows.available,
            "inspected": scan.num_rows,
            "usable": scan.num_rows - scan.num_bad,
            "bad": scan.num_bad,
        },
        "recognised": [
            {"source": source.flag, "layout": found.layout, "captions": found.captions, "notes": found.notes}
            for source, found in zip(config.sources, inspected.rows.recognised, strict=True)
        ],
        "findings": _findings(inspected),
        "duplicates": {
            "images": _groups(inspected.duplicates.images, inspected.row_label),
            "near_images": _groups(inspected.duplicates.near_images, inspected.row_label),
            "captions": _groups(inspected.duplicates.captions, inspected.row_label),
        },
        "images": {
            "decoded": len(scan.rows),
            "common_sizes": [
                {"width": width, "height": height, "images": number}
                for (width, height), number in images.sizes.counts.most_common(50)
            ],
            "sizes_complete": not images.sizes.pruned,
            "buckets": list(bucket_fill(inspected)),
            "too_small_for_buckets": images.num_without_bucket,
        },
        "captions": {
            "number": captions.num_captions,
            "words_mean": _mean_length(captions.word_counts),
            "common_words": dict(captions.words.counts.most_common(200)),
            "words_complete": not captions.words.pruned,
        },
    }
    if captions.tokenizer is not None:
        content["captions"] |= {
            "tokens_mean": _mean_length(captions.token_counts),
            "tokens_limit": captions.max_tokens,
            "tokens_lost": captions.tokens_lost,
        }
    if images.pixels.moments.count:
        content["pixels"] = _pixels(inspected)
        content["forward_process"] = {"pixels": forward_process(images.pixels.mean_square, inspected.schedule())}
    if inspected.latents is not None:
        content["latents"] = _latents(inspected)
        content["forward_process"]["latents"] = forward_process(inspected.latents.mean_square, inspected.schedule())
    return content


def _findings(inspected: Inspected) -> dict[str, Any]:
    findings = inspected.scan.findings
    return {
        name: {
            "title": kind.title,
            "severity": kind.severity,
            "count": findings.counts[name],
            "not_listed": max(0, findings.counts[name] - LISTED),
            "listed": [
                {"row": found.row, "name": found.name, "detail": found.detail} for found in findings.listed[name]
            ],
        }
        for name, kind in kinds(inspected.config).items()
        if findings.counts[name]
    }


def _groups(groups: Groups, label: Callable[[int], str]) -> dict[str, Any]:
    return {
        "groups": groups.num_groups,
        "rows": groups.num_rows,
        "surplus": groups.num_surplus,
        "search_complete": groups.complete,
        "largest": [
            {"rows": group.num_rows, "first_rows": group.first_rows, "names": [label(row) for row in group.first_rows]}
            for group in groups.largest
        ],
    }


def _pixels(inspected: Inspected) -> dict[str, Any]:
    pixels = inspected.scan.images.pixels
    covariance = pixels.moments.covariance
    return {
        "sampled_per_image": SAMPLED_SIDE**2,
        "number": pixels.moments.count,
        "channels": ["red", "green", "blue"],
        "mean": pixels.moments.mean.tolist(),
        "deviation": np.sqrt(np.diag(covariance)).tolist(),
        "covariance": covariance.tolist(),
        "kl_from_gaussian_nats": pixels.kl_from_gaussians(),
    }


def _latents(inspected: Inspected) -> dict[str, Any]:
    latents = inspected.latents
    assert latents is not None
    assert latents.moments is not None
    assert inspected.model is not None
    scaling_factor = inspected.model.vae.config.scaling_factor
    return {
        "images": len(inspected.pictures),
        "mean": latents.moments.mean.tolist(),
        "deviation": np.sqrt(np.diag(latents.moments.covariance)).tolist(),
        "covariance": latents.moments.covariance.tolist(),
        "overall_deviation": latents.deviation,
        "kl_from_gaussian_nats": latents.kl_from_gaussians(),
        "scaling_factor": scaling_factor,
        "scaling_factor_of_this_data": scaling_factor / latents.deviation,
        "values_outside_histogram": latents.num_outside,
    }


def forward_process(mean_square: float, alphas_cumprod: np.ndarray) -> list[dict[str, float]]:
    """t, ᾱ_t and the KL of q(x_t | x_0) to N(0, I) in nats per dimension, at some t in rising order."""
    steps = [max(1, round(share * len(alphas_cumprod))) for share in (0.001, 0.01, *SHOWN_TIMESTEPS)]
    return [
        {
            "t": t,
            "alpha_bar": float(alphas_cumprod[t - 1]),
            "kl_nats_per_dimension": float(forward_kl(mean_square, alphas_cumprod[t - 1])),
        }
        for t in steps
    ]


def _mean_length(counts: np.ndarray) -> float | None:
    return float(counts @ np.arange(len(counts)) / counts.sum()) if counts.sum() else None
