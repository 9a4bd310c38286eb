"""Tables larger than memory: converted once to a memory-mapped matrix in the cache, even under a memory limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import CacheConfig
from pipeline.data.sources import open_dataset
from pipeline.data.sources.tables.columns import select_columns
from pipeline.data.sources.tables.parquet import ParquetFiles
from pipeline.errors import DataError
from tests.data.parquet_jobs import make_parquet_job, open_parquet, write_parquet
from tests.data.parquet_memory import WIDTH, write_table


def list_entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


COLUMNS = {
    "x": [1.5, None, 3.0, 4.0],
    "plan": ["b", None, "a", "b"],
    "user": ["u", "v", "u", "w"],
    "bytes": [b"ab", b"cd", b"ef", b"gh"],
    "y": ["no", "yes", "no", "no"],
    "z": [1.0, 2.0, 3.0, 4.0],
}
JOB_CHANGES: list[dict[str, Any]] = [
    {"features": ["x", "plan"], "splits": {"by": "group", "column": "user"}},
    {"features": ["x"], "splits": {"by": "group", "column": "user"}},
    {"features": ["plan", "x"], "label": "z", "task": "regression"},
    {"features": ["x"], "label": ["z", "x2"], "task": "regression"},
    {"features": ["x"], "precision": "fp64"},
    {"features": ["x2"], "categorical": ["x2"]},
    {"features": ["bytes"], "shape": [1, 2]},
]


def write_job_table(folder: Path) -> Path:
    import pyarrow as pa

    columns = COLUMNS | {"x2": [1, 2, 3, 4], "bytes": pa.array(COLUMNS["bytes"], pa.binary(2))}
    return write_parquet(folder / "t.parquet", columns, row_group_size=3)


def test_cached_matrix_matches_memory(tmp_path: Path) -> None:
    path, folder = write_job_table(tmp_path), tmp_path / "cache"
    for number, options in enumerate(JOB_CHANGES, 1):
        plain = open_parquet(path, **options)
        assert not isinstance(plain.train.inputs, np.memmap)
        for _ in range(2):
            mapped = open_parquet(path, cache={"folder": str(folder), "in_memory_mb": 0}, **options)
            assert isinstance(mapped.train.inputs, np.memmap)
            assert not mapped.train.inputs.flags.writeable
            np.testing.assert_array_equal(np.asarray(mapped.train.inputs), plain.train.inputs, strict=True)
            np.testing.assert_array_equal(mapped.train.targets, plain.train.targets, strict=True)
            assert (mapped.schema, mapped.label_names) == (plain.schema, plain.label_names)
            assert mapped.fingerprint == plain.fingerprint
            assert list(mapped.split_columns) == list(plain.split_columns)
            for name, column in plain.split_columns.items():
                np.testing.assert_array_equal(mapped.split_columns[name].values, column.values, strict=True)
                assert mapped.split_columns[name].value_names == column.value_names
        assert len(list_entries(folder)) == number, "one entry for each selection"


def test_second_start_reads_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_job_table(tmp_path)
    options: dict[str, Any] = {"cache": {"folder": str(tmp_path / "cache"), "in_memory_mb": 0}, "features": ["x"]}
    first = open_parquet(path, **options)
    monkeypatch.setattr("pipeline.data.sources.tables.parquet.ParquetFiles.iter_batches", None)
    np.testing.assert_array_equal(open_parquet(path, **options).train.inputs, first.train.inputs)
    with pytest.raises(TypeError, match="not callable"):
        open_parquet(path, features=["x"])


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (
            0,
            "Choice(features=(Feature(name='x', kind='number', width=1), Feature(name='plan', kind='category', "
            "width=1)), labels=(('y', Content(kind='text', width=1, type='string')),), label_as='classes', "
            "split=('user', Content(kind='text', width=1, type='string')), split_is_time=False, shape=(), "
            "raw_bytes=False)",
        ),
        (
            3,
            "Choice(features=(Feature(name='x', kind='number', width=1),), labels=(('z', Content(kind='real', width=1, "
            "type='double')), ('x2', Content(kind='whole', width=1, type='int64'))), label_as='numbers', split=None, "
            "split_is_time=False, shape=(), raw_bytes=False)",
        ),
    ],
)
def test_cache_key_does_not_change_between_versions(tmp_path: Path, number: int, text: str) -> None:
    job = make_parquet_job(write_job_table(tmp_path), **JOB_CHANGES[number])
    with ParquetFiles(str(tmp_path / "t.parquet"), CacheConfig()) as files:
        assert select_columns(files, job).cache_key == text


def test_changed_data_is_read_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"cache": {"folder": str(tmp_path / "cache"), "in_memory_mb": 0}}
    path = write_parquet(tmp_path / "t.parquet", {"x": [1.0, 2.0], "y": [0, 1]})
    open_parquet(path, **options)
    write_parquet(path, {"x": [1.0, 3.0], "y": [0, 1]})
    assert open_parquet(path, **options).train.inputs.tolist() == [[1.0], [3.0]]


def test_invalid_values_leave_no_cache_entry(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"x": [1.0, float("inf")], "y": [0, 1]})
    with pytest.raises(DataError, match="'x' has infinite values in 1 of 2 rows, first in row 1"):
        open_parquet(path, cache={"folder": str(tmp_path / "cache"), "in_memory_mb": 0})
    assert list_entries(tmp_path / "cache") == []


def test_matrix_larger_than_the_cache_is_rejected(tmp_path: Path) -> None:
    cache = {"folder": str(tmp_path / "cache"), "in_memory_mb": 0, "max_gb": 1e-6}
    with pytest.raises(DataError, match="max_gb"):
        open_parquet(write_parquet(tmp_path / "t.parquet", {"x": [1.0] * 1000, "y": [0] * 1000}), cache=cache)


def test_progress_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.sources.tables.decode.PROGRESS_INTERVAL_S", 0.0)
    path = write_parquet(tmp_path / "t.parquet", {"x": [1.0] * 70_000, "y": [0] * 70_000})
    messages: list[str] = []
    open_dataset(make_parquet_job(path, cache={"folder": str(tmp_path / "cache"), "in_memory_mb": 0}), messages.append)
    assert messages[-1] == "caching 0.0 of 0.0 GB"
    assert len(messages) > 1


def train_under_memory_limit(tmp_path: Path, allowed_mb: int, matrix_mb: int) -> dict[str, Any]:
    folder = tmp_path / "table"
    folder.mkdir()
    write_table(folder, matrix_mb)
    command = [sys.executable, "-m", "tests.data.parquet_memory", str(folder), str(tmp_path / "cache")]
    done = subprocess.run(
        [*command, str(allowed_mb * 10**6), "2"],
        capture_output=True,
        text=True,
        check=False,
        # Arrow's allocator reserves 64 MB and more at once. The system's only allocates what is requested.
        env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    print(json.dumps(result))
    assert result["seen"] == 2 * result["rows"]
    assert result["VmData"] <= result["limit"]
    shape = (result["rows"], WIDTH + 3)
    assert result["matrix"] == 4 * shape[0] * shape[1] > 0.99 * matrix_mb * 10**6
    [entry] = list_entries(tmp_path / "cache")
    first = np.load(entry / "inputs.npy", mmap_mode="r")[:, 0]
    assert result["total"] == pytest.approx(2 * float(first.sum(dtype=np.float64)), rel=1e-9)
    return result


def test_table_of_three_times_the_memory_limit(tmp_path: Path) -> None:
    train_under_memory_limit(tmp_path, 48, 144)


@pytest.mark.slow
def test_table_of_three_times_the_process_memory_limit(tmp_path: Path) -> None:
    result = train_under_memory_limit(tmp_path, 96, 3_000)
    assert result["matrix"] > 3 * result["limit"]
