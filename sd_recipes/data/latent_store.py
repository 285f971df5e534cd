"""The VAE's moments of rows, kept on disk: written when training first reads a row, and read instead of it later.

FOLDER/KEY/                 KEY stands for all that the moments depend on; another VAE, size or crop has another
  made_by.json              the same in words
  RANK-TIME-NUMBER.arrow    up to 2,048 rows: key, four sizes, moments, moments_flipped, the captions, made_by, and
                            with --masked_loss the mask at the latent's size

A row's key is a hash of its image's bytes, or of the file's path, size and modification time, so a changed
picture is a miss and never a wrong hit. Files are written under another name, synced and renamed; a kill loses
only the rows that were not written yet. For `datasets`, each file is a data set of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import queue
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch

from sd_recipes.data.columns import LATENT_MASK, SIZE_COLUMNS
from sd_recipes.errors import RecipeError
from sd_recipes.recipe import DataSettings
from sd_recipes.runtime.agreement import wait_for_all

logger = logging.getLogger(__name__)

FORMAT = 4  # of the files, and of how images become pixels
ROWS_PER_FILE = 2048
BYTES_PER_FILE = 256 * 2**20
SHARED_MEMORY = Path("/dev/shm")
NUMBERS_TO_SORT = 2**16
END = 2**62  # an epoch that is never reached
PARTIAL = ".partial"  # of a file that is being written, and locked
STORED = {"fp16": torch.float16, "bf16": torch.bfloat16}


def row_key(encoded: dict[str, Any], mask: dict[str, Any] | None = None) -> bytes:
    """16 bytes that name an image {"bytes", "path"}, and its mask; raises OSError if a file is not there."""
    if mask is not None:
        return hashlib.blake2b(row_key(encoded) + row_key(mask), digest_size=16).digest()
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


def provenance_of(
    config: DataSettings, vae: torch.nn.Module, vae_dtype: torch.dtype, *, tiling: bool = False
) -> dict[str, Any]:
    """Everything that a cached row depends on besides its image.

    The VAE is passed as it was loaded, before it is cast to `vae_dtype`, so that it has one identity in all precisions.
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
        **({"tiling": True} if tiling else {}),
        **({"masks": "with alpha" if config.mask_from_alpha else "without alpha"} if config.masked_loss else {}),
    }


def check_provenance(found: str, wanted: dict[str, Any]) -> None:
    """Check that moments that come as data are this VAE's. Raises RecipeError."""
    made = json.loads(found)
    if made["format"] != FORMAT:
        raise RecipeError(
            f"the moments of this data set are in format {made['format']}, of another version of sd-recipes, and this "
            f"one reads format {FORMAT}: make them again with `sd-recipes cache`"
        )
    if made["vae"] != wanted["vae"]:
        raise RecipeError(
            "the moments of this data set were made by another VAE than that of --pretrained_model_name_or_path: make "
            "them again with `sd-recipes cache`"
        )
    if made["size"] != wanted["size"]:
        raise RecipeError(
            f"the moments of this data set were made at {made['size']}, not {wanted['size']}: change --resolution, or "
            "the settings of the buckets"
        )
    if wanted["flips"] and not made["flips"]:
        raise RecipeError("the moments of this data set are not mirrored: drop --random_flip")
    if "masks" in wanted and wanted["masks"] != made.get("masks"):
        raise RecipeError(
            f"the moments of this data set were made {_masks_in_words(made)}, and this run wants them "
            f"{_masks_in_words(wanted)}: change the flags, or make them again with `sd-recipes cache`"
        )


def _masks_in_words(provenance: dict[str, Any]) -> str:
    masks = {"with alpha": "with masks, also of --mask_from_alpha", "without alpha": "with masks of --masked_loss"}
    return masks.get(provenance.get("masks", ""), "without masks")


