"""The file that `predict` writes, in the format that its name says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline.errors import InputError

ENDINGS = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".arrow", ".feather")


def find_ending(name: str) -> str | None:
    """Return the one of `ENDINGS` that a file's name has; None if it has another one."""
    return next((ending for ending in ENDINGS if name.endswith(ending)), None)


class PredictionFile:
    """Writes tables of one schema to a local file; the first one defines the schema.

    Parameters
    ----------
    ending: one of `ENDINGS`.
    where: the output, for messages.
    """

    def __init__(self, path: Path, ending: str, where: str) -> None:
        self._path, self._ending, self._where = path, ending, where
        self._sink: Any = None
        self._writer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in (self._writer, self._sink):
            if opened is not None:
                opened.close()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written."""
        return self._writer is None

    def write(self, table: pa.Table) -> None:
        """Append a table.

        Raises
        ------
        InputError: the format has no place for the type of a column.
        """
        self._writer = self._writer or self._open(table.schema)
        self._writer.write_table(table)

    def _open(self, schema: pa.Schema) -> Any:
        if self._ending == ".parquet":
            return pq.ParquetWriter(self._path, schema, compression="zstd")
        self._sink = pa.OSFile(str(self._path), "wb")
        if self._ending in (".arrow", ".feather"):
            return pa.ipc.new_file(self._sink, schema)
        nested = next((field for field in schema if pa.types.is_nested(field.type)), None)
        if nested is not None:
            raise InputError(
                f"CSV has no place for the key {nested.name!r}, whose values are {nested.type}",
                where=self._where,
                fix="write .parquet or .arrow",
            )
        if self._ending.endswith(".gz"):
            self._sink = pa.CompressedOutputStream(self._sink, "gzip")
        options = pa_csv.WriteOptions(
            delimiter="\t" if self._ending.startswith(".tsv") else ",", quoting_style="needed"
        )
        return pa_csv.CSVWriter(self._sink, schema, write_options=options)
