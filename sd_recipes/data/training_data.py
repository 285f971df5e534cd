"""A recipe's data, read, checked and put in order: rows or streams, and the plans of what is trained on when."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from transformers import CLIPTokenizer

from sd_recipes.data.bad_rows import BadRows
from sd_recipes.data.batches import Plans
from sd_recipes.data.checks import check_bad_rows_again, check_held_out, check_rows, check_stream
from sd_recipes.data.class_rows import ClassRows
from sd_recipes.data.first_words import NUM_EXAMPLES, example_captions, first_words
from sd_recipes.data.guard import guarded
from sd_recipes.data.held_out import FixedRows, choose, divide_streams, held_out_numbers, warn_of_rows_in_both
from sd_recipes.data.masks import has_mask, masks_in_words
from sd_recipes.data.order import Order, plans_of_order
from sd_recipes.data.rows import SourceRows, join_rows, load_held_out_rows, load_sources, load_streams
from sd_recipes.data.shards import Shards, with_bytes
from sd_recipes.data.sizes import assign_buckets, check_held_out_sizes, has_buckets, size_of_row
from sd_recipes.data.sources import is_local
from sd_recipes.data.stream import Stream
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import DataSource, Recipe
from sd_recipes.runtime.agreement import all_gather_in_thread
from sd_recipes.runtime.console import say


@dataclass
class TrainingData:
    """Rows with their order, or streams; and rows that every validation looks at: held-out ones, and trained ones."""

    rows: datasets.Dataset | None  # class pictures last
    order: Order | None
    streams: list[datasets.IterableDataset]
    held_out: FixedRows | None
    watched: FixedRows | None
    bad_rows: BadRows
    global_batch_size: int  # images of an optimizer step, over all processes; class pictures come on top
    class_rows: ClassRows | None = None

    @property
    def num_rows(self) -> int | None:
        """Rows that are trained, without class pictures."""
        return None if self.order is None else self.order.num_rows

    def has_all_rows(self, epochs: range) -> bool:
        """Whether these epochs have each row, class pictures too; of a stream nobody knows."""
        if self.order is None or not self.order.has_all_rows or not epochs:
            return False
        samples = range(epochs.start * self.order.num_rows, epochs.stop * self.order.num_rows)
        return self.class_rows is None or self.class_rows.all_come_beside(samples)

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
    output_dir = Path(recipe.output_dir)
    held_out = watched = None  # rows
    if recipe.validation_split and not recipe.divides_rows:
        held_out = load_held_out_rows(recipe, recipe.validation_split, recipe.cache_dir)
        check_held_out_sizes(held_out, recipe)
        if recipe.check_data != "off" and rank == 0:
            check_held_out(held_out, recipe, tokenizer, seed=seed)
    if recipe.streaming:
        streams = load_streams(recipe, cache_dir=recipe.cache_dir)
        if recipe.divides_rows:
            held_out, watched = hold_out_of_streams(streams, recipe)
        elif held_out is not None:
            number = min(len(held_out), recipe.validation_rows)
            watched = guarded(recipe.sources[0], partial(first_rows, streams[0].rows, number))
        examples: list[str] = []
        if recipe.check_data != "off" and rank == 0:
            for stream in streams:
                checked_rows = check_stream(stream.rows, recipe, tokenizer)
                examples = examples or example_captions(checked_rows[:NUM_EXAMPLES], recipe)
                if recipe.masked_loss:
                    number = sum(has_mask(row, recipe) for row in checked_rows)
                    stream.recognised.notes.append(f"masks: {number} of its first {len(checked_rows)} rows have one")
        bad_rows = BadRows(output_dir, recipe.max_bad_rows, None, rank, writes=not recipe.dry_run)
        if rank == 0:
            say(first_words(recipe, [stream.recognised for stream in streams], None, examples, held_out))
        rows_of_streams = [stream.rows for stream in streams]
        return TrainingData(
            None, None, rows_of_streams, *fixed_rows(held_out, watched, recipe), bad_rows, global_batch_size
        )

    every_part = load_sources(recipe, cache_dir=recipe.cache_dir)
    parts, class_parts = every_part[: len(recipe.trained_sources)], every_part[len(recipe.trained_sources) :]
    if recipe.divides_rows:
        held_out = hold_out(parts, recipe)
        check_held_out_sizes(held_out, recipe)
    lengths, weights = tuple(len(part.rows) for part in parts), None
    if len(parts) > 1:
        weights = weights_of(recipe.trained_sources)
    trained = join_rows([part.rows for part in parts], recipe.max_train_samples, seed)
    rows = join_rows([trained, *(part.rows for part in class_parts)], None, None)
    if rank == 0:
        examples = example_captions(trained, recipe)
        for part in class_parts:
            part.recognised.notes.append(class_pictures_in_words(recipe))
        if recipe.masked_loss:
            parts[0].recognised.notes.append(masks_in_words(trained, recipe))
        say(first_words(recipe, [part.recognised for part in every_part], len(trained), examples, held_out))
    if len(trained) < sum(lengths):
        if weights:
            raise RecipeError("--max_train_samples and data_sources contradict each other: drop one")
        lengths = (len(trained),)
    if global_batch_size > len(trained):
        raise RecipeError(
            f"the global batch is {global_batch_size} (--train_batch_size {recipe.train_batch_size} x "
            f"--gradient_accumulation_steps {recipe.gradient_accumulation_steps} x the number of processes) and the "
            f"data set has {len(trained)} rows: lower one of them"
        )
    bad_rows = BadRows(output_dir, recipe.max_bad_rows, len(rows), rank, writes=not recipe.dry_run)
    if rank == 0:
        check_bad_rows_again(rows, recipe, tokenizer, bad_rows=bad_rows)
    if recipe.check_data != "off" and rank == 0:
        check_rows(rows, recipe, tokenizer, seed=seed, bad_rows=bad_rows)
        if held_out is not None and not recipe.divides_rows:
            warn_of_rows_in_both(held_out, trained, recipe)
    order = Order(lengths, global_batch_size, seed, weights, ((recipe.resolution, recipe.resolution),))
    if has_buckets(rows, recipe):
        sizes, buckets = assign_buckets(rows, recipe)
        order = replace(order, sizes=sizes, buckets=buckets)
    class_rows = None
    if class_parts:
        number = len(rows) - len(trained)
        class_rows = ClassRows(len(trained), number, seed, recipe.prior_loss_weight, order.sizes, order.buckets)
    fixed = fixed_rows(held_out, trained, recipe)
    return TrainingData(rows, order, [], *fixed, bad_rows, global_batch_size, class_rows)


def hold_out(parts: list[SourceRows], recipe: Recipe) -> datasets.Dataset:
    """The rows that --validation_split holds out of the sources' rows, which are trained on without them.

    Raises RecipeError.
    """
    held_out = []
    for part, (trained, chosen) in zip(parts, held_out_numbers([part.rows for part in parts], recipe), strict=True):
        held_out.append(part.rows.select(chosen))
        part.rows = part.rows.select(trained)
    return join_rows(held_out, None, None)


def hold_out_of_streams(streams: list[SourceRows], recipe: Recipe) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Likewise of streams; and some of the rows that are trained on. Raises RecipeError."""
    features = streams[0].rows.features
    rows = [stream.rows for stream in streams]
    divided, *sides = guarded(recipe.sources[0], partial(divide_streams, rows, recipe))
    for stream, trained in zip(streams, divided, strict=True):
        stream.rows = trained
    held_out, watched = (datasets.Dataset.from_list(side, features=features) for side in sides)
    return held_out, watched


