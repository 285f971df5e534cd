"""What captions show: whether they are there, how long they are, which words they use."""

from __future__ import annotations

import hashlib
import itertools
import re
from array import array
from typing import Any

import numpy as np

from sd_recipes.data.bad_rows import BadRow
from sd_recipes.data.captions import (
    CaptionError,
    caption_columns,
    count_tokens,
    is_missing,
    make_caption,
    undisturbed,
    worded,
)
from sd_recipes.data.draws import draw
from sd_recipes.inspection.findings import BoundedCounter, Finding
from sd_recipes.recipe import DataSettings
from sd_recipes.redaction import redacted

MAX_WORDS = 50_000  # number of different words that are counted
LONGEST = 512  # words or tokens of a caption; longer ones are counted as this long
FIRST = draw(0, 0, stratum=0, global_batch_size=1, latent_shape=(1, 1, 1), num_train_timesteps=1)
WORD = re.compile(r"\w+(?:['’-]\w+)*")


class CaptionSummary:
    """Summary of the captions of some rows: lengths, words, and an 8-byte digest of each."""

    def __init__(self, config: DataSettings, tokenizer: Any | None) -> None:
        self.config = config
        self.columns = caption_columns(config)
        self._undisturbed = undisturbed(config).model_copy(update={"blank_captions": "skip"})
        self.tokenizer = tokenizer
        self.num_captions = 0
        self.word_counts = np.zeros(LONGEST + 1, np.int64)  # captions by their number of words
        self.token_counts = np.zeros(LONGEST + 1, np.int64)
        self.tokens_lost = 0
        self.words = BoundedCounter(MAX_WORDS)
        self._rows = array("I")
        self._digests = array("Q")

    @property
    def rows(self) -> np.ndarray:
        """uint32 (n,), the row of every caption."""
        return np.asarray(self._rows)

    @property
    def digests(self) -> np.ndarray:
        """uint64 (n,), a digest of every caption."""
        return np.asarray(self._digests)

    def update(self, rows: list[tuple[int, str, dict[str, Any]]]) -> list[Finding]:
        """Add rows of (number, name, columns); returns what is wrong with them."""
        findings: list[Finding] = []
        captions: list[str] = []
        owners: list[tuple[int, str]] = []
        for row, name, values in rows:
            found, wrong = self._check(row, name, values)
            findings += wrong
            captions += found
            owners += [(row, name)] * len(found)
        for (row, _), caption in zip(owners, captions, strict=True):
            words = WORD.findall(redacted(caption).lower())
            self.words.update(words)
            self.word_counts[min(len(words), LONGEST)] += 1
            self._rows.append(row)
            self._digests.append(
                int.from_bytes(hashlib.blake2b(caption.strip().encode(errors="surrogatepass"), digest_size=8).digest())
            )
        self.num_captions += len(captions)
        return findings + self._count_tokens(owners, captions)

    def captions_of(self, values: dict[str, Any]) -> list[str]:
        """All captions that training may draw for a row, in one order of their tags and with one choice of wildcards.

        Of a template, the first. Raises CaptionError if there is none.
        """
        made = make_caption(values, self._undisturbed, FIRST)
        if self.config.caption_template is not None:
            return [made]
        texts = (values[column] for column in self.columns)
        every = itertools.chain.from_iterable(text if isinstance(text, list) else [text] for text in texts)
        return [worded(text, self._undisturbed, FIRST) for text in every if text and text.strip()]

    def _check(self, row: int, name: str, values: dict[str, Any]) -> tuple[list[str], list[Finding]]:
        """The row's captions, and what is wrong with them."""
        texts = [values[column] for column in self.columns]
        members = [text for value in texts for text in (value if isinstance(value, list) else [value])]
        try:
            captions = self.captions_of(values)
        except CaptionError as error:
            if not str(error).startswith("no caption"):
                return [], [Finding("caption_not_text", row, name, str(error))]
            if not all(map(is_missing, members)):
                return [], [Finding("blank_caption", row, name, " ".join(map(repr, members))[:200])]
            return [], [Finding("missing_caption", row, name, "null")]
        except BadRow as error:
            return [], [Finding("incomplete_row", row, name, str(error))]
        num_blank = sum(is_missing(member) or not str(member).strip() for member in members)
        if num_blank:
            return captions, [Finding("blank_choice", row, name, f"{num_blank} of {len(members)}")]
        return captions, []

    def _count_tokens(self, owners: list[tuple[int, str]], captions: list[str]) -> list[Finding]:
        """Add to the token counts; returns the captions that are over the limit."""
        if self.tokenizer is None or not captions:
            return []
        findings = []
        for (row, name), caption, number in zip(owners, captions, count_tokens(self.tokenizer, captions), strict=True):
            self.token_counts[min(number, LONGEST)] += 1
            lost = number - self.max_tokens
            if lost > 0:
                self.tokens_lost += lost
                start = caption if len(caption) <= 80 else caption[:79] + "…"
                findings.append(Finding("long_caption", row, name, f"{number} tokens, {lost} over: {start}"))
        return findings

    @property
    def max_tokens(self) -> int:
        """The most tokens of a caption that reach the model, without the begin and end tokens."""
        assert self.tokenizer is not None
        room = self.tokenizer.model_max_length - 2
        return room * (self.config.caption_chunks if self.config.long_captions == "chunk" else 1)
