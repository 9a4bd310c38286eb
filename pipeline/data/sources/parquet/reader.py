"""Parquet files anywhere: their columns, rows and fingerprint, and their rows batch by batch."""

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
from pipeline.data.sources.file_digests import DataFile, FileDigests, FileStamp, ProgressFn
from pipeline.data.sources.parquet.partitions import ListedFile, find_parquet
from pipeline.data.tabular.schema import ArrowKind, arrow_kind
from pipeline.errors import DataError
from pipeline.redaction import redact
from pipeline.storage.read_files import as_data_errors
from pipeline.storage.retry import summarize_error
from pipeline.watchdog import note_progress

MAX_SAMPLED_CHUNKS = 256
SAMPLE_BYTES = 64 << 10
"""Of a file whose store has no checksums, so many column chunks are sampled, and so many bytes of each."""

COLUMN_BUFFER_BYTES = 1 << 16
"""Bytes of each column that are read ahead. Without it a whole column of a row group is held at once."""

MAX_CHECKED_FILES = 16
"""Files whose beginning and end are looked at before any is read."""

MAGIC = b"PAR1"
OTHER_FORMATS = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "gzip", b"ARROW1": "an Arrow (Feather) file"}
CONVERT_HINT = (
    "write it as Parquet, for instance with pandas: read_csv(...).to_parquet(...); or leave it out with a glob"
)
REWRITE_HINT = "write it again, or leave it out with a glob"
WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")
"""What a folder's name says as a number; 007 is a text."""


class ParquetFiles:
    """The files that a URL means. Remote ones are fetched once, into memory while they are small, else to disk.

    Used as a context, which ends by removing what was fetched.

    Parameters
    ----------
    footers: whether to read them at once: without them no method but `fingerprint` is of use.

    Raises
    ------
    DataError: from every method: no files, no permission, and files that are no Parquet, corrupt or truncated, by name.
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
                    self._arrow_source(file)  # all of it is needed anyway
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
        """SHA-256 in hex over name, size and content of every file, in the order of the names.

        No modification time and no location counts. What stands for the content: see
        `pipeline.data.sources.file_digests`.

        Parameters
        ----------
        say: told of progress, at most once a second.
        """
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
        """What the fingerprint assumes."""
        return self._digests.warnings if self._digests is not None else ()

    def verify(self) -> None:
        """Raise DataError if a file is no longer what the fingerprint was made of."""
        if self._digests is not None:
            self._digests.verify()

    def call(self, number: int, action: Callable[[], Any]) -> Any:
        """As in `digests.Access`."""
        with _parquet_errors(self.files[number]):
            return action()

    def read(self, number: int, first: int, end: int) -> bytes:
        """As in `digests.Access`."""
        return self._read_range(self.files[number], first, end)

    def sample_ranges(self, number: int) -> list[tuple[int, int]]:
        """The footer, and the first pages of up to `SAMPLED_CHUNKS` column chunks: of every column some, in row groups
        that are spread over the file."""
        file = self.files[number]
        metadata = self._metadata(file)
        columns, groups = metadata.num_columns, metadata.num_row_groups
        ranges = [(file.size_bytes - self._footer_size(file), file.size_bytes)]
        taken = min(columns * groups, MAX_SAMPLED_CHUNKS)
        for place in range(taken):
            column, group = divmod(place * columns * groups // taken, groups)
            chunk = metadata.row_group(group).column(column)
            first = min(offset for offset in (chunk.dictionary_page_offset, chunk.data_page_offset) if offset)
            ranges.append((first, first + min(SAMPLE_BYTES, chunk.total_compressed_size)))
        return ranges

    def list_checksums(self) -> list[str]:
        """As in `digests.Access`."""
        now = {file.name: file.checksum for file in find_parquet(self._data_url)[1]}
        return [now.get(file.name, "") for file in self.files]

    def column_kinds(self, number: int) -> dict[str, ArrowKind]:
        """What the columns of a file hold, in order; those that its path names come last."""
        return {name: arrow_kind(kind) for name, kind in self.column_types(number).items()}

    def column_types(self, number: int) -> dict[str, pa.DataType]:
        """The Arrow types of the same columns."""
        schema, file = self.schemas[number], self.files[number]
        if len(set(schema.names)) < len(schema.names):
            twice = next(name for name in schema.names if schema.names.count(name) > 1)
            raise DataError(f"two columns are called {twice!r}", where=file.where, fix="rename one of them")
        stored_types = dict(zip(schema.names, schema.types, strict=True))
        return stored_types | {
            name: self._partition_types[name] for name in file.partitions if name not in stored_types
        }

    def iter_batches(self, number: int, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of a file in order, some columns alone, up to `rows` at once; its path's columns as constants."""
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
                f"holds {total:,} rows, but its footer says {self.row_counts[number]:,}",
                where=file.where,
                fix=REWRITE_HINT,
            )

    def release(self, number: int) -> None:
        """Remove what was fetched of a file."""
        fetched = self._fetched.pop(self.files[number].name, None)
        if isinstance(fetched, Path):
            fetched.unlink()

    def _iter_stored_batches(
        self, file: ListedFile, columns: list[str], count: int, rows: int
    ) -> Iterator[pa.RecordBatch]:
        if not columns:  # only what the path says
            for first in range(0, count, rows):
                yield pa.RecordBatch.from_arrays([pa.nulls(min(rows, count - first))], names=[""])
            return
        with _parquet_errors(file):
            opened = pq.ParquetFile(
                self._arrow_source(file),
                pre_buffer=False,
                buffer_size=COLUMN_BUFFER_BYTES,
                page_checksum_verification=True,
            )
        with opened:
            batches = opened.iter_batches(rows, columns=columns, use_threads=False)  # each thread would hold memory
            while True:
                with _parquet_errors(file):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    @cached_property
    def _partition_types(self) -> dict[str, pa.DataType]:
        """Whole numbers where all files' paths say such, else text."""
        values_by_name: dict[str, list[str]] = {}
        for file in self.files:
            for name, value in file.partitions.items():
                values_by_name.setdefault(name, []).extend([] if value is None else [value])
        return {
            name: pa.int64() if values and all(map(WHOLE.fullmatch, values)) else pa.string()
            for name, values in values_by_name.items()
        }

    def _partition_array(self, file: ListedFile, name: str, rows: int) -> pa.Array:
        value = pa.scalar(file.partitions[name], pa.string())
        return pa.repeat(value.cast(self._partition_types[name]), rows)

    def _arrow_source(self, file: ListedFile) -> Any:
        """What Arrow reads the file from."""
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
        """What the footer says."""
        with _parquet_errors(file):
            return pq.read_metadata(pa.BufferReader(MAGIC + self._read_tail(file, self._footer_size(file))))

    def _footer_size(self, file: ListedFile) -> int:
        """Bytes at the end of a file from its metadata on."""
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
        is_all = (first, end) == (0, file.size_bytes)
        if not self._is_local and file.name not in self._fetched:
            with as_data_errors(file.where):
                return self._reader.read(file.name) if is_all else self._reader.read_range(file.name, first, end)
        with self._open_stream(file) as stream:
            stream.seek(first)
            return stream.read(end - first)

    def _open_stream(self, file: ListedFile) -> IO[bytes]:
        source = self._arrow_source(file)
        return io.BytesIO(source) if isinstance(source, pa.Buffer) else open(source, "rb")


