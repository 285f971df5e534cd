"""A recipe's data, read, checked and put in order: rows or streams, and the plans of what is trained on when."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from transformers import CLIPTokenizer

from sd_recipes.data.bad_rows import BadRows
from sd_recipes.data.batches import Plans
from sd_recipes.data.checks import check_bad_rows_again, check_held_out, check_rows, check_stream
from sd_recipes.data.first_words import NUM_EXAMPLES, example_captions, first_words
from sd_recipes.data.order import Order, plans_of_order
from sd_recipes.data.rows import join_rows, load_held_out_rows, load_sources, load_streams
from sd_recipes.data.shards import Shards
from sd_recipes.data.sizes import assign_buckets, check_held_out_sizes, has_buckets, size_of_row
from sd_recipes.data.sources import is_local
from sd_recipes.data.stream import Stream
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import DataSource, Recipe
from sd_recipes.runtime.agreement import all_gather_in_thread
from sd_recipes.runtime.console import say


@dataclass
class TrainingData:
    """Rows with their order, or streams; and the rows of the held-out split."""

    rows: datasets.Dataset | None
    order: Order | None
    streams: list[datasets.IterableDataset]
    held_out_rows: datasets.Dataset | None
    bad_rows: BadRows
    global_batch_size: int  # images of an optimizer step, over all processes

    @property
    def num_rows(self) -> int | None:
        return None if self.rows is None else len(self.rows)

    @property
    def provenances(self) -> list[str]:
        """Provenance of the moments, where rows have moments instead of images; for a stream, that of its first row."""
        if self.rows is not None:
            return self.rows.unique("made_by") if "made_by" in self.rows.column_names else []
        first = [next(iter(stream)) for stream in self.streams if "made_by" in (stream.column_names or ())]
        return [row["made_by"] for row in first]


def load_training_data(
    recipe: Recipe, tokenizer: CLIPTokenizer, *, seed: int, global_batch_size: int, rank: int
) -> TrainingData:
    """Read and check everything that a recipe says about data; the first process says what it was taken for.

    Raises RecipeError and TooManyBadRows.
    """
    held_out = None
    if recipe.validation_split:
        held_out = load_held_out_rows(recipe, recipe.validation_split, recipe.cache_dir)
        check_held_out_sizes(held_out, recipe)
        if recipe.check_data != "off" and rank == 0:
            check_held_out(held_out, recipe, tokenizer, seed=seed)
    output_dir = Path(recipe.output_dir)
    if recipe.streaming:
        streams = load_streams(recipe, cache_dir=recipe.cache_dir)
        examples: list[str] = []
        if recipe.check_data != "off" and rank == 0:
            for stream in streams:
                first_rows = check_stream(stream.rows, recipe, tokenizer)
                examples = examples or example_captions(first_rows[:NUM_EXAMPLES], recipe)
        bad_rows = BadRows(output_dir, recipe.max_bad_rows, None, rank, writes=not recipe.dry_run)
        if rank == 0:
            say(first_words(recipe, [stream.recognised for stream in streams], None, examples))
        return TrainingData(None, None, [stream.rows for stream in streams], held_out, bad_rows, global_batch_size)

    parts = load_sources(recipe, cache_dir=recipe.cache_dir)
    lengths, weights = tuple(len(part.rows) for part in parts), None
    if len(parts) > 1:
        weights = weights_of(recipe.sources)
    rows = join_rows([part.rows for part in parts], recipe.max_train_samples, seed)
    if rank == 0:
        say(first_words(recipe, [part.recognised for part in parts], len(rows), example_captions(rows, recipe)))
    if len(rows) < sum(lengths):
        if weights:
            raise RecipeError("--max_train_samples and data_sources contradict each other: drop one")
        lengths = (len(rows),)
    if global_batch_size > len(rows):
        raise RecipeError(
            f"the global batch is {global_batch_size} (--train_batch_size {recipe.train_batch_size} x "
            f"--gradient_accumulation_steps {recipe.gradient_accumulation_steps} x the number of processes) and the "
            f"data set has {len(rows)} rows: lower one of them"
        )
    bad_rows = BadRows(output_dir, recipe.max_bad_rows, len(rows), rank, writes=not recipe.dry_run)
    if rank == 0:
        check_bad_rows_again(rows, recipe, tokenizer, bad_rows=bad_rows)
    if recipe.check_data != "off" and rank == 0:
        check_rows(rows, recipe, tokenizer, seed=seed, bad_rows=bad_rows)
    order = Order(lengths, global_batch_size, seed, weights, ((recipe.resolution, recipe.resolution),))
    if has_buckets(rows, recipe):
        sizes, buckets = assign_buckets(rows, recipe)
        order = replace(order, sizes=sizes, buckets=buckets)
    return TrainingData(rows, order, [], held_out, bad_rows, global_batch_size)


def weights_of(sources: list[DataSource]) -> tuple[float, ...] | None:
    """The sources' shares of an epoch; None where each row comes as often as it is there."""
    weights = tuple(source.weight for source in sources if source.weight != "rows")
    return weights or None


def plans(data: TrainingData, recipe: Recipe, *, rank: int, world_size: int) -> Plans:
    """What a process trains on, from any position on."""
    place: dict[str, Any] = {"rank": rank, "world_size": world_size, "micro_batch_size": recipe.train_batch_size}
    if data.order is not None:
        return partial(plans_of_order, data.order, **place)
    assert recipe.seed is not None
    outage_seconds = 60 * recipe.stream_outage_minutes
    shards = [
        Shards(stream, source.flag, outage_seconds, is_local=is_local(source))
        for stream, source in zip(data.streams, recipe.sources, strict=True)
    ]
    return Stream(
        shards,
        weights=list(weights_of(recipe.sources) or (1.0,)),
        seed=recipe.seed,
        global_batch_size=data.global_batch_size,
        shuffle_block=recipe.shuffle_block,
        size_of=size_of_row(recipe),
        agree=all_gather_in_thread(world_size),
        **place,
    ).micro_batches
