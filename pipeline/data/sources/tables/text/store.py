"""Where the parsed blocks of text files are kept: in memory, or, if they are large, in temporary files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa

from pipeline.config import CacheConfig
from pipeline.data.cache import scratch_folder


class BatchStore:
    """Keeps record batches, which several threads may append.

    Beyond `cache.in_memory_mb`, all are in temporary files in the folder of the cache, which are mapped to memory to
    read them, and which are deleted at the end.

    Parameters
    ----------
    estimate_bytes: given the bytes stored so far, returns how many there will be.
    """

    def __init__(self, cache: CacheConfig, estimate_bytes: Callable[[int], int]) -> None:
        self._cache, self._estimate_bytes = cache, estimate_bytes
        self._batches: dict[int, pa.RecordBatch] = {}
        self._lock, self._stack = threading.Lock(), ExitStack()
        self._folder: Path | None = None
        self._count = self._num_bytes = 0

    def close(self) -> None:
        """Delete everything."""
        self._batches.clear()
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
            if self._folder is None:
                self._batches[key] = batch
                self._num_bytes += batch.nbytes
                if self._num_bytes > self._cache.in_memory_mb * 10**6:
                    self._move_to_disk()
                return key
        self._write(key, batch)
        return key

    def read(self, key: int, columns: Sequence[str]) -> pa.RecordBatch:
        """Return these columns of a batch."""
        if self._folder is None:
            return self._batches[key].select(list(columns))
        with pa.memory_map(str(self._folder / f"{key}.arrow")) as file:
            names = pa.ipc.read_schema(file).names
            file.seek(0)
            options = pa.ipc.IpcReadOptions(included_fields=sorted(names.index(column) for column in columns))
            return pa.ipc.open_stream(file, options=options).read_next_batch().select(list(columns))

    def _move_to_disk(self) -> None:
        self._folder = self._stack.enter_context(scratch_folder(self._cache, self._estimate_bytes(self._num_bytes)))
        for key in list(self._batches):
            self._write(key, self._batches.pop(key))

    def _write(self, key: int, batch: pa.RecordBatch) -> None:
        with pa.OSFile(f"{self._folder}/{key}.arrow", "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
