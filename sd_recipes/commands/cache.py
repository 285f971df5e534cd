"""`sd-recipes cache`: fill the latent cache before training, on any number of processes."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import HfApi
from tqdm.auto import tqdm

from sd_recipes.data.batches import BatchBuilder, TrainingBatches
from sd_recipes.data.captions import caption_columns
from sd_recipes.data.latent_store import ROWS_PER_FILE, LatentStore, open_cached, provenance_of
from sd_recipes.data.order import MicroBatch, Order
from sd_recipes.data.training_data import load_training_data
from sd_recipes.data.workers import num_workers_of
from sd_recipes.errors import RecipeError, RunError, one_line
from sd_recipes.export.hub import PushError
from sd_recipes.model.components import latent_shape_of, load_scheduler, load_vae
from sd_recipes.model.families import check_trainable, family_of
from sd_recipes.model.latents import bearable_dtype
from sd_recipes.recipe import Recipe
from sd_recipes.redaction import shown
from sd_recipes.runtime.accelerator import DTYPES, start_accelerator
from sd_recipes.runtime.agreement import all_gather, wait_for_all
from sd_recipes.runtime.console import hide_library_bars, say
from sd_recipes.runtime.output_dir import check_output_dir
from sd_recipes.runtime.signals import stop_request
from sd_recipes.training.build_model import build_encoder

logger = logging.getLogger(__name__)


def fill_cache(recipe: Recipe) -> Path:
    """Encode all rows that the cache lacks; returns its folder, which is a data set of moments and captions.

    Killed and started again, it continues where its files end. Raises RecipeError, TooManyBadRows, Stopped and,
    once everything is written, PushError.
    """
    hide_library_bars()
    if recipe.dry_run:
        raise RecipeError("`sd-recipes cache` fills the cache and has no dry run: drop --dry_run")
    if recipe.streaming:
        raise RecipeError("`sd-recipes cache` goes through all rows, and a stream has no end: drop --streaming")
    if recipe.cropping == "random":
        raise RecipeError(
            "`sd-recipes cache` keeps one crop of an image, and the crop would be random: add --center_crop"
        )
    if recipe.cache_latents == "memory":
        raise RecipeError("`sd-recipes cache` fills a cache on disk: drop --cache_latents memory")
    accelerator = start_accelerator(recipe)
    output_dir = Path(recipe.output_dir)
    check_output_dir(output_dir)
    check_trainable(recipe)
    family = family_of(recipe)
    scheduler, tokenizers = load_scheduler(recipe), family.load_tokenizers(recipe)
    data = load_training_data(
        recipe, tokenizers[0], seed=recipe.seed or 0, global_batch_size=1, rank=accelerator.process_index
    )
    assert data.rows is not None
    assert data.order is not None
    if "moments" in data.rows.column_names:
        raise RecipeError("this data set is a latent cache already: train on it")

    vae = load_vae(recipe)
    vae_dtype = bearable_dtype(vae, DTYPES[accelerator.mixed_precision], accelerator.device)
    # Of the weights as they were loaded
    provenance = provenance_of(recipe, vae, vae_dtype, tiling=recipe.vae_tiling)
    encoder = build_encoder(recipe, vae, accelerator, vae_dtype)
    folder = Path(recipe.latent_cache_dir or output_dir / "latents")
    store = LatentStore(folder, provenance, accelerator.process_index)
    builder = BatchBuilder(
        data.rows,
        recipe,
        seed=0,
        tokenize=partial(family.tokenize, tokenizers),
        latent_shape=latent_shape_of(vae),
        num_train_timesteps=scheduler.config.num_train_timesteps,
        store=store,
    )
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    plans = list(_plans(data.order, len(data.rows), recipe.train_batch_size, **place))
    batches = TrainingBatches(
        builder,
        lambda *_: iter(plans),
        num_workers=num_workers_of(recipe, accelerator.device.type),
        pin_memory=accelerator.device.type == "cuda",
    )
    with (
        closing(batches(0, len(plans))) as steps,
        tqdm(total=len(data.rows), desc="Latents", unit="row", disable=not accelerator.is_local_main_process) as bar,
    ):
        for (batch,) in steps:
            data.bad_rows.add(batch.bad, 0)
            batch.to(accelerator.device).all_moments(encoder.encode, store)
            store.keep()
            if store.failure:
                raise RecipeError(cannot_fill(store))
            bar.update(min(len(batch.weights) * accelerator.num_processes, len(data.rows) - bar.n))
            if stop_request.reason:
                store.flush()
                raise stop_request.stopped(f"{bar.n} of {len(data.rows)} rows are in the cache")
    data.bad_rows.check(len({name for names in all_gather(list(data.bad_rows.reasons)) for name in names}), 0)
    store.flush()
    if store.failure:
        raise RecipeError(cannot_fill(store))
    wait_for_all()
    try:
        if accelerator.is_main_process:
            finish(store, folder, data.rows, recipe)
    except RunError:  # as in commands/train.py: the other processes end as usual
        with suppress(RuntimeError):
            wait_for_all()
        raise
    wait_for_all()
    accelerator.end_training()
    return store.folder


def cannot_fill(cache: LatentStore) -> str:
    return (
        f"{cache.folder} cannot be written ({cache.failure}): make room, or choose another --latent_cache_dir; started "
        "again, the command continues where the files end"
    )


def finish(cache: LatentStore, folder: Path, rows: datasets.Dataset, recipe: Recipe) -> None:
    """Print what is in the cache, and push it. Raises RecipeError and PushError."""
    files = list(cache.folder.glob("*.arrow"))
    size = sum(path.stat().st_size for path in files)
    say(f"latent cache    {cache.folder}: {len(files)} files, {size / 2**20:.1f} MiB")
    say(f"train on it     --cache_latents disk --latent_cache_dir {folder}, with the same data and settings")
    strange = rows_of_no_data(files, rows, caption_columns(recipe))
    if strange:
        words = (
            f"{strange} rows in {cache.folder} are not of this data set as it is now (captions or pictures have "
            "changed, or rows are there twice): to use it as a data set of its own, fill an empty --latent_cache_dir"
        )
        if recipe.push_to_hub:
            raise RecipeError(f"not pushed: {words}")
        logger.warning("%s", words)
    if recipe.push_to_hub:
        say(f"pushed          {push_cache(cache.folder, recipe)}")


def rows_of_no_data(files: list[Path], rows: datasets.Dataset, columns: list[str]) -> int:
    """How many rows of a cache's files are left over when each row of the data is given one with its captions."""
    cached: Counter[str] = Counter()
    for path in files:
        cached.update(map(json.dumps, open_cached(path).select(columns).to_pylist()))
    captions = rows.select_columns(columns)
    for start in range(0, len(captions), ROWS_PER_FILE):
        some = captions[start : start + ROWS_PER_FILE]
        for values in zip(*(some[name] for name in columns), strict=True):
            cached[json.dumps(dict(zip(columns, values, strict=True)))] -= 1
    return sum(number for number in cached.values() if number > 0)


