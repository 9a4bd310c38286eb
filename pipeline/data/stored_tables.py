"""Tables of a caller's memory as files of the cache: written once, named by their content."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import CacheConfig
from pipeline.data.cache import CacheEntry, get_or_build
from pipeline.data.tabular.digest import digest_table
from pipeline.errors import DataError
from pipeline.storage.retry import summarize_error

PREFIX = "table-"
FILE = "table.parquet"
STORED_TABLE = re.compile(rf"(^|/){PREFIX}(?P<digest>[0-9a-f]{{64}})/{FILE}$")

HEADER_BYTES, COLUMN_BYTES = 1 << 20, 1 << 13
"""Number of bytes reserved for the headers of the file, and of each column, in the size of an entry."""

MISSING_FIX = (
    "the table of this run was passed in Python; its copy is in the cache of the machine that called train(), unless "
    "it was deleted there: call train() again with the same table, or train on a file that all machines can read"
)
"""What to do if a file of this cache is not there."""


def store_table(table: pa.Table, cache: CacheConfig) -> tuple[Path, CacheEntry]:
    """Write a table to the cache as Parquet unless it is there; return its file, and the entry.

    The path depends on the content alone. The file is not deleted while the entry is in use, see
    `pipeline.data.cache`.

    Raises
    ------
    DataError: the cache has no room or cannot be written; or Parquet has no such type.
    """

    def write(folder: Path) -> None:
        try:
            pq.write_table(table, folder / FILE)
        except pa.ArrowException as error:
            raise DataError(
                f"cannot be written as Parquet: {summarize_error(error)}", where="table", fix="leave the column out"
            ) from error

    size_bytes = 2 * table.nbytes + COLUMN_BYTES * table.num_columns + HEADER_BYTES
    entry = get_or_build(cache, PREFIX + digest_table(table), write, size_bytes=size_bytes)
    return entry.folder / FILE, entry


def find_stored_digest(url: str) -> str | None:
    """Return the digest of the content if the URL is that of a file that `store_table` wrote, here or on another
    machine; else None.

    It is the fingerprint of the data: that of the bytes of the file would depend on the version of Arrow that wrote it.
    """
    match = STORED_TABLE.search(url)
    return match["digest"] if match else None


@contextmanager
def explaining_missing_table(url: str) -> Iterator[None]:
    """Add to a DataError what to do, if the URL is that of a file that `store_table` wrote."""
    try:
        yield
    except DataError as error:
        if find_stored_digest(url) is not None:
            error.fix = MISSING_FIX
        raise
