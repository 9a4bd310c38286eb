"""Tables written in every file format, and jobs that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import JobConfig
from pipeline.config.files import build_job
from pipeline.data.dataset import Dataset
from pipeline.data.sources import open_dataset

SPECIAL = '"\r\n'


def make_table_job(url: object, source: str = "csv", task: str = "multiclass", **data: Any) -> JobConfig:
    tree = {"source": source, "url": str(url), "label": "y", **data}
    return build_job({"name": "t", "task": task, "data": tree, "best": {"metric": "val/loss"}}, "test")


def open_table(url: object, source: str = "csv", **options: Any) -> Dataset:
    return open_dataset(make_table_job(url, source, **options))


def write_csv(
    path: Path,
    table: pa.Table,
    *,
    delimiter: str = ",",
    line_end: str = "\n",
    null: str = "",
    decimal: str = ".",
    quote_all: bool = False,
    encoding: str = "utf-8",
    final_line_end: bool = True,
) -> Path:
    """Write a table as CSV, with no library that could share an error with the reader."""

    def field(value: object) -> str:
        if isinstance(value, str):
            needs_quotes = quote_all or any(character in value for character in SPECIAL + delimiter)
            return '"' + value.replace('"', '""') + '"' if needs_quotes else value
        if isinstance(value, float):
            return field(repr(value).replace(".", decimal))
        return null if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    rows = [table.schema.names, *zip(*(column.to_pylist() for column in table.columns), strict=True)]
    text = line_end.join(delimiter.join(map(field, row)) for row in rows) + line_end * final_line_end
    path.write_bytes(text.encode(encoding))
    return path


def write_table(path: Path, table: pa.Table, source: str) -> Path:
    """Write a table in the usual form of a source."""
    if source == "csv":
        return write_csv(path, table)
    if source == "jsonl":
        import json

        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif source == "numpy":
        with path.open("wb") as file:
            arrays: dict[str, Any] = {name: _to_numpy(table.column(name)) for name in table.schema.names}
            np.savez(file, **arrays)
    elif source == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return path


def write_stream(path: Path, table: pa.Table) -> Path:
    """Write a table as an Arrow IPC stream."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    values: np.ndarray = column.to_numpy()
    return values.astype(str) if values.dtype.hasobject else values


def assert_same_dataset(dataset: Dataset, expected: Dataset) -> None:
    np.testing.assert_array_equal(dataset.train.inputs, expected.train.inputs, strict=True)
    np.testing.assert_array_equal(dataset.train.targets, expected.train.targets, strict=True)
    assert dataset.schema == expected.schema
    assert dataset.label_names == expected.label_names
