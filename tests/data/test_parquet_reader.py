"""Parquet files by URL: their selection and order, partition columns in their paths, and unusable files."""

from __future__ import annotations

import http.server
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import CacheConfig
from pipeline.data.sources.tables.parquet import ParquetFiles
from pipeline.errors import DataError
from tests.data.parquet_jobs import open_parquet, write_parquet


@pytest.fixture
def partitioned_folder(tmp_path: Path) -> Path:
    """Three files in two partitions, written out of order, beside files that must be ignored."""
    folder = tmp_path / "table"
    for number, name in [(2, "day=2024-01-02/b"), (0, "day=2024-01-01/a"), (1, "day=2024-01-01/c")]:
        write_parquet(folder / f"{name}.parquet", {"x": [10 * number, 10 * number + 1], "y": [0, 1]})
    (folder / "_SUCCESS").touch()
    (folder / ".part.crc").write_bytes(b"x")
    (folder / "_tmp").mkdir()
    (folder / "_tmp" / "z.parquet").write_bytes(b"unfinished")
    return folder


EXPECTED_VALUES = [0, 1, 10, 11, 20, 21]


def read_x(url: object, **options: Any) -> list[float]:
    return [float(value) for value in open_parquet(url, features=["x"], **options).train.inputs[:, 0]]


@pytest.mark.parametrize("pattern", ["", "/", "/*/*.parquet", "/**/*.parquet", "/day=*"])
def test_files_are_read_in_the_order_of_their_names(partitioned_folder: Path, pattern: str) -> None:
    assert read_x(f"{partitioned_folder}{pattern}") == EXPECTED_VALUES
    assert read_x(f"file://{partitioned_folder}{pattern}") == EXPECTED_VALUES


@pytest.mark.parametrize(
    ("pattern", "rows"),
    [("day=2024-01-02", [20, 21]), ("*/[ab].parquet", [0, 1, 20, 21]), ("day=2024-01-01/?.parquet", [0, 1, 10, 11])],
)
def test_glob_selects_files(partitioned_folder: Path, pattern: str, rows: list[float]) -> None:
    assert read_x(partitioned_folder / pattern) == rows


def test_literal_brackets_in_a_name(tmp_path: Path) -> None:
    assert read_x(write_parquet(tmp_path / "t[1].parquet", {"x": [5], "y": [0]})) == [5]


def test_partition_folders_become_a_column(partitioned_folder: Path, tmp_path: Path) -> None:
    dataset = open_parquet(partitioned_folder, splits={"by": "time", "column": "day"})
    assert dataset.schema is not None
    assert [column.name for column in dataset.schema.columns] == ["x"]
    days = dataset.split_columns["day"].values.astype("datetime64[ns]").astype("datetime64[D]").astype(str)
    assert days.tolist() == ["2024-01-01"] * 4 + ["2024-01-02"] * 2
    dataset = open_parquet(partitioned_folder)
    assert dataset.schema is not None
    assert dataset.schema.columns[-1].categories == ("2024-01-01", "2024-01-02")
    assert dataset.train.inputs[:, 1].tolist() == [0, 0, 0, 0, 1, 1]
    for value, name in [("3", "a"), ("12", "b"), ("__HIVE_DEFAULT_PARTITION__", "c")]:
        write_parquet(tmp_path / "n" / f"k={value}" / "city=New%20York" / f"{name}.parquet", {"x": [1], "y": [0]})
    dataset = open_parquet(tmp_path / "n")
    assert dataset.schema is not None
    assert dataset.schema.columns[2].categories == ("New York",)
    np.testing.assert_array_equal(dataset.train.inputs[:, 1], np.array([12, 3, np.nan], np.float32))


def test_partitions_written_by_pyarrow(tmp_path: Path) -> None:
    table = pa.table({"x": [1, 2, 3], "plan": ["b", "a", "b"], "y": [0, 1, 1]})
    pq.write_to_dataset(table, tmp_path / "t", partition_cols=["plan"])
    dataset = open_parquet(tmp_path / "t")
    assert sorted(map(tuple, dataset.train.inputs.tolist())) == [(1, 1), (2, 0), (3, 1)]


