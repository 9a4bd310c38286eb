"""Read Parquet files at any URL: their columns, row counts and fingerprint, and their rows batch by batch."""

from __future__ import annotations

import hashlib
import io
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import CacheConfig
from pipeline.data.cache import scratch_folder, track_folder_growth
from pipeline.data.sources import file_digests
from pipeline.data.sources.file_digests import DataFile, FileDigests, FileStamp
from pipeline.data.sources.tables.partitions import ListedFile, find_parquet
from pipeline.data.stored_tables import find_stored_digest
from pipeline.data.tabular.arrow_types import ArrowKind, arrow_kind
from pipeline.errors import DataError
from pipeline.events import ProgressFn
from pipeline.redaction import redact
from pipeline.storage.read_files import as_data_errors
from pipeline.storage.retry import summarize_error
from pipeline.watchdog import note_progress

MAX_SAMPLED_CHUNKS = 256
SAMPLE_BYTES = 64 << 10
"""Number of column chunks that are hashed of a file whose store has no checksums, and number of bytes of each."""

COLUMN_BUFFER_BYTES = 1 << 16
"""Size of the read buffer of each column. Without it a whole column of a row group is in memory at once."""

MAX_CHECKED_FILES = 16
"""Number of files whose first and last bytes are checked before any is read."""

MAGIC = b"PAR1"
OTHER_FORMATS = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "gzip", b"ARROW1": "an Arrow (Feather) file"}
CONVERT_HINT = "write it as Parquet, for instance with pandas: read_csv(...).to_parquet(...); or exclude it with a glob"
REWRITE_HINT = "write it again, or exclude it with a glob"
WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")
"""Partition values that are whole numbers; 007 is text."""


