"""The VAE's moments of rows, kept on disk: written while training first reads each row, read instead of it later.

FOLDER/KEY/                 KEY stands for everything that made the moments; another VAE, size or crop has another
  made_by.json              those things in words
  RANK-TIME-NUMBER.arrow    up to 2,048 rows: key, height, width, moments, moments_flipped, the captions, made_by

A row's key is of its bytes, or of its file's path, size and time of change, so a changed picture is a
miss and never a wrong hit. Files are written beside, synced and renamed; what a kill leaves is the rows
that were not written yet. A file is a data set of its own for `datasets`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sd_recipes.recipe import RecipeError

logger = logging.getLogger(__name__)

FORMAT = 2  # of the files, and of how images become pixels
ROWS_PER_FILE = 2048
BYTES_PER_FILE = 256 * 2**20
STORED = {"fp16": torch.float16, "bf16": torch.bfloat16}


def row_key(encoded: dict[str, Any]) -> bytes:
    """16 bytes that name an image {"bytes", "path"}; raises OSError if its file is not there."""
    if encoded["bytes"] is not None:
        return hashlib.blake2b(encoded["bytes"], digest_size=16).digest()
    found = os.stat(encoded["path"])
    words = f"{os.path.abspath(encoded['path'])}\0{found.st_size}\0{found.st_mtime_ns}"
    return hashlib.blake2b(words.encode(), digest_size=16).digest()


def model_hash(model: torch.nn.Module) -> str:
    """Hash of a model's weights, by name, type and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def made_by(config: Any, vae: torch.nn.Module, vae_dtype: torch.dtype) -> dict[str, Any]:
    """Everything that a cached row depends on beside its image.

    The VAE comes as it was loaded, before it is cast to `vae_dtype`, so that it has one identity in all precisions.
    """
    assert all(parameter.dtype == torch.float32 for parameter in vae.parameters()), "rounded, it is another VAE"
    size: Any = config.resolution
    if config.aspect_ratio_buckets:
        size = {"area": config.resolution**2, "step": config.bucket_step, "max_upscale": config.max_upscale}
    return {
        "format": FORMAT,
        "vae": model_hash(vae),
        "vae_dtype": str(vae_dtype).removeprefix("torch."),
        "size": size,
        "crop": config.cropping,
        "interpolation": config.image_interpolation_mode,
        "flips": config.random_flip,
        "dtype": config.latent_cache_dtype,
    }


def check_made_by(found: str, wanted: dict[str, Any]) -> None:
    """Moments that come as data must be this VAE's. Raises RecipeError."""
    made = json.loads(found)
    if made["format"] != FORMAT:
        raise RecipeError(
            f"the moments of this data set are in format {made['format']}, of another version of sd-recipes, and this "
            f"one reads format {FORMAT}: make them anew with `sd-recipes cache`"
        )
    if made["vae"] != wanted["vae"]:
        raise RecipeError(
            "the moments of this data set were made by another VAE than that of --pretrained_model_name_or_path: make "
            "them anew with `sd-recipes cache`"
        )
    if made["size"] != wanted["size"]:
        raise RecipeError(f"the moments of this data set were made at {made['size']}, not {wanted['size']}: change it")
    if wanted["flips"] and not made["flips"]:
        raise RecipeError("the moments of this data set are not mirrored: drop --random_flip")


def check_makers(found: list[str], wanted: dict[str, Any]) -> None:
    """As `check_made_by`, of all that made the moments of a data set; they are to be one. Raises RecipeError."""
    for each in found:
        check_made_by(each, wanted)
    if len(found) > 1:
        ways = [json.loads(each) for each in found]
        differ = sorted(name for name in ways[0] if len({str(way.get(name)) for way in ways}) > 1)
        raise RecipeError(
            f"the moments of this data set were made in {len(found)} ways, which differ in {', '.join(differ)}: name "
            "the folder of one of them"
        )


