"""Tables in memory, by the interface of tables in files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import pyarrow as pa

from pipeline.config import CacheConfig
from pipeline.data.sources.tables.files import TableFiles
from pipeline.data.sources.tables.partitions import ListedFile
from pipeline.data.tabular.digest import digest_table
from pipeline.events import ProgressFn


class MemoryTables(TableFiles):
    """Tables in memory, each in place of a file.

    Parameters
    ----------
    tables: by name, such as train.
    where: what they come from, for messages.
    """

    def __init__(self, tables: Mapping[str, pa.Table], where: str) -> None:  # no file is listed, unlike in the base
        self._tables = list(tables.values())
        self.url = self._data_url = where
        self.files = [
            ListedFile(name, f"{where}, {name}" if len(tables) > 1 else where, table.nbytes, {}, "")
            for name, table in tables.items()
        ]
        self.schemas = [table.schema for table in self._tables]
        self.row_counts = [table.num_rows for table in self._tables]
        self._total_bytes = sum(table.nbytes for table in self._tables)
        self._cache, self._digests, self._fetched, self._stack = CacheConfig(), None, {}, ExitStack()
        self._data_files, self._has_layouts = [], False

    def compute_fingerprint(self, on_progress: ProgressFn = lambda text: None) -> str:
        """Return the SHA-256 in hex over the names and the content of the tables."""
        digest = hashlib.sha256()
        for file, table in zip(self.files, self._tables, strict=True):
            digest.update(f"{file.name}\0{digest_table(table)}\n".encode())
        return digest.hexdigest()

    def _read_layout(self, number: int) -> tuple[pa.Schema, int]:
        return self.schemas[number], self.row_counts[number]

    def _iter_stored_batches(self, number: int, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        yield from self._tables[number].select(columns).to_batches(batch_rows)