def first_rows(stream: datasets.IterableDataset, number: int) -> datasets.Dataset:
    """The first rows of a stream, in memory."""
    rows = [with_bytes(row) for row in itertools.islice(stream, number)]
    return datasets.Dataset.from_list(rows, features=stream.features)


def fixed_rows(
    held_out: datasets.Dataset | None, trained: datasets.Dataset | None, recipe: Recipe
) -> tuple[FixedRows | None, FixedRows | None]:
    """The held-out rows that validations look at, and as many of those that are trained on."""
    if held_out is None or trained is None:
        return None, None
    chosen = choose(held_out, recipe.validation_rows)
    return chosen, choose(trained, len(chosen))


def class_pictures_in_words(recipe: Recipe) -> str:
    """What class pictures are for."""
    teach = "" if recipe.prior_preservation == "pictures" else ", towards what the model predicted before training"
    return f"class pictures: one beside each trained picture, its loss times {recipe.prior_loss_weight:g}{teach}"


def weights_of(sources: list[DataSource]) -> tuple[float, ...] | None:
    """The sources' shares of an epoch; None where each row comes as often as it is there."""
    weights = tuple(source.weight for source in sources if source.weight != "rows")
    return weights or None


def plans(data: TrainingData, recipe: Recipe, *, rank: int, world_size: int) -> Plans:
    """What a process trains on, from any position on."""
    place: dict[str, Any] = {"rank": rank, "world_size": world_size, "micro_batch_size": recipe.train_batch_size}
    if data.order is not None:
        if data.class_rows is not None:
            place["beside"] = data.class_rows.beside
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