def memory_folder(output_dir: str) -> Path:
    """A folder in memory that all processes and loader workers of a run share; Linux keeps one at /dev/shm."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        raise RecipeError("--cache_latents memory needs /dev/shm, which this machine has not: use --cache_latents disk")
    return shared / f"sd-recipes-{hashlib.blake2b(os.path.abspath(output_dir).encode(), digest_size=8).hexdigest()}"


def to_bytes(moments: torch.Tensor) -> bytes:
    return moments.contiguous().view(torch.uint8).numpy().tobytes()


def moments_of(row: dict[str, Any], *, flip: bool, latent_shape: tuple[int, int, int]) -> torch.Tensor:
    """Moments (2C, h, w) float32 of a cached row. Raises RecipeError if it has none of that kind."""
    made_by = json.loads(row["made_by"])
    stored = row["moments_flipped"] if flip else row["moments"]
    if stored is None:
        raise RecipeError("the latent cache has no mirrored moments: drop --random_flip, or make it with --random_flip")
    channels, height, width = latent_shape
    values = torch.frombuffer(bytearray(stored), dtype=STORED[made_by["dtype"]])
    return values.reshape(2 * channels, height, width).float()


class LatentCache:
    """The cache of one (VAE, size, crop, precision), for reading and writing.

    Copies in loader workers read; the one in the training process also writes, in a thread. Readers see
    what was there when they last looked: at the start, and at the beginning of every epoch, for which
    they wait until `seal` said that the epoch before is written. So which rows come from the cache does
    not depend on timing.
    """

    def __init__(self, folder: Path, made_by: dict[str, Any], rank: int, *, temporary: bool = False) -> None:
        self.temporary = temporary
        words = json.dumps(made_by, sort_keys=True)
        self.made_by = words
        self.dtype = STORED[made_by["dtype"]]
        self.keeps_flips = made_by["flips"]
        self.folder = folder / hashlib.blake2b(words.encode(), digest_size=8).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "made_by.json").write_text(json.dumps(made_by, indent=1, sort_keys=True) + "\n")
        self.rank = rank
        self._sealed = torch.zeros(1, dtype=torch.int64).share_memory_()  # epochs; seen by the workers
        self._seen_epoch: int | None = None
        self._files: list[Path] = []
        self._tables: dict[int, pa.Table] = {}
        self._keys = np.zeros(0, dtype=np.uint64)
        self._places = np.zeros((0, 2), dtype=np.int32)
        self._writer: _Writer | None = None
        self._look()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writer": None, "_tables": {}}

    @property
    def num_rows(self) -> int:
        """Rows that readers see."""
        return len(self._keys)

    def begin_epoch(self, epoch: int) -> None:
        """Look at what the epochs before wrote; waits until they are sealed. The first epoch met waits for nothing."""
        if self._seen_epoch is None:
            self._seen_epoch = epoch
        if epoch <= self._seen_epoch:
            return
        while self._sealed.item() < epoch:
            time.sleep(0.005)
        self._seen_epoch = epoch
        self._look()

    def seal(self, epoch: int) -> None:
        """Let readers go on to `epoch`: everything before it is written, by all processes."""
        self._sealed.fill_(epoch)

    def _look(self) -> None:
        """Index the files in the folder: sorted 8-byte beginnings of the keys, and where each row is."""
        known = set(self._files)
        keys, places = [self._keys], [self._places]
        for path in sorted(self.folder.glob("*.arrow")):
            if path in known:
                continue
            column = open_cached(path).column("key").to_pylist()
            keys.append(np.array([int.from_bytes(key[:8], "little") for key in column], dtype=np.uint64))
            places.append(np.stack([np.full(len(column), len(self._files)), np.arange(len(column))], axis=1))
            self._files.append(path)
        all_keys = np.concatenate(keys)
        order = np.argsort(all_keys, kind="stable")
        self._keys, self._places = all_keys[order], np.concatenate(places).astype(np.int32)[order]

    def find(self, key: bytes) -> dict[str, Any] | None:
        """The cached row of that key, or None."""
        number = np.uint64(int.from_bytes(key[:8], "little"))
        place = int(np.searchsorted(self._keys, number))
        while place < len(self._keys) and self._keys[place] == number:
            file, row = map(int, self._places[place])
            if file not in self._tables:
                self._tables[file] = open_cached(self._files[file])
            table = self._tables[file]
            if table.column("key")[row].as_py() == key:
                return {name: table.column(name)[row].as_py() for name in ("moments", "moments_flipped", "made_by")}
            place += 1
        return None

    def round(self, moments: torch.Tensor) -> torch.Tensor:
        """Moments in the precision in which they are kept, so that a run does not depend on where they came from."""
        return moments.to(self.dtype).float()

    def put(self, records: list[dict[str, Any]], moments: torch.Tensor, flipped: torch.Tensor | None) -> None:
        """Keep rows: their keys and captions, and moments (B, 2C, h, w); a whole micro-batch goes into one file."""
        if self._writer is None:
            self._writer = _Writer(self.folder, self.made_by, self.rank)
        self._writer.put(records, moments.to(self.dtype), None if flipped is None else flipped.to(self.dtype))

    def flush(self) -> None:
        """Wait until all that was put is written."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write what is left; a temporary cache is removed, by whichever process comes first."""
        self.flush()
        if self.temporary:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # it holds another run's
                self.folder.parent.rmdir()


