"""Tables in files of any format at any URL: their columns, row counts and fingerprint, and their rows in batches."""

from __future__ import annotations

import hashlib
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Self

import pyarrow as pa

from pipeline.config import CacheConfig
from pipeline.data.cache import scratch_folder, track_folder_growth
from pipeline.data.sources import file_digests
from pipeline.data.sources.file_digests import DataFile, FileDigests, FileStamp, evenly_spaced_ranges
from pipeline.data.sources.tables.partitions import ListedFile, find_table_files
from pipeline.data.stored_tables import find_stored_digest
from pipeline.data.tabular.arrow_types import ArrowKind, arrow_kind
from pipeline.errors import DataError
from pipeline.events import ProgressFn
from pipeline.redaction import redact
from pipeline.storage.read_files import as_data_errors
from pipeline.storage.retry import summarize_error
from pipeline.watchdog import note_progress

REWRITE_HINT = "write it again, or exclude it with a glob"
WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")
"""Partition values that are whole numbers; 007 is text."""

HEAD_BYTES = 512


class TableFiles(ABC):
    """The files of a URL. Remote files are downloaded once, to memory if they are small in total, else to disk.

    It is a context manager, which removes downloaded and temporary files at the end. There is a subclass for each file
    format.

    Parameters
    ----------
    read_layouts: whether to read the columns and row counts at once, at the least cost of the format. Without them,
        only `compute_fingerprint` can be used.

    Raises
    ------
    DataError: from every method: no files, no permission, or a file that is of another format, corrupt or truncated,
        with its name.
    """

    def __init__(self, url: str, cache: CacheConfig, *, read_layouts: bool = True) -> None:
        self._reader, self.files = find_table_files(url)
        self._data_url, self.url = url, redact(url)
        self._is_local = self._reader.is_local
        self._cache = cache
        self._has_layouts = read_layouts
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

    @abstractmethod
    def _read_layout(self, number: int) -> tuple[pa.Schema, int]:
        """Return the columns of a file and its number of rows."""

    @abstractmethod
    def _iter_stored_batches(self, number: int, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a file in order in batches of up to `batch_rows` rows, with these columns that it has."""

    def sample_ranges(self, number: int) -> list[tuple[int, int]]:
        """See `FileAccess`."""
        return evenly_spaced_ranges(self.files[number].size_bytes)

    def __enter__(self) -> Self:
        try:
            self._stamps = file_digests.read_stamps(self._data_files, self)
            for number, file in enumerate(self.files) if self._has_layouts else ():
                if not self._is_local and self._total_bytes <= file_digests.MAX_FULL_HASH_BYTES:
                    self._arrow_source(file)  # the whole file is needed anyway
                schema, num_rows = self._read_layout(number)
                self.schemas.append(schema)
                self.row_counts.append(num_rows)
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

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return self._total_bytes

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
        """Assumptions of the fingerprint, and of how the files are read."""
        return self._digests.warnings if self._digests is not None else ()

    def verify(self) -> None:
        """Raise DataError if a file has changed since the fingerprint was computed."""
        if self._digests is not None:
            self._digests.verify()

    def call(self, number: int, action: Callable[[], Any]) -> Any:
        """See `FileAccess`."""
        with file_errors(self.files[number]):
            return action()

    def read(self, number: int, first: int, end: int) -> bytes:
        """See `FileAccess`."""
        return self._read_range(self.files[number], first, end)

    def list_checksums(self) -> list[str]:
        """See `FileAccess`."""
        checksums = {file.name: file.checksum for file in find_table_files(self._data_url)[1]}
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
        columns are constant. Columns of text may be dictionary-encoded."""
        file, stored_names = self.files[number], set(self.schemas[number].names)
        stored = [name for name in columns if name in stored_names]
        total, num_rows = 0, self.row_counts[number]
        batches = (
            self._iter_stored_batches(number, stored, batch_rows)
            if stored
            else _iter_empty_batches(num_rows, batch_rows)  # only partition columns are read
        )
        for batch in batches:
            arrays = [
                batch.column(name) if name in stored_names else self._partition_array(file, name, batch.num_rows)
                for name in columns
            ]
            total += batch.num_rows
            note_progress()
            if batch.num_rows:
                yield pa.RecordBatch.from_arrays(arrays, names=list(columns))
        if total != num_rows:
            raise DataError(
                f"has {total:,} rows, but {num_rows:,} according to its footer", where=file.where, fix=REWRITE_HINT
            )

    def release(self, number: int) -> None:
        """Remove the downloaded copy of a file."""
        fetched = self._fetched.pop(self.files[number].name, None)
        if isinstance(fetched, Path):
            fetched.unlink()

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

    def _read_head(self, file: ListedFile) -> bytes:
        return self._read_range(file, 0, min(file.size_bytes, HEAD_BYTES))

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


def _iter_empty_batches(num_rows: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
    for first in range(0, num_rows, batch_rows):
        yield pa.RecordBatch.from_arrays([pa.nulls(min(batch_rows, num_rows - first))], names=[""])


@contextmanager
def file_errors(file: ListedFile) -> Iterator[None]:
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