def check_parquet_files(url: str) -> None:
    """Whether there are files at a URL, and the first of them begin and end as Parquet does. Nothing else is read.

    Raises
    ------
    DataError: an unusable URL, no permission, no files, or one that is no Parquet.
    """
    reader, files = find_parquet(url)
    for file in files[:MAX_CHECKED_FILES]:
        with _parquet_errors(file):
            begin = reader.read_range(file.name, 0, min(file.size_bytes, 512))
            end = reader.read_range(file.name, max(file.size_bytes - len(MAGIC), 0), file.size_bytes)
        if end != MAGIC or not begin.startswith(MAGIC):
            raise _not_parquet_error(file, begin)


@contextmanager
def _parquet_errors(file: ListedFile) -> Iterator[None]:
    """Arrow's and the system's errors as errors of a file; a lack of memory is none."""
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


def _not_parquet_error(file: ListedFile, begin: bytes) -> DataError:
    """What to say of a file that does not end as Parquet does."""
    if begin.startswith(MAGIC):
        return DataError(
            f"is truncated: it begins as Parquet, but does not end so ({file.size_bytes:,} bytes)",
            where=file.where,
            fix=REWRITE_HINT,
        )
    format_name = next((name for start, name in OTHER_FORMATS.items() if begin.startswith(start)), None)
    if format_name is None and not begin:
        return DataError("is empty", where=file.where, fix=REWRITE_HINT)
    if format_name is None and b"\0" not in begin:
        line = begin.partition(b"\n")[0].decode(errors="replace").strip()[:60]
        format_name = "JSON" if line[:1] in ("{", "[") else "CSV" if {",", ";", "\t"} & set(line) else "text"
        format_name += f", it begins with {line!r}"
    return DataError(
        "is no Parquet file" + (f" but {format_name}" if format_name else ""), where=file.where, fix=CONVERT_HINT
    )
