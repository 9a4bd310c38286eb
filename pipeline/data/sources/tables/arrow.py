"""Read Arrow IPC files, which are Feather version 2, and Arrow IPC streams."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.dataset as pa_dataset

from pipeline.data.sources.tables.files import TableFiles, file_errors
from pipeline.data.sources.tables.partitions import ListedFile
from pipeline.data.sources.tables.sniff import check_head
from pipeline.errors import DataError

FILE_MAGIC, FEATHER_1_MAGIC = b"ARROW1", b"FEA1"


class ArrowFiles(TableFiles):
    """The Arrow IPC files of a URL, see `TableFiles`."""

    def _read_layout(self, number: int) -> tuple[pa.Schema, int]:
        file = self.files[number]
        head = self._read_head(file)
        check_head(file, head, "arrow")
        if head.startswith(FEATHER_1_MAGIC):
            raise DataError(
                "is Feather version 1, which is no Arrow file", where=file.where, fix="write it with version=2"
            )
        with file_errors(file):
            if head.startswith(FILE_MAGIC):
                with self._open_input(file) as source, pa.ipc.open_file(source) as reader:
                    schema = reader.schema
                source = self._arrow_source(file)
                if isinstance(source, str):
                    return schema, pa_dataset.dataset(source, format="ipc").count_rows()
            else:
                with self._open_input(file) as source, pa.ipc.open_stream(source) as stream:
                    schema = stream.schema
            return schema, sum(batch.num_rows for batch in self._iter_all(file, schema.names[:1]))

    def _iter_stored_batches(self, number: int, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        file = self.files[number]
        batches = self._iter_all(file, columns)
        while True:
            with file_errors(file):
                batch = next(batches, None)
                if batch is None:
                    return
                batch.validate(full=True)  # offsets of a damaged file could point anywhere
            for first in range(0, batch.num_rows, batch_rows):
                yield batch.slice(first, batch_rows)

    def _iter_all(self, file: ListedFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the batches of a file as they are stored, with some columns."""
        with self._open_input(file) as source:
            is_file = source.read(len(FILE_MAGIC)) == FILE_MAGIC
            source.seek(0)
            names = (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).schema.names
            source.seek(0)
            options = pa.ipc.IpcReadOptions(included_fields=sorted(names.index(name) for name in columns))
            if is_file:
                reader = pa.ipc.open_file(source, options=options)
                for index in range(reader.num_record_batches):
                    yield reader.get_batch(index).select(columns)
            else:
                for batch in pa.ipc.open_stream(source, options=options):
                    yield batch.select(columns)

    def _open_input(self, file: ListedFile) -> pa.NativeFile:
        source = self._arrow_source(file)
        return pa.OSFile(source) if isinstance(source, str) else pa.BufferReader(source)
