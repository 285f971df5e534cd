"""What can be wrong with a data set, and the rows where it is, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from sd_recipes.recipe import DataSettings

LISTED = 10_000  # rows that are named, of each kind
SYSTEM_FILES = {"thumbs.db", "desktop.ini", ".ds_store"}

Severity = Literal["bad", "problem", "note"]


@dataclass(frozen=True)
class Kind:
    """A kind of finding: a `bad` row cannot be trained on, a `problem` should be fixed, a `note` need not be."""

    title: str
    severity: Severity
    meaning: str


@dataclass(frozen=True)
class Finding:
    """One row, or file, where a kind was found; `row` counts from 0, and is None for a file without a row."""

    kind: str
    row: int | None
    name: str
    detail: str


def kinds(config: DataSettings) -> dict[str, Kind]:
    """The kinds of findings, in the order in which they are reported; severities depend on the settings."""
    blank: Severity = "note" if config.blank_captions == "empty" else "bad"
    small: Severity = "bad" if config.aspect_ratio_buckets else "problem"
    long: Severity = "bad" if config.long_captions == "error" else "note"
    return {
        "missing_file": Kind("row without its image file", "bad", "The row names a file that is not there."),
        "empty_file": Kind("empty image file", "bad", "The file has no bytes: a download or a copy was cut off."),
        "truncated": Kind("truncated image", "bad", "The file ends before the picture does: fetch it again."),
        "undecodable": Kind("image that does not decode", "bad", "No image, or a damaged one."),
        "too_many_pixels": Kind(
            "too many pixels", "bad", "More than --max_image_megapixels; a small file can unfold to more memory than "
            "there is."
        ),
        "too_small": Kind(
            "too small", small, "Would have to be enlarged more than --max_upscale times to reach --resolution, which "
            "teaches the model blur."
        ),
        "incomplete_row": Kind(
            "row that could not be read whole", "bad", "A part of it is missing, damaged, not text, or in doubt."
        ),
        "missing_caption": Kind("missing caption", blank, "Null, or an empty list."),
        "blank_caption": Kind("blank caption", blank, "Empty, or only spaces."),
        "caption_not_text": Kind("caption that is not text", "bad", "Neither a string nor a list of strings."),
        "image_without_row": Kind(
            "image without a row", "problem", "It is in the folder, but no metadata file names it, so it is "
            "never trained on."
        ),
        "long_caption": Kind(
            "caption over the tokenizer's limit", long, "What lies beyond the limit is cut, unless --long_captions "
            "chunk keeps it."
        ),
        "blank_choice": Kind(
            "blank among several captions", "note", "Training draws one of the others instead."
        ),
        "animated": Kind("animated image", "note", "The first frame is used."),
        "system_file": Kind(
            "file of the operating system", "note", "Left by macOS or Windows next to the images; delete it."
        ),
    }  # fmt: skip


@dataclass
class Findings:
    """Counts of all findings, and the first LISTED of each kind."""

    counts: Counter[str] = field(default_factory=Counter)
    listed: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.counts[finding.kind] += 1
            named = self.listed.setdefault(finding.kind, [])
            if len(named) < LISTED:
                named.append(finding)


class BoundedCounter:
    """Counts of the commonest values, never holding more than twice `limit` of them.

    When there are more, the rarest are forgotten (`pruned` is then True), and one that comes back starts from 0:
    counts of rare values may come out too low.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.pruned = False
        self.counts: Counter[Any] = Counter()

    def update(self, values: Iterable[Any]) -> None:
        """Count `values`: an iterable, or a mapping of values to their counts."""
        self.counts.update(values)
        if len(self.counts) > 2 * self.limit:
            self.counts = Counter(dict(self.counts.most_common(self.limit)))
            self.pruned = True


def is_system_file(name: str) -> bool:
    """Whether macOS or Windows leaves files of this name next to images; `._x.jpg` looks like one, but is not."""
    return name.startswith("._") or name.lower() in SYSTEM_FILES