def check_one_provenance(found: list[str], wanted: dict[str, Any]) -> None:
    """Like `check_provenance`, for every provenance in a data set; there may only be one. Raises RecipeError."""
    for each in found:
        check_provenance(each, wanted)
    if len(found) > 1:
        ways = [json.loads(each) for each in found]
        differ = sorted(name for name in ways[0] if len({str(way.get(name)) for way in ways}) > 1)
        raise RecipeError(
            f"the moments of this data set were made in {len(found)} ways, which differ in {', '.join(differ)}: name "
            "the folder of one of them"
        )


def memory_folder(output_dir: str) -> Path:
    """A folder in memory that all processes and loader workers of a run share; Linux keeps one at /dev/shm.

    Private to this user. Its name can be guessed, so another user may have made it: raises RecipeError then.
    """
    folder = _memory_folder(output_dir)
    if not SHARED_MEMORY.is_dir():
        raise RecipeError("--cache_latents memory needs /dev/shm, which this machine lacks: use --cache_latents disk")
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass  # another process of the run was first, or another user
    except OSError as error:
        raise RecipeError(f"{folder} cannot be made ({error.strerror}): use --cache_latents disk") from None
    found = os.lstat(folder)
    if not _is_own(found) or found.st_mode & 0o077:
        raise RecipeError(
            f"{folder}, where --cache_latents memory would keep this run's latents, is not a private folder of this "
            "user: remove it, use --cache_latents disk, or choose another --output_dir"
        )
    return folder


def remove_memory_folder(output_dir: str) -> None:
    """Free the memory that a killed run with this output folder left, before the next run begins."""
    folder = _memory_folder(output_dir)
    with suppress(FileNotFoundError):
        if _is_own(os.lstat(folder)):
            shutil.rmtree(folder, ignore_errors=True)


def _memory_folder(output_dir: str) -> Path:
    name = hashlib.blake2b(os.path.abspath(output_dir).encode(), digest_size=8).hexdigest()
    return SHARED_MEMORY / f"sd-recipes-{name}"


def _is_own(found: os.stat_result) -> bool:
    """Whether it is a folder, not a link, that belongs to this user."""
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def to_bytes(moments: torch.Tensor) -> bytes:
    return moments.contiguous().view(torch.uint8).numpy().tobytes()


def moments_of(row: dict[str, Any], *, flip: bool, latent_shape: tuple[int, int, int]) -> torch.Tensor:
    """Moments (2C, h, w) float32 of a cached row. Raises RecipeError if it has none of that kind."""
    provenance = json.loads(row["made_by"])
    stored = row["moments_flipped"] if flip else row["moments"]
    if stored is None:
        raise RecipeError("the latent cache has no mirrored moments: drop --random_flip, or make it with --random_flip")
    channels, height, width = latent_shape
    values = torch.frombuffer(bytearray(stored), dtype=STORED[provenance["dtype"]])
    return values.reshape(2 * channels, height, width).float()