class _Writer:
    """Writes rows to files in a thread. A full disk is told once, and ends the writing, not the run."""

    def __init__(self, folder: Path, made_by: str, rank: int) -> None:
        self.folder, self.made_by = folder, made_by
        self.prefix = f"{rank:05d}-{time.time_ns():x}"
        self.number = 0
        self.failed = False
        self.error: Exception | None = None
        self._rows: list[dict[str, Any]] = []
        self._size = 0
        self._queue: queue.Queue[Any] = queue.Queue(64)
        threading.Thread(target=self._run, name="latent-cache", daemon=True).start()

    def put(self, records: list[dict[str, Any]], moments: torch.Tensor, flipped: torch.Tensor | None) -> None:
        if not self.failed:
            self._queue.put((records, moments, flipped))

    def flush(self) -> None:
        done = threading.Event()
        self._queue.put(done)
        done.wait()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            try:
                if isinstance(item, threading.Event):
                    self._write()
                elif not self.failed:
                    self._add(*item)
            except (OSError, pa.ArrowException) as error:
                self.failed = True
                self._rows, self._size = [], 0
                logger.warning("The latent cache cannot be written (%s): training goes on without new entries.", error)
            except Exception as error:  # ours: raised where the training would otherwise wait for this thread
                self.failed, self.error = True, error
            finally:
                if isinstance(item, threading.Event):
                    item.set()

    def _add(self, records: list[dict[str, Any]], moments: torch.Tensor, flipped: torch.Tensor | None) -> None:
        # Copied here, so that only this thread waits for the device.
        moments = moments.cpu()
        flipped = None if flipped is None else flipped.cpu()
        for number, record in enumerate(records):
            row = {
                **record,
                "moments": to_bytes(moments[number]),
                "moments_flipped": None if flipped is None else to_bytes(flipped[number]),
                "made_by": self.made_by,
            }
            self._rows.append(row)
            self._size += len(row["moments"]) * (1 if flipped is None else 2)
        if len(self._rows) >= ROWS_PER_FILE or self._size >= BYTES_PER_FILE:
            self._write()

    def _write(self) -> None:
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows)
        table = table.set_column(
            table.schema.get_field_index("moments_flipped"),
            "moments_flipped",
            table.column("moments_flipped").cast(pa.binary()),
        )
        final = self.folder / f"{self.prefix}-{self.number:05d}.arrow"
        temporary = final.with_suffix(".partial")
        try:
            with open(temporary, "wb") as file:
                with pa.ipc.new_stream(file, table.schema) as writer:
                    writer.write_table(table, max_chunksize=64)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
        self.number += 1
        self._rows, self._size = [], 0


def open_cached(path: Path) -> pa.Table:
    """The rows of a file of the cache, memory-mapped: they are read from the disk when they are asked for."""
    try:
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowException) as error:
        raise RecipeError(f"{path} of the latent cache cannot be read ({error}): remove it") from error