def test_fingerprint_covers_names_and_content(partitioned_folder: Path, tmp_path: Path, s3_url: str) -> None:
    first = open_parquet(partitioned_folder).fingerprint
    assert len(first) == 64
    shutil.copytree(partitioned_folder, tmp_path / "copy")
    assert open_parquet(tmp_path / "copy").fingerprint == first
    assert open_parquet(partitioned_folder / "day=*" / "*.parquet").fingerprint == first
    for remote in (s3_url, "memory://parquet-fingerprint"):
        fs = fsspec.core.url_to_fs(remote)[0]
        for path in partitioned_folder.rglob("*.parquet"):
            fs.pipe_file(f"{remote}/{path.relative_to(partitioned_folder)}", path.read_bytes())
        dataset = open_parquet(remote)
        assert dataset.fingerprint == first
        assert dataset.train.inputs[:, 0].tolist() == EXPECTED_VALUES
        assert read_x(f"{remote}/day=2024-01-01/*.parquet") == EXPECTED_VALUES[:4]
        assert read_x(f"{remote}/day=2024-01-02/b.parquet") == EXPECTED_VALUES[4:]
    moved = tmp_path / "copy" / "day=2024-01-02" / "b.parquet"
    moved.rename(moved.with_name("d.parquet"))
    assert open_parquet(tmp_path / "copy").fingerprint != first
    write_parquet(partitioned_folder / "day=2024-01-02" / "b.parquet", {"x": [20, 22], "y": [0, 1]})
    assert open_parquet(partitioned_folder).fingerprint != first


def test_column_types_are_merged_over_files(tmp_path: Path) -> None:
    text = pa.array(["a", "b"])
    write_parquet(tmp_path / "a.parquet", {"n": pa.array([1, 2], pa.int8()), "t": text, "v": pa.nulls(2), "y": [0, 1]})
    write_parquet(
        tmp_path / "b.parquet",
        {"v": [0.5, 1.5], "t": text.dictionary_encode(), "n": pa.array([0.5, None]), "y": pa.array([1, 0], pa.uint8())},
    )
    inputs = open_parquet(tmp_path).train.inputs
    np.testing.assert_array_equal(
        inputs, np.array([[1, 0, np.nan], [2, 1, np.nan], [0.5, 0, 0.5], [np.nan, 1, 1.5]], np.float32)
    )


def test_row_numbers_are_relative_to_the_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"x": [1.0] * 5, "y": [0] * 5})
    write_parquet(tmp_path / "b.parquet", {"x": [1.0] * 70_000, "y": [0] * 69_990 + [None] * 10})
    with pytest.raises(DataError, match=r"b\.parquet: .*'y' has nulls .* in 10 of 70,000 rows, first in row 69,990"):
        open_parquet(tmp_path)


