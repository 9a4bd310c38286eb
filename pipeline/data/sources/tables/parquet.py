"""Read Parquet files: their footers give columns, row counts and the blocks to hash, and rows come batch by batch."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.sources.tables.files import REWRITE_HINT, TableFiles, file_errors
from pipeline.data.sources.tables.partitions import ListedFile, find_table_files
from pipeline.data.sources.tables.sniff import describe_format
from pipeline.errors import DataError

MAX_SAMPLED_CHUNKS = 256
SAMPLE_BYTES = 64 << 10
"""Number of column chunks that are hashed of a file whose store has no checksums, and number of bytes of each."""

COLUMN_BUFFER_BYTES = 1 << 16
"""Size of the read buffer of each column. Without it a whole column of a row group is in memory at once."""

MAX_CHECKED_FILES = 16
"""Number of files whose first and last bytes are checked before any is read."""

MAGIC = b"PAR1"


class ParquetFiles(TableFiles):
    """The Parquet files of a URL, see `TableFiles`."""

    def _read_layout(self, number: int) -> tuple[pa.Schema, int]:
        file = self.files[number]
        metadata = self._metadata(file)
        with file_errors(file):
            return metadata.schema.to_arrow_schema(), metadata.num_rows

    def _iter_stored_batches(self, number: int, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        file = self.files[number]
        with file_errors(file):
            opened = pq.ParquetFile(
                self._arrow_source(file),
                pre_buffer=False,
                buffer_size=COLUMN_BUFFER_BYTES,
                page_checksum_verification=True,
            )
        with opened:
            batches = opened.iter_batches(batch_rows, columns=columns, use_threads=False)  # threads use more memory
            while True:
                with file_errors(file):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    def sample_ranges(self, number: int) -> list[tuple[int, int]]:
        """Return the ranges of the footer and of the first pages of up to `MAX_SAMPLED_CHUNKS` column chunks. They
        cover all columns, in row groups that are spread over the file."""
        file = self.files[number]
        metadata = self._metadata(file)
        columns, groups = metadata.num_columns, metadata.num_row_groups
        ranges = [(file.size_bytes - self._footer_size(file), file.size_bytes)]
        num_chunks = min(columns * groups, MAX_SAMPLED_CHUNKS)
        for index in range(num_chunks):
            column, group = divmod(index * columns * groups // num_chunks, groups)
            chunk = metadata.row_group(group).column(column)
            first = min(offset for offset in (chunk.dictionary_page_offset, chunk.data_page_offset) if offset)
            ranges.append((first, first + min(SAMPLE_BYTES, chunk.total_compressed_size)))
        return ranges

    def _metadata(self, file: ListedFile) -> Any:
        """Return the metadata in the footer of a file."""
        with file_errors(file):
            return pq.read_metadata(pa.BufferReader(MAGIC + self._read_tail(file, self._footer_size(file))))

    def _footer_size(self, file: ListedFile) -> int:
        """Return the number of bytes from the metadata to the end of a file."""
        length = len(MAGIC) + 4
        with file_errors(file):
            tail = self._read_tail(file, length)
            if tail[4:] != MAGIC or file.size_bytes < len(MAGIC) + length:
                raise _not_parquet_error(file, self._read_head(file))
            size = struct.unpack("<I", tail[:4])[0] + length
            if size > file.size_bytes - len(MAGIC):
                raise DataError(
                    f"is corrupt: its footer would be {size:,} bytes long", where=file.where, fix=REWRITE_HINT
                )
            return int(size)

    def _read_tail(self, file: ListedFile, length: int) -> bytes:
        return self._read_range(file, max(file.size_bytes - length, 0), file.size_bytes)


def check_parquet_files(url: str) -> None:
    """Check that there are files at a URL, and that the first of them begin and end as Parquet does. Nothing else is
    read.

    Raises
    ------
    DataError: an unusable URL, no permission, no files, or one that is not Parquet.
    """
    reader, files = find_table_files(url)
    for file in files[:MAX_CHECKED_FILES]:
        with file_errors(file):
            head = reader.read_range(file.name, 0, min(file.size_bytes, 512))
            tail = reader.read_range(file.name, max(file.size_bytes - len(MAGIC), 0), file.size_bytes)
        if tail != MAGIC or not head.startswith(MAGIC):
            raise _not_parquet_error(file, head)


def _not_parquet_error(file: ListedFile, head: bytes) -> DataError:
    """Return the error for a file that does not end as Parquet does."""
    if head.startswith(MAGIC):
        return DataError(
            f"is truncated: it begins as Parquet, but does not end as Parquet ({file.size_bytes:,} bytes)",
            where=file.where,
            fix=REWRITE_HINT,
        )
    if not head:
        return DataError("is empty", where=file.where, fix=REWRITE_HINT)
    name, fix = describe_format(head, "parquet")
    return DataError("is not a Parquet file" + (f" but {name}" if name else ""), where=file.where, fix=fix)