def _plans(order: Order, num_rows: int, batch_size: int, *, rank: int, world_size: int) -> Iterator[MicroBatch]:
    """Every row once, class pictures too, in the order of the data set and in batches of one size.

    Each process has its share.
    """
    buckets = np.zeros(num_rows, dtype=int) if order.buckets is None else order.buckets
    done = 0
    for bucket, size in enumerate(order.sizes):
        rows = np.flatnonzero(buckets == bucket)[rank::world_size]
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            done += len(chosen)
            yield MicroBatch(
                rows=chosen,
                positions=chosen,
                strata=np.zeros(len(chosen), dtype=int),
                global_batch_size=1,
                weight=1.0,
                is_last=True,
                samples_seen=done,
                ends_epoch=False,
                epoch=0,
                size=size,
            )


def push_cache(folder: Path, recipe: Recipe) -> str:
    """Upload a cache as a data set repository; returns its address. Raises PushError."""
    api = HfApi()
    name: Any = recipe.hub_model_id or Path(recipe.output_dir).resolve().name
    base = shown(recipe.pretrained_model_name_or_path or "")
    (folder / "README.md").write_text(
        f"---\ntags:\n- latents\n---\n\n# VAE moments\n\nMade by `sd-recipes cache` with the VAE of "
        f"`{base}`; `made_by.json` says with which settings. Train on it with "
        f"`--dataset_name {name}`, and `--streaming` if it is large.\n",
        encoding="utf-8",
    )
    try:
        repo_id = api.create_repo(name, repo_type="dataset", exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=["*.arrow", "made_by.json", "README.md"],
            commit_message="VAE moments",
        )
    except Exception as error:  # as in hub.publish: all of them are about the repository that the user named
        raise PushError(
            f"the cache is complete in {folder} but not pushed ({one_line(error, 200)}). Push it with: "
            f"hf upload {name} {folder} . --repo-type dataset --exclude '*.partial'"
        ) from error
    return f"{api.endpoint}/datasets/{repo_id}"
