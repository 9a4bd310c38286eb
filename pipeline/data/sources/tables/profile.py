"""The profile of the columns of a table at a URL."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from pipeline.config import CacheConfig
from pipeline.data.sources.tables.columns import merge_column_kinds
from pipeline.data.sources.tables.decode import BATCH_BYTES, MAX_BATCH_ROWS, MAX_COLUMNS_PER_PASS
from pipeline.data.sources.tables.reader import ParquetFiles
from pipeline.data.tabular.profile import ColumnProfile, profile_columns
from pipeline.errors import DataError
from pipeline.events import ProgressFn
from pipeline.redaction import redact


def profile_table(
    url: str, on_progress: ProgressFn = lambda text: None, cache: CacheConfig | None = None
) -> dict[str, ColumnProfile]:
    """Read all rows of a table once, and return the profile of each column; by name, in order.

    Raises
    ------
    DataError: files that cannot be read, files whose columns differ, or no rows.
    """
    with ParquetFiles(url, cache or CacheConfig()) as files:
        if not files.num_rows:
            raise DataError("has no rows", where=redact(url), fix="check the program that wrote it")
        kinds = merge_column_kinds(files)
        profile = profile_columns(kinds, _iter_batches(files, list(kinds), on_progress))
    pa.default_memory_pool().release_unused()
    return profile


def _iter_batches(files: ParquetFiles, names: list[str], on_progress: ProgressFn) -> Iterator[pa.RecordBatch]:
    done = 0
    for number in range(len(files.files)):
        for first in range(0, len(names), MAX_COLUMNS_PER_PASS):
            part = names[first : first + MAX_COLUMNS_PER_PASS]
            batch_rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // (8 * len(part))))
            for batch in files.iter_batches(number, part, batch_rows):
                done += batch.num_rows * len(part)
                on_progress(f"reading the table, {done / (files.num_rows * len(names)):.0%}")
                yield batch
