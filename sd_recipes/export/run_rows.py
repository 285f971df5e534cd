"""The rows of a run's page that stand out by their loss, with their captions and thumbnails."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from sd_recipes.errors import one_line
from sd_recipes.evaluation.row_rankings import (
    RankedRow,
    RowLosses,
    hardest,
    learned_first,
    memorised,
    read_validations,
)
from sd_recipes.evaluation.sample_errors import HELD_OUT, TRAIN
from sd_recipes.evaluation.verdict import changed
from sd_recipes.evaluation.watched_rows import HARDEST_ROWS, ROWS
from sd_recipes.export.pages import UNREADABLE, picture_uri
from sd_recipes.reading import open_regular
from sd_recipes.runtime.trackers import VALIDATION
from sd_recipes.training.row_losses import TRAINING_ROWS, ratios_of

logger = logging.getLogger(__name__)

SHOWN, THUMBNAIL = 10, 96  # rows of a ranking; pixels a side
TABLES = 40  # validations whose tables are read: enough to see which rows were learned first
CAPTION = 200  # characters of a caption
IN_FOLDER = re.compile(r"\([^()]*[/\\]")  # what a row's name says before the file's own name
NAMES = {HELD_OUT: "held-out rows", TRAIN: "training rows"}


@dataclass
class ShownRow:
    """A row, and the figure by which it stands out."""

    row: int
    figure: str
    detail: str = ""
    name: str = ""
    caption: str = ""
    thumbnail: str | None = None  # data URI


@dataclass
class Ranking:
    """Rows of a set that stand out, the most conspicuous first."""

    title: str
    words: str
    of_set: str
    rows: list[ShownRow]


def rankings(output_dir: Path) -> list[Ranking]:
    """The rankings of a run by its tables of losses; those without a row are left out."""
    validations = read_validations(output_dir, TABLES)
    losses = {name: each for name in NAMES if (each := [found[name] for found in validations if name in found])}
    found = [ranking for ranking in (*_hardest(losses), *_learned_first(losses), *_memorised(losses)) if ranking.rows]
    if found:
        _describe(found, output_dir / VALIDATION / ROWS)
    hard = [ranking for ranking in _hard_to_learn(output_dir / VALIDATION) if ranking.rows]
    if hard:
        _describe(hard, output_dir / VALIDATION / HARDEST_ROWS)
    return [*hard, *found]


def _hard_to_learn(folder: Path) -> Iterator[Ranking]:
    """Of all training rows, by their losses in training."""
    path = folder / TRAINING_ROWS
    if not path.is_file():
        return
    try:
        table = pq.read_table(path)
        rows, samples = table["row"].to_numpy(), table["samples"].to_numpy()
        ratios = ratios_of(table["log_ratio"].to_numpy(), samples)
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        logger.warning("%s is not a table of losses (%s): the page does without.", path, one_line(error, 100))
        return
    hardest_first = [place for place in np.argsort(-ratios, kind="stable")[:SHOWN].tolist() if ratios[place] > 1]
    shown = [
        ShownRow(int(rows[place]), f"{ratios[place]:.2f} × its like", f"{samples[place]:,} samples")
        for place in hardest_first
    ]
    words = (
        "Of all rows that are trained on, by their losses in training: each over what was usual at its timestep then, "
        "over the whole run. Look for wrong captions, and for odd or crowded pictures."
    )
    yield Ranking("Hardest to learn", words, TRAIN, shown)


def _hardest(losses: dict[str, list[RowLosses]]) -> Iterator[Ranking]:
    for name, validations in losses.items():
        words = f"Those with the highest loss at step {validations[-1].step}."
        words += " Look for wrong captions, and for odd or crowded pictures."
        yield Ranking(f"Hardest {NAMES[name]} at the end", words, name, _by_ratio(hardest(validations[-1:], SHOWN)))
    if TRAIN in losses:
        words = "A wrong caption that is learned by heart no longer stands out at the end; on average it does."
        rows = _by_ratio(hardest(losses[TRAIN], SHOWN))
        yield Ranking("Hardest training rows on average over all validations", words, TRAIN, rows)


def _by_ratio(ranked: Iterable[RankedRow]) -> list[ShownRow]:
    return [ShownRow(each.row, f"{each.ratio:.2f} × its like") for each in ranked]


def _learned_first(losses: dict[str, list[RowLosses]]) -> Iterator[Ranking]:
    for name, validations in losses.items():
        if found := learned_first(validations, SHOWN):
            step, ranked = found
            rows = [
                ShownRow(each.row, f"loss {changed(each.own - 1)}", f"its like {changed(each.own / each.ratio - 1)}")
                for each in ranked
            ]
            words = (
                f"At step {step} the loss had fallen by half of what it ever fell, on average; that of these rows by "
                "most, relative to their like."
            )
            yield Ranking(f"Learned first of the {NAMES[name]}", words, name, rows)


def _memorised(losses: dict[str, list[RowLosses]]) -> Iterator[Ranking]:
    if len(losses.get(TRAIN, [])) < 2:
        return
    training, held_out = losses[TRAIN], losses.get(HELD_OUT, [])
    ranked = memorised(training[0], training[-1], SHOWN, (held_out[0], held_out[-1]) if len(held_out) > 1 else None)
    rows = [
        ShownRow(
            each.row,
            f"{each.ratio:.2f} × its like",
            "" if each.to_held_out is None else f"{each.to_held_out:.2f} × held-out rows",
        )
        for each in ranked
    ]
    words = (
        f"From step {training[0].step} to step {training[-1].step} their loss fell most below that of other training "
        "rows, and of held-out rows too. Look for duplicates, and whether the model draws these very pictures."
    )
    yield Ranking("Perhaps learned by heart", words, TRAIN, rows)


def _describe(found: list[Ranking], path: Path) -> None:
    """Fill in names, captions and thumbnails from rows.parquet, as far as it can be read."""
    try:
        with open_regular(path) as file:
            table = pq.ParquetFile(file).read(columns=["set", "row", "name", "caption", "thumbnail"])
        wanted = pa.array(
            sorted({row.row for ranking in found for row in ranking.rows}), table.schema.field("row").type
        )
        listed = table.filter(pc.is_in(table.column("row"), wanted)).to_pylist()
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        logger.warning("%s is not a table of rows (%s): the page shows numbers only.", path, one_line(error, 100))
        return
    known = {(each["set"], each["row"]): each for each in listed}
    for ranking in found:
        for row in ranking.rows:
            if each := known.get((ranking.of_set, row.row)):
                row.name = IN_FOLDER.sub("(", each["name"] or "")  # the page may be shown to others
                row.caption = _shortened(each["caption"] or "")
                row.thumbnail = _thumbnail(each["thumbnail"])


def _shortened(caption: str) -> str:
    return caption if len(caption) <= CAPTION else f"{caption[: CAPTION - 1]}…"


def _thumbnail(content: bytes | None) -> str | None:
    """A picture's bytes as a data URI; None if there are none, or they are no picture."""
    try:
        with Image.open(io.BytesIO(content or b""), formats=["JPEG", "PNG"]) as picture:
            return picture_uri(picture, THUMBNAIL)
    except UNREADABLE:
        return None
