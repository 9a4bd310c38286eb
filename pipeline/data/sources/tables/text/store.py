"""Where the parsed blocks of text files are kept: in memory, or, if they are large, in a temporary file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa

from pipeline.config import CacheConfig
from pipeline.data.cache import scratch_folder


class BatchStore:
    """Keeps record batches, which several threads may append.

    Beyond `cache.in_memory_mb`, all are in a temporary file in the folder of the cache, which is mapped to memory, and
    which is deleted at the end.

    Parameters
    ----------
    estimate_bytes: given the bytes stored so far, returns how many there will be.
    """

    def __init__(self, cache: CacheConfig, estimate_bytes: Callable[[int], int]) -> None:
        self._cache, self._estimate_bytes = cache, estimate_bytes
        self._batches: dict[int, pa.RecordBatch] = {}
        self._ranges: dict[int, tuple[int, int]] = {}
        self._lock, self._stack = threading.Lock(), ExitStack()
        self._descriptor, self._path = -1, Path()
        self._count = self._num_bytes = 0
        self._mapped: pa.Buffer | None = None

    def close(self) -> None:
        """Delete everything."""
        self._batches.clear()
        self._mapped = None
        self._stack.close()

    def append(self, batch: pa.RecordBatch) -> int:
        """Keep a batch and return its key.

        Raises
        ------
        DataError: the folder of the cache cannot be used, or is full.
        OSError: the disk is full.
        """
        with self._lock:
            key = self._count
            self._count += 1
            if self._descriptor < 0:
                self._batches[key] = batch
                self._num_bytes += batch.nbytes
                if self._num_bytes > self._cache.in_memory_mb * 10**6:
                    self._move_to_disk()
                return key
        self._write(key, batch)
        return key

    def read(self, key: int, columns: Sequence[str]) -> pa.RecordBatch:
        """Return these columns of a batch."""
        if self._descriptor < 0:
            return self._batches[key].select(list(columns))
        if self._mapped is None or key >= self._num_mapped:
            self._num_mapped = self._count
            with pa.memory_map(str(self._path)) as file:
                self._mapped = file.read_buffer()
        first, size = self._ranges[key]
        buffer = pa.BufferReader(self._mapped.slice(first, size))
        names = pa.ipc.read_schema(buffer).names
        buffer.seek(0)
        options = pa.ipc.IpcReadOptions(included_fields=sorted(names.index(column) for column in columns))
        return pa.ipc.open_stream(buffer, options=options).read_next_batch().select(list(columns))

    def _move_to_disk(self) -> None:
        size_bytes = self._estimate_bytes(self._num_bytes)
        self._path = self._stack.enter_context(scratch_folder(self._cache, size_bytes)) / "blocks.arrow"
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        self._stack.callback(os.close, self._descriptor)
        self._num_bytes = 0
        for key, batch in self._batches.items():
            first, buffer = self._num_bytes, _serialize(batch)
            self._ranges[key] = first, buffer.size
            self._num_bytes += buffer.size
            _write_all(self._descriptor, buffer, first)
        self._batches.clear()

    def _write(self, key: int, batch: pa.RecordBatch) -> None:
        buffer = _serialize(batch)
        with self._lock:
            first = self._num_bytes
            self._num_bytes += buffer.size
            self._ranges[key] = first, buffer.size
        _write_all(self._descriptor, buffer, first)


def _serialize(batch: pa.RecordBatch) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _write_all(descriptor: int, buffer: pa.Buffer, offset: int) -> None:
    view = memoryview(buffer)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
