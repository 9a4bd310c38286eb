"""The profile of the columns of a table at a URL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from pipeline.config import TableDataConfig
from pipeline.data.sources.tables.columns import merge_column_kinds
from pipeline.data.sources.tables.decode import BATCH_BYTES, MAX_BATCH_ROWS, MAX_COLUMNS_PER_PASS
from pipeline.data.sources.tables.files import TableFiles
from pipeline.data.sources.tables.formats import open_table_files
from pipeline.data.tabular.arrow_types import ArrowKind
from pipeline.data.tabular.encoder import suggest_columns
from pipeline.data.tabular.profile import ColumnProfile, profile_columns
from pipeline.errors import DataError
from pipeline.events import ProgressFn


def profile_table(
    data: TableDataConfig, required: Sequence[str] = (), on_progress: ProgressFn = lambda text: None
) -> dict[str, ColumnProfile]:
    """Read all rows of a table once, and return the profile of each column; by name, in order.

    Columns that not all files have, with the same type, are left out.

    Parameters
    ----------
    required: columns that must be there.

    Raises
    ------
    DataError: files that cannot be read, a required column that is absent or not the same in all files, or no rows.
    """
    with open_table_files(data) as files:
        if not files.num_rows:
            raise DataError("has no rows", where=files.url, fix="check the program that wrote it")
        kinds, errors = merge_column_kinds(files)
        for name in required:
            if name in errors:
                raise errors[name]
            if name not in kinds:
                raise DataError(f"there is no column {name!r}", where=files.url, fix=suggest_columns(name, kinds))
        return profile_files(files, kinds, on_progress)


def profile_files(
    files: TableFiles, kinds: Mapping[str, ArrowKind], on_progress: ProgressFn = lambda text: None
) -> dict[str, ColumnProfile]:
    """Return the profile of some columns of open files, given their kinds."""
    profile = profile_columns(kinds, _iter_batches(files, list(kinds), on_progress))
    pa.default_memory_pool().release_unused()
    return profile


def _iter_batches(files: TableFiles, names: list[str], on_progress: ProgressFn) -> Iterator[pa.RecordBatch]:
    done = 0
    for number in range(len(files.files)):
        for first in range(0, len(names), MAX_COLUMNS_PER_PASS):
            part = names[first : first + MAX_COLUMNS_PER_PASS]
            batch_rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // (8 * len(part))))
            for batch in files.iter_batches(number, part, batch_rows):
                done += batch.num_rows * len(part)
                on_progress(f"reading the table, {done / (files.num_rows * len(names)):.0%}")
                yield batch