class ParquetFiles:
    """The Parquet files of a URL. Remote files are downloaded once, to memory if they are small in total, else to disk.

    It is a context manager, which removes the downloaded files at the end.

    Parameters
    ----------
    read_footers: whether to read the footers at once. Without them, only `compute_fingerprint` can be used.

    Raises
    ------
    DataError: from every method: no files, no permission, or a file that is not Parquet, corrupt or truncated, with its
        name.
    """

    def __init__(self, url: str, cache: CacheConfig, *, read_footers: bool = True) -> None:
        self._reader, self.files = find_parquet(url)
        self._data_url, self.url = url, redact(url)
        self._is_local = self._reader.is_local
        self._cache = cache
        self._has_footers = read_footers
        self._data_files = [
            DataFile(file.where, file.size_bytes, self._reader.local_path(file.name), file.checksum)
            for file in self.files
        ]
        self._stamps: list[FileStamp | None] = []
        self._digests: FileDigests | None = None
        self._total_bytes = sum(file.size_bytes for file in self.files)
        self._fetched: dict[str, Path | pa.Buffer] = {}
        self._stack = ExitStack()
        self._folder: Path | None = None
        self.schemas: list[pa.Schema] = []
        self.row_counts: list[int] = []

    def __enter__(self) -> Self:
        try:
            self._stamps = file_digests.read_stamps(self._data_files, self)
            for file in self.files if self._has_footers else ():
                if not self._is_local and self._total_bytes <= file_digests.MAX_FULL_HASH_BYTES:
                    self._arrow_source(file)  # the whole file is needed anyway
                metadata = self._metadata(file)
                with _parquet_errors(file):
                    self.schemas.append(metadata.schema.to_arrow_schema())
                self.row_counts.append(metadata.num_rows)
                note_progress()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._fetched.clear()
        self._stack.close()

    @property
    def paths(self) -> list[str]:
        """The paths of the files in their file system."""
        return [self._reader.full_path(file.name) for file in self.files]

    @property
    def num_rows(self) -> int:
        return sum(self.row_counts)

    def compute_fingerprint(self, on_progress: ProgressFn = lambda text: None) -> str:
        """Return the SHA-256 in hex over name, size and content of every file, sorted by name.

        Modification times and locations are not included. A table that `stored_tables` wrote has the digest in its
        name. For the tokens of the content see
        `pipeline.data.sources.file_digests`.

        Parameters
        ----------
        on_progress: called with a progress message, at most once a second.
        """
        if (stored_digest := find_stored_digest(self._data_url)) is not None:
            return stored_digest
        self._digests = FileDigests(
            self._data_files,
            self,
            url=self._data_url,
            cache=self._cache,
            num_threads=file_digests.select_num_read_threads(self._reader.is_remote),
            on_progress=on_progress,
            stamps=self._stamps,
        )
        digest = hashlib.sha256()
        for file, token in zip(self.files, self._digests.tokens, strict=True):
            digest.update(f"{file.name}\0{file.size_bytes}\0{token}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Assumptions of the fingerprint."""
        return self._digests.warnings if self._digests is not None else ()

    def verify(self) -> None:
        """Raise DataError if a file has changed since the fingerprint was computed."""
        if self._digests is not None:
            self._digests.verify()

    def call(self, number: int, action: Callable[[], Any]) -> Any:
        """See `FileAccess`."""
        with _parquet_errors(self.files[number]):
            return action()

    def read(self, number: int, first: int, end: int) -> bytes:
        """See `FileAccess`."""
        return self._read_range(self.files[number], first, end)

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

    def list_checksums(self) -> list[str]:
        """See `FileAccess`."""
        checksums = {file.name: file.checksum for file in find_parquet(self._data_url)[1]}
        return [checksums.get(file.name, "") for file in self.files]

    def column_kinds(self, number: int) -> dict[str, ArrowKind]:
        """Return the kinds of the columns of a file, in order; partition columns come last."""
        return {name: arrow_kind(kind) for name, kind in self.column_types(number).items()}

    def column_types(self, number: int) -> dict[str, pa.DataType]:
        """Return the Arrow types of the same columns."""
        schema, file = self.schemas[number], self.files[number]
        if len(set(schema.names)) < len(schema.names):
            duplicate = next(name for name in schema.names if schema.names.count(name) > 1)
            raise DataError(f"two columns are called {duplicate!r}", where=file.where, fix="rename one of them")
        stored_types = dict(zip(schema.names, schema.types, strict=True))
        return stored_types | {
            name: self._partition_types[name] for name in file.partitions if name not in stored_types
        }

    def iter_batches(self, number: int, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a file in order, with the given columns, in batches of up to `batch_rows` rows. Partition
        columns are constant."""
        file, stored_names = self.files[number], set(self.schemas[number].names)
        stored = [name for name in columns if name in stored_names]
        total = 0
        for batch in self._iter_stored_batches(file, stored, self.row_counts[number], batch_rows):
            arrays = [
                batch.column(name) if name in stored_names else self._partition_array(file, name, batch.num_rows)
                for name in columns
            ]
            total += batch.num_rows
            note_progress()
            if batch.num_rows:
                yield pa.RecordBatch.from_arrays(arrays, names=list(columns))
        if total != self.row_counts[number]:
            raise DataError(
                f"has {total:,} rows, but {self.row_counts[number]:,} according to its footer",
                where=file.where,
                fix=REWRITE_HINT,
            )

    def release(self, number: int) -> None:
        """Remove the downloaded copy of a file."""
        fetched = self._fetched.pop(self.files[number].name, None)
        if isinstance(fetched, Path):
            fetched.unlink()

    def _iter_stored_batches(
        self, file: ListedFile, columns: list[str], num_rows: int, batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        if not columns:  # only partition columns are read
            for first in range(0, num_rows, batch_rows):
                yield pa.RecordBatch.from_arrays([pa.nulls(min(batch_rows, num_rows - first))], names=[""])
            return
        with _parquet_errors(file):
            opened = pq.ParquetFile(
                self._arrow_source(file),
                pre_buffer=False,
                buffer_size=COLUMN_BUFFER_BYTES,
                page_checksum_verification=True,
            )
        with opened:
            batches = opened.iter_batches(batch_rows, columns=columns, use_threads=False)  # threads use more memory
            while True:
                with _parquet_errors(file):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    @cached_property
    def _partition_types(self) -> dict[str, pa.DataType]:
        """The types of the partition columns: whole numbers if the values in all paths are such, else text."""
        values_by_name: dict[str, list[str]] = {}
        for file in self.files:
            for name, value in file.partitions.items():
                values_by_name.setdefault(name, []).extend([] if value is None else [value])
        return {
            name: pa.int64() if values and all(map(WHOLE.fullmatch, values)) else pa.string()
            for name, values in values_by_name.items()
        }

    def _partition_array(self, file: ListedFile, name: str, num_rows: int) -> pa.Array:
        value = pa.scalar(file.partitions[name], pa.string())
        return pa.repeat(value.cast(self._partition_types[name]), num_rows)

    def _arrow_source(self, file: ListedFile) -> Any:
        """Return the path or buffer from which Arrow reads a file."""
        if self._is_local:
            return self._reader.local_path(file.name)
        if file.name not in self._fetched:
            self._fetched[file.name] = self._fetch(file)
        fetched = self._fetched[file.name]
        return str(fetched) if isinstance(fetched, Path) else fetched

    def _fetch(self, file: ListedFile) -> Path | pa.Buffer:
        if self._total_bytes <= self._cache.in_memory_mb * 10**6:
            with as_data_errors(file.where):
                return pa.py_buffer(self._reader.read(file.name))
        if self._folder is None:
            self._folder = self._stack.enter_context(scratch_folder(self._cache, self._total_bytes))
        target = self._folder / str(len(self._fetched))
        with track_folder_growth(self._folder), as_data_errors(file.where):
            self._reader.download(file.name, str(target))
        return target

    def _metadata(self, file: ListedFile) -> Any:
        """Return the metadata in the footer of a file."""
        with _parquet_errors(file):
            return pq.read_metadata(pa.BufferReader(MAGIC + self._read_tail(file, self._footer_size(file))))

    def _footer_size(self, file: ListedFile) -> int:
        """Return the number of bytes from the metadata to the end of a file."""
        length = len(MAGIC) + 4
        with _parquet_errors(file):
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

    def _read_head(self, file: ListedFile) -> bytes:
        return self._read_range(file, 0, min(file.size_bytes, 512))

    def _read_range(self, file: ListedFile, first: int, end: int) -> bytes:
        is_whole = (first, end) == (0, file.size_bytes)
        if not self._is_local and file.name not in self._fetched:
            with as_data_errors(file.where):
                return self._reader.read(file.name) if is_whole else self._reader.read_range(file.name, first, end)
        with self._open_stream(file) as stream:
            stream.seek(first)
            return stream.read(end - first)

    def _open_stream(self, file: ListedFile) -> IO[bytes]:
        source = self._arrow_source(file)
        return io.BytesIO(source) if isinstance(source, pa.Buffer) else open(source, "rb")


def check_parquet_files(url: str) -> None:
    """Check that there are files at a URL, and that the first of them begin and end as Parquet does. Nothing else is
    read.

    Raises
    ------
    DataError: an unusable URL, no permission, no files, or one that is not Parquet.
    """
    reader, files = find_parquet(url)
    for file in files[:MAX_CHECKED_FILES]:
        with _parquet_errors(file):
            head = reader.read_range(file.name, 0, min(file.size_bytes, 512))
            tail = reader.read_range(file.name, max(file.size_bytes - len(MAGIC), 0), file.size_bytes)
        if tail != MAGIC or not head.startswith(MAGIC):
            raise _not_parquet_error(file, head)


@contextmanager
def _parquet_errors(file: ListedFile) -> Iterator[None]:
    """Turn errors of Arrow and of the system into errors with the name of the file, except for MemoryError."""
    try:
        with as_data_errors(file.where):
            yield
    except PermissionError as error:
        raise DataError("no permission to read it", where=file.where, fix="check its rights") from error
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, MemoryError):
            raise
        raise DataError(
            f"is corrupt or truncated ({summarize_error(error)})", where=file.where, fix=REWRITE_HINT
        ) from error


def _not_parquet_error(file: ListedFile, head: bytes) -> DataError:
    """Return the error for a file that does not end as Parquet does."""
    if head.startswith(MAGIC):
        return DataError(
            f"is truncated: it begins as Parquet, but does not end as Parquet ({file.size_bytes:,} bytes)",
            where=file.where,
            fix=REWRITE_HINT,
        )
    format_name = next((name for magic, name in OTHER_FORMATS.items() if head.startswith(magic)), None)
    if format_name is None and not head:
        return DataError("is empty", where=file.where, fix=REWRITE_HINT)
    if format_name is None and b"\0" not in head:
        line = head.partition(b"\n")[0].decode(errors="replace").strip()[:60]
        format_name = "JSON" if line[:1] in ("{", "[") else "CSV" if {",", ";", "\t"} & set(line) else "text"
        format_name += f", it begins with {line!r}"
    return DataError(
        "is not a Parquet file" + (f" but {format_name}" if format_name else ""), where=file.where, fix=CONVERT_HINT
    )
