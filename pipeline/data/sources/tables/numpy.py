"""Read NumPy files as tables.

`.npy`: the columns of a matrix (N, F) are named "0", "1", ...; those of a structured array are its fields; an array
(N,) is one column "0". `.npz`: each array (N,) is a column of its name, and each array (N, ...) is a column of lists of
fixed size, whose shape `data.shape` can restore. So features and labels saved as `X` and `y` are two columns.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.data.sources.tables.files import REWRITE_HINT, TableFiles, file_errors
from pipeline.data.sources.tables.partitions import ListedFile
from pipeline.data.sources.tables.sniff import check_head
from pipeline.errors import DataError

ZIP_MAGIC = b"PK\x03\x04"
MAX_HEADER_BYTES = 1 << 20


class StoredArray(NamedTuple):
    """An array in a file. name: of the member of the archive; empty for a `.npy` file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:]))


class NumpyFiles(TableFiles):
    """The NumPy files of a URL, see `TableFiles`."""

    def _read_layout(self, number: int) -> tuple[pa.Schema, int]:
        file = self.files[number]
        check_head(file, self._read_head(file), "numpy")
        arrays = self._list_arrays(file)
        if not arrays:
            raise DataError("has no arrays", where=file.where, fix=REWRITE_HINT)
        counts = {name: array.shape[0] for name, array in arrays.items()}
        if len(set(counts.values())) > 1:
            raise DataError(
                f"its arrays have different numbers of rows: {', '.join(f'{n} {c:,}' for n, c in counts.items())}",
                where=file.where,
                fix="save one row per sample in each, and other arrays in another file",
            )
        return pa.schema(list(_column_types(arrays, file).items())), next(iter(counts.values()))

    def _iter_stored_batches(self, number: int, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        file = self.files[number]
        arrays = self._list_arrays(file)
        if set(arrays) == {""}:
            parts = (_split_columns(rows, columns) for rows in self._iter_rows(file, arrays[""], batch_rows))
            yield from (pa.RecordBatch.from_arrays(part, names=columns) for part in parts)
            return
        streams = [self._iter_rows(file, arrays[name], batch_rows) for name in columns]
        for rows in zip(*streams, strict=True):
            yield pa.RecordBatch.from_arrays([_to_arrow(values) for values in rows], names=columns)

    def _list_arrays(self, file: ListedFile) -> dict[str, StoredArray]:
        """Return the arrays of a file by name."""
        with self._errors(file), self._open_stream(file) as stream:
            if stream.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
                stream.seek(0)
                return {"": self._read_header(file, stream, "")}
            arrays = {}
            with zipfile.ZipFile(stream) as archive:
                for member in archive.namelist():
                    if not member.endswith(".npy"):
                        raise DataError(
                            f"has {member!r}, which is no array", where=file.where, fix="write it with numpy.savez"
                        )
                    with archive.open(member) as content:
                        arrays[member.removesuffix(".npy")] = self._read_header(file, content, member)
            return arrays

    def _read_header(self, file: ListedFile, stream: IO[bytes], member: str) -> StoredArray:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(stream, max_header_size=MAX_HEADER_BYTES)
        what = f"the array {member.removesuffix('.npy')!r}" if member else "the array"
        if not shape:
            raise DataError(
                f"{what} has no rows: it is a single value", where=file.where, fix="save one row per sample"
            )
        if dtype.hasobject:
            raise DataError(
                f"{what} holds Python objects, which are not loaded from files",
                where=file.where,
                fix="save numbers or text, such as array.astype(str)",
            )
        return StoredArray(member, shape, dtype, is_fortran)

    def _iter_rows(self, file: ListedFile, array: StoredArray, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield the rows of an array in blocks of `batch_rows`."""
        with ExitStack() as stack, self._errors(file):
            stream = stack.enter_context(self._open_stream(file))
            if array.name:
                archive = stack.enter_context(zipfile.ZipFile(stream))
                stream = stack.enter_context(archive.open(array.name))
            if array.is_fortran and len(array.shape) > 1:  # rows are not contiguous
                values = np.lib.format.read_array(stream, allow_pickle=False)
                for first in range(0, len(values), batch_rows):
                    yield values[first : first + batch_rows]
                return
            self._read_header(file, stream, array.name)
            for first in range(0, array.shape[0], batch_rows):
                count = min(batch_rows, array.shape[0] - first)
                data = _read_exactly(stream, count * array.row_bytes)
                yield np.frombuffer(data, array.dtype).reshape(count, *array.shape[1:])

    @contextmanager
    def _errors(self, file: ListedFile) -> Iterator[None]:
        try:
            with file_errors(file):
                yield
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"is corrupt or truncated ({reason})", where=file.where, fix=REWRITE_HINT) from None


def _column_types(arrays: dict[str, StoredArray], file: ListedFile) -> dict[str, pa.DataType]:
    """Return the Arrow type of each column, from an array without rows."""
    types: dict[str, pa.DataType] = {}
    for name, array in arrays.items():
        empty = np.empty((0, *array.shape[1:]), array.dtype)
        try:
            if not name:
                names = _npy_columns(array, file)
                types.update(zip(names, (column.type for column in _split_columns(empty, names)), strict=True))
            elif array.dtype.names is not None:
                raise DataError(f"the array {name!r} is structured", where=file.where, fix="save it as a .npy file")
            else:
                types[name] = _to_arrow(empty).type
        except (pa.ArrowException, TypeError) as error:
            raise DataError(
                f"{f'the array {name!r}' if name else 'the array'} holds {array.dtype}, which no column can hold",
                where=file.where,
                fix="save numbers, booleans, text or times",
            ) from error
    return types


def _npy_columns(array: StoredArray, file: ListedFile) -> list[str]:
    if array.dtype.names is not None and len(array.shape) == 1:
        return list(array.dtype.names)
    if len(array.shape) > 2 or array.dtype.names is not None:
        raise DataError(
            f"the array has the shape {array.shape}, not (rows, columns)",
            where=file.where,
            fix="save samples of more axes, and their labels, with numpy.savez: each array becomes a column",
        )
    return [str(index) for index in range(array.shape[1] if len(array.shape) == 2 else 1)]


def _split_columns(rows: np.ndarray, columns: list[str]) -> list[pa.Array]:
    """Return the columns of rows of a `.npy` file."""
    if rows.dtype.names is not None:
        return [_to_arrow(rows[name]) for name in columns]
    matrix = rows[:, None] if rows.ndim == 1 else rows
    return [_to_arrow(matrix[:, int(name)]) for name in columns]


def _to_arrow(values: np.ndarray) -> pa.Array:
    """Return an array (n,) as a column, or (n, ...) as a column of lists of fixed size."""
    flat = np.ascontiguousarray(values.reshape(-1))
    if not flat.dtype.isnative:
        flat = flat.astype(flat.dtype.newbyteorder("="))
    if flat.dtype.kind == "S":
        flat = np.char.decode(flat, "utf-8")
    column = pa.array(flat)
    if values.ndim == 1:
        return column
    width = int(np.prod(values.shape[1:]))
    return pa.FixedSizeListArray.from_arrays(column, width)


def _read_exactly(stream: IO[bytes], size: int) -> bytes:
    buffer = io.BytesIO()
    while buffer.tell() < size and (block := stream.read(size - buffer.tell())):
        buffer.write(block)
    if buffer.tell() < size:
        raise EOFError("the array ends early")
    return buffer.getvalue()