class LatentStore:
    """The cache of one (VAE, size, crop, precision), for reading and writing.

    Copies in loader workers read; the one in the training process also writes, in a thread. Readers see
    what was there when they last looked: at the start of the run, and at the start of every epoch, for which
    they wait until `publish_epoch` says that the epoch before is written. So which rows come from the cache does
    not depend on timing. Once all rows were seen there is nothing more to wait for.
    """

    def __init__(self, folder: Path, provenance: dict[str, Any], rank: int, *, temporary: bool = False) -> None:
        self.temporary = temporary
        words = json.dumps(provenance, sort_keys=True)
        self.provenance = words
        self.dtype = STORED[provenance["dtype"]]
        self.keeps_flips = provenance["flips"]
        self.kept_columns = ["moments", "moments_flipped", "made_by", *SIZE_COLUMNS]
        if "masks" in provenance:
            self.kept_columns.append(LATENT_MASK)
        self.folder = folder / hashlib.blake2b(words.encode(), digest_size=8).hexdigest()
        self.rank = rank
        self.failure: str | None = None  # why nothing can be added
        self._describe(json.dumps(provenance, indent=1, sort_keys=True) + "\n")
        _remove_leftovers(folder)
        self._published = torch.zeros(1, dtype=torch.int64).share_memory_()  # epoch that readers may begin
        self._seen_epoch = self._first_whole_epoch = 0
        self._files: list[Path] = []
        self._tables: dict[int, pa.Table] = {}
        self._keys = np.zeros(0, dtype=np.uint64)
        self._places = np.zeros((0, 2), dtype=np.int32)
        self._put = _Numbers()
        self._noted: list[tuple[list[dict[str, Any]], torch.Tensor, torch.Tensor | None]] = []
        self._writer: _Writer | None = None
        self._look()

    def _describe(self, words: str) -> None:
        """Write made_by.json, unless it is there. An existing cache can be read even where it cannot be written."""
        path = self.folder / "made_by.json"
        beside = path.with_name(f"{self.rank:05d}-{time.time_ns():x}-json{PARTIAL}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if path.is_file() and path.read_text(encoding="utf-8") == words:
                return
            with _held(beside) as file:
                file.write(words.encode())
                file.flush()
                os.replace(beside, path)
        except OSError as error:
            if not self.folder.is_dir():
                raise RecipeError(
                    f"the latent cache {self.folder} cannot be made ({error.strerror}): choose another "
                    "--latent_cache_dir, or drop --cache_latents"
                ) from None
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = str(error)
            logger.warning("The latent cache %s cannot be written (%s): it is read, and no rows are added.",
                           self.folder, error)  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writer": None, "_tables": {}, "_put": _Numbers(), "_noted": []}

    @property
    def num_rows(self) -> int:
        """Rows that readers see."""
        return len(self._keys)

    def start_at(self, epoch: int, *, is_within: bool) -> None:
        """The run begins with this epoch, or within it; it waits for nothing.

        Call it before the workers get their copies.
        """
        self._seen_epoch, self._first_whole_epoch = epoch, epoch + is_within

    def begin_epoch(self, epoch: int) -> None:
        """Wait until the epochs before are published, and look at what they wrote."""
        if epoch <= self._seen_epoch:
            return
        while self._published.item() < epoch:
            time.sleep(0.005)
        self._seen_epoch = int(self._published.item())
        self._look()

    def whole_epochs(self, epoch: int) -> range:
        """The epochs until the end of this one, without one that the run began within."""
        return range(self._first_whole_epoch, epoch + 1)

    def end_epoch(self, epoch: int, *, is_full: bool) -> None:
        """Make the rows of an epoch available to the next one, on all processes; all of them have to call it.

        Where all rows are there, there is nothing more to wait for: readers go on into later epochs while the step
        before them is still on its way.
        """
        self.flush()
        wait_for_all()
        self.publish_epoch(END if is_full else epoch + 1)

    def publish_epoch(self, epoch: int) -> None:
        """Let readers continue to `epoch`: all processes have written everything before it."""
        self._published.fill_(epoch)

    def _look(self) -> None:
        """Index the files in the folder: the first 8 bytes of the keys, sorted, and where each row is."""
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
                return {name: table.column(name)[row].as_py() for name in self.kept_columns}
            place += 1
        return None

    def round(self, moments: torch.Tensor) -> torch.Tensor:
        """Moments rounded to the precision in which they are kept, so that it does not matter where they came from."""
        return moments.to(self.dtype).float()

    def put(self, records: list[dict[str, Any]], moments: torch.Tensor, flipped: torch.Tensor | None) -> None:
        """Note rows to `keep`: their keys and captions, and moments (B, 2C, h, w)."""
        if self.failure is None:
            self._noted.append((records, moments.to(self.dtype), None if flipped is None else flipped.to(self.dtype)))

    def forget(self) -> None:
        """Leave out the rows noted since the last `keep`: they come again, maybe encoded in other batches."""
        self._noted = []

    def keep(self) -> None:
        """Keep the rows that were noted, once what they were encoded for is done."""
        noted, self._noted = self._noted, []
        for records, moments, flipped in noted:
            self._keep(records, moments, flipped)

    def _keep(self, records: list[dict[str, Any]], moments: torch.Tensor, flipped: torch.Tensor | None) -> None:
        """Each row once, however often it comes.

        A row comes again before readers see it where an epoch has it several times, or where the epoch never ends.
        """
        if self._writer is None:
            self._writer = _Writer(self.folder, self.provenance, self.rank, self._give_up)
        new = [number for number, record in enumerate(records) if self._put.add(_row_hash(record))]
        if not new:
            return
        if len(new) < len(records):
            records = [records[number] for number in new]
            moments, flipped = moments[new], None if flipped is None else flipped[new]
        self._writer.put(records, moments, flipped)

    def flush(self) -> None:
        """Wait until all that was noted is kept and written."""
        self.keep()
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write what is left; a temporary cache is removed."""
        self.flush()
        self.give_back()

    def give_back(self) -> None:
        """Remove a temporary cache; whichever process comes first does it."""
        if self.temporary:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # it holds another run's cache
                self.folder.parent.rmdir()


def _row_hash(record: dict[str, Any]) -> int:
    """8 bytes of a row's picture and captions: one picture with other captions is another row of a data set."""
    words = json.dumps([record[name] for name in sorted(record) if name != "key"], default=str)
    return int.from_bytes(hashlib.blake2b(record["key"] + words.encode(), digest_size=8).digest(), "little")


class _Numbers:
    """A set of 8-byte numbers that takes little more memory than those bytes."""

    def __init__(self) -> None:
        self._old = np.zeros(0, dtype=np.uint64)  # sorted
        self._new: set[int] = set()

    def add(self, number: int) -> bool:
        """Add a number; whether it is a new one."""
        place = int(np.searchsorted(self._old, np.uint64(number)))
        if number in self._new or (place < len(self._old) and int(self._old[place]) == number):
            return False
        self._new.add(number)
        if len(self._new) >= NUMBERS_TO_SORT:
            self._old = np.union1d(self._old, np.fromiter(self._new, np.uint64, len(self._new)))
            self._new = set()
        return True


class _Writer:
    """Writes rows to files in a thread. A full disk ends the writing, not the run: the error goes to `give_up`."""

    def __init__(self, folder: Path, provenance: str, rank: int, give_up: Callable[[Exception], None]) -> None:
        self.folder, self.provenance, self.give_up = folder, provenance, give_up
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
                self.give_up(error)
            except Exception as error:  # a bug: raised by `flush`, where training waits for this thread
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
                "made_by": self.provenance,
            }
            self._rows.append(row)
            self._size += len(row["moments"]) * (1 if flipped is None else 2)
        if len(self._rows) >= ROWS_PER_FILE or self._size >= BYTES_PER_FILE:
            self._write()

    def _write(self) -> None:
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows)
        for name in {"moments_flipped", LATENT_MASK} & set(table.column_names):  # where all are None, of no type yet
            number = table.schema.get_field_index(name)
            table = table.set_column(number, name, table.column(name).cast(pa.binary()))
        final = self.folder / f"{self.prefix}-{self.number:05d}.arrow"
        temporary = final.with_suffix(PARTIAL)
        with _held(temporary) as file:
            with pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=64)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, final)
        self.number += 1
        self._rows, self._size = [], 0


@contextmanager
def _held(path: Path) -> Iterator[BinaryIO]:
    """A new file, locked until it is closed, also by a kill; what is still under that name afterwards is removed."""
    try:
        while True:
            with open(path, "wb") as file:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                if not path.exists():  # another run took it for a leftover before it was locked
                    continue
                yield file
                return
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove the files that killed runs left half written, whatever their key: those that nobody has locked."""
    for path in folder.glob(f"*/*{PARTIAL}"):
        if not re.fullmatch(rf"\d{{5}}-[0-9a-f]+-\w+{re.escape(PARTIAL)}", path.name):
            continue
        with suppress(OSError), open(path, "r+b") as file:  # an error: it is locked, or gone, or cannot be removed
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def open_cached(path: Path) -> pa.Table:
    """The rows of a file of the cache, memory-mapped: they are read from disk when they are used."""
    try:
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowException) as error:
        raise RecipeError(f"{path} of the latent cache cannot be read ({error}): remove it") from error
