import os
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sd_recipes.data.parquet_files import BATCH_ROWS, ParquetFiles, load_files

MEBIBYTE = 2**20


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_those_that_datasets_reads(tmp_path: Path, streaming: bool) -> None:
    rows = [{"image": {"bytes": b"%d" % n, "path": None}, "texts": [f"row {n}"] * (n % 3)} for n in range(2500)]
    features = {"image": datasets.Image(decode=False), "texts": datasets.List(datasets.Value("string"))}
    for name, part, group in (("a", rows[:1200], 10_000), ("b", [], 10), ("c", rows[1200:], 7)):
        columns = {column: [row[column] for row in part] for column in features}
        content = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        content.to_parquet(tmp_path / f"{name}.parquet", batch_size=group)
    files = {"train": str(tmp_path / "*.parquet")}
    found = load_files(ParquetFiles, files, cache_dir=None, streaming=streaming)
    expected = datasets.load_dataset("parquet", data_files=files, streaming=streaming)
    assert list(found) == ["train"]
    assert found["train"].features == expected["train"].features == datasets.Features(features)
    assert list(found["train"]) == list(expected["train"]) == rows


def test_record_batches_of_small_pictures_are_few(tmp_path: Path) -> None:
    content = datasets.Dataset.from_list([{"image": {"bytes": b"", "path": None}}] * 2500)
    content.cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet", batch_size=2500)
    found = load_files(ParquetFiles, {"train": str(tmp_path / "a.parquet")}, cache_dir=None, streaming=False)
    assert found["train"].data.column("image").num_chunks == -(-2500 // BATCH_ROWS)


@pytest.mark.parametrize(("num_rows", "rows_a_group"), [(64, 1), (8192, 8192)])
def test_a_file_of_32_mebibytes_is_never_held_as_a_whole(tmp_path: Path, num_rows: int, rows_a_group: int) -> None:
    table = pa.table({"image": [os.urandom(32 * MEBIBYTE // num_rows) for _ in range(num_rows)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=rows_a_group)
    del table
    files = {"train": str(tmp_path / "a.parquet")}
    tracemalloc.start()  # sees what is read from the file, and arrow's own count what is decoded
    load_files(ParquetFiles, files, cache_dir=None, streaming=False)
    before, most_decoded = pa.total_allocated_bytes(), 0
    for _ in load_files(ParquetFiles, files, cache_dir=None, streaming=True)["train"]:
        most_decoded = max(most_decoded, pa.total_allocated_bytes() - before)
    most_read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(most_read, most_decoded) < 16 * MEBIBYTE