def corrupt_data_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:200] = b"\xff" * 192
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BROKEN = {
    "truncated": (truncate, "is truncated: it begins as Parquet, but does not end as Parquet"),
    "footer length": (lambda path: path.write_bytes(b"PAR1" + b"\xff\xff\xff\x0fPAR1"), "is corrupt: its footer would"),
    "footer": (lambda path: path.write_bytes(b"PAR1" + b"\x00" * 50 + b"\x20\0\0\0PAR1"), "is corrupt or truncated"),
    "page": (corrupt_data_page, "is corrupt or truncated"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "csv": (
        lambda path: path.write_text("x,y\n1,0\n"),
        "is not a Parquet file but CSV, it begins with 'x,y'\n.*use source: csv",
    ),
    "json": (lambda path: path.write_text('{"x": 1}'), "is not a Parquet file but JSON"),
    "zip": (lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 40), "is not a Parquet file but a zip archive"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_broken_files_are_named(tmp_path: Path, kind: str, remote: bool) -> None:
    corrupt, message = BROKEN[kind]
    write_parquet(tmp_path / "a.parquet", {"x": [1.0, 2.0], "y": [0, 1]})
    corrupt(write_parquet(tmp_path / "b.parquet", {"x": list(range(1000)), "y": [0, 1] * 500}))
    url = str(tmp_path)
    if remote:
        url = f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").put(f"{tmp_path}/*.parquet", f"/{tmp_path.name}/")
    with pytest.raises(DataError, match=rf"{tmp_path.name}/b\.parquet: {message}"):
        open_parquet(url)


@pytest.mark.parametrize("name", ["x", "y"])
def test_column_missing_in_a_file_is_named(tmp_path: Path, name: str) -> None:
    columns = {"x": list(range(10)), "y": [0, 1] * 5}
    write_parquet(tmp_path / "a.parquet", columns)
    write_parquet(tmp_path / "b.parquet", {key: values for key, values in columns.items() if key != name})
    with pytest.raises(
        DataError, match=rf"b\.parquet \(10 rows\): the column '{name}' is not in this file, but in others"
    ):
        open_parquet(tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([1], ["1"], r"'x' has text \(string\) here, but whole numbers \(int64\) in"),
        ([True], [1], "'x' has whole numbers .* here, but booleans"),
        (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), pa.array([[1]], pa.list_(pa.int8(), 1)), "'x' has lists"),
    ],
)
def test_type_that_differs_between_files_is_rejected(tmp_path: Path, first: Any, second: Any, message: str) -> None:
    write_parquet(tmp_path / "a.parquet", {"x": first, "y": [0]})
    write_parquet(tmp_path / "b.parquet", {"x": second, "y": [0]})
    with pytest.raises(DataError, match=rf"b\.parquet \(1 rows\): the column {message}"):
        open_parquet(tmp_path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("none.parquet", "none.parquet: does not exist"),
        ("none/*.parquet", "there are no files"),
        ("", "there are no files"),
        ("nonsense://x", "nonsense://x: cannot be opened"),
    ],
)
def test_urls_without_files_are_reported(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_parquet(url if "://" in url else tmp_path / url)


def test_duplicate_column_names_are_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([1])] * 3, names=["x", "x", "y"]), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="two columns are called 'x'"):
        open_parquet(tmp_path)


@pytest.mark.parametrize("key", ["", "/none.parquet", "/*.parquet"])
def test_missing_bucket_or_key_is_reported(s3_url: str, key: str) -> None:
    for url in (f"s3://trainyard-no-such-bucket{key}", s3_url + key):
        with pytest.raises(DataError, match=r"does not exist|there are no files"):
            open_parquet(url)


class ForbiddenHandler(http.server.BaseHTTPRequestHandler):
    """Responds as S3 does if access is denied."""

    def do_GET(self) -> None:
        body = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def forbidden_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ForbiddenHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.usefixtures("forbidden_s3")
@pytest.mark.parametrize("key", ["t.parquet", "folder", "*.parquet"])
def test_no_permission_on_s3(key: str) -> None:
    with pytest.raises(DataError, match="no permission") as raised:
        open_parquet(f"s3://bucket/{key}")
    assert raised.value.fix


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder below folders that all users can enter, unlike pytest's temporary folders."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def without_root() -> Iterator[None]:
    """Drop root's permission to read everything, if this is root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("which", ["t.parquet", ".", "*.parquet"])
def test_no_permission_on_local_files(open_folder: Path, which: str) -> None:
    path = write_parquet(open_folder / "inner" / "t.parquet", {"x": [1], "y": [0]})
    open_parquet(path)  # imports all modules before root is dropped
    target = path.parent if which == "." else path
    target.chmod(0)
    try:
        with without_root(), pytest.raises(DataError, match=f"(?s){target}.*no permission"):
            open_parquet(path.parent / which)
    finally:
        target.chmod(0o755)


def test_batches_of_selected_columns(partitioned_folder: Path) -> None:
    def batches(columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        with ParquetFiles(str(partitioned_folder), CacheConfig()) as files:
            for number in range(len(files.files)):
                yield from files.iter_batches(number, columns, rows)

    record_batches = list(batches(["day", "x"], 1))
    assert [batch.num_rows for batch in record_batches] == [1] * 6
    assert [batch.column("x")[0].as_py() for batch in record_batches] == EXPECTED_VALUES
    assert record_batches[0].schema.names == ["day", "x"]
    assert record_batches[0].column("day")[0].as_py() == "2024-01-01"
    assert [batch.num_rows for batch in batches(["day"], 100)] == [2, 2, 2]
