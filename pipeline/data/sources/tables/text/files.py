"""Tables in text files: parsed once by several threads, block by block, into columns that are read afterwards."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import pyarrow as pa
import pyarrow.types as pt

from pipeline.config import CacheConfig
from pipeline.cpus import available_cpus
from pipeline.data.sources.tables.files import REWRITE_HINT, TableFiles, file_errors
from pipeline.data.sources.tables.text import blocks
from pipeline.data.sources.tables.text.blocks import Block, TextStream, count_lines, iter_blocks
from pipeline.data.sources.tables.text.parser import ParsedBlock, RecordError, TextParser
from pipeline.data.sources.tables.text.store import BatchStore
from pipeline.data.sources.tables.text.types import ColumnEvidence
from pipeline.errors import DataError
from pipeline.watchdog import note_progress

DICTIONARY = pa.dictionary(pa.int32(), pa.string())

SPARE_SPACE = 1.25
"""Factor on the estimated size of the parsed blocks on disk."""


@dataclass
class StoredBlock:
    """A parsed block.

    offset, size: of its text, in bytes. key: of its batch in the store. types: of the columns there.
    text_key: of the batch with the columns in `text_columns`, which were parsed again as text.
    """

    offset: int
    size: int
    num_rows: int
    key: int
    types: dict[str, pa.DataType]
    text_key: int = -1
    text_columns: tuple[str, ...] = ()


class TextFiles(TableFiles):
    """The text files of a URL, see `TableFiles`.

    All rows are parsed at once, since a type depends on all values of a column. A column has one type in all files.

    Parameters
    ----------
    text_columns: columns that are text whatever they contain.
    """

    def __init__(
        self, url: str, cache: CacheConfig, *, read_layouts: bool = True, text_columns: Collection[str] = ()
    ) -> None:
        super().__init__(url, cache, read_layouts=read_layouts)
        self._evidence = {name: ColumnEvidence({pa.string()}) for name in text_columns}
        self._blocks: list[list[StoredBlock]] = []
        self._parsers: list[TextParser] = []
        self._finished_bytes = self._current_bytes = 0
        self._store = BatchStore(cache, self._estimate_stored_bytes)
        self._stack.callback(self._store.close)

    @abstractmethod
    def _open_text(self, number: int) -> TextStream:
        """Open the text of a file."""

    @abstractmethod
    def _make_parser(self, number: int, head: bytes) -> TextParser:
        """Return the parser of a file, given the begin of its text."""

    def _check_names(self, number: int, names: list[str]) -> list[str]:
        """Return the columns of a file that are used."""
        return names

    def _merge_types(self, name: str, evidence: ColumnEvidence) -> pa.DataType:
        """Return the type of a column in all files."""
        return evidence.type

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            if self._has_layouts:
                self._unify_types()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _open_utf8(self, number: int, encoding: str) -> TextStream:
        file = self.files[number]
        if not file.size_bytes:
            raise DataError("is empty", where=file.where, fix=REWRITE_HINT)
        with file_errors(file):
            return TextStream(self._open_stream(file), encoding, file.where)

    def _read_layout(self, number: int) -> tuple[pa.Schema, int]:
        """Parse a file. The types of its columns are known only after the last file."""
        file, stored = self.files[number], list[StoredBlock]()
        self._blocks.append(stored)
        with file_errors(file), self._open_text(number) as stream:
            parser = self._make_parser(number, stream.peek())
            self._parsers.append(parser)
            for name in parser.stored_names:
                self._evidence.setdefault(name, ColumnEvidence())
            found = iter_blocks(stream, parser.header_bytes, blocks.BLOCK_BYTES, parser.find_last_end, file.where)
            threads = available_cpus()
            with ThreadPoolExecutor(threads) as pool:
                pending: deque[tuple[Block, Future[tuple[ParsedBlock, int]]]] = deque()
                try:
                    for block in found:
                        pending.append((block, pool.submit(self._parse, parser, block, self._known_types())))
                        self._current_bytes = stream.consumed_bytes
                        if len(pending) > threads:
                            stored.append(self._collect(number, *pending.popleft()))
                    while pending:
                        stored.append(self._collect(number, *pending.popleft()))
                finally:
                    pool.shutdown(cancel_futures=True)
        self._finished_bytes += file.size_bytes
        self._current_bytes = 0
        names = dict.fromkeys([*parser.stored_names, *(name for block in stored for name in block.types)])
        return pa.schema([(name, pa.null()) for name in names]), sum(block.num_rows for block in stored)

    def _parse(self, parser: TextParser, block: Block, known: dict[str, pa.DataType]) -> tuple[ParsedBlock, int]:
        parsed = parser.parse(block.data, known)
        return parsed, self._store.append(parsed.batch)

    def _collect(self, number: int, block: Block, parsing: Future[tuple[ParsedBlock, int]]) -> StoredBlock:
        """Wait for a block, and note the types of its columns."""
        try:
            parsed, key = parsing.result()
        except RecordError as error:
            raise self._locate(number, block, error) from None
        schema = parsed.batch.schema
        types = dict(zip(schema.names, schema.types, strict=True))
        for name, arrow_type in types.items():
            evidence = self._evidence.setdefault(name, ColumnEvidence())
            evidence.add(arrow_type)
            evidence.has_padded |= name in parsed.padded
            evidence.has_inexact |= name in parsed.inexact
        note_progress()
        return StoredBlock(block.offset, len(block.data), parsed.batch.num_rows, key, types)

    def _known_types(self) -> dict[str, pa.DataType]:
        """Return the types of columns in which numbers or text were found: a block that fits is of these types too."""
        known = {}
        for name, evidence in self._evidence.items():
            if pa.string() in evidence.types:
                known[name] = pa.string() if evidence.has_many_texts else DICTIONARY
            elif evidence.types == {pa.float64()}:
                known[name] = pa.float64()
        return known

    def _locate(self, number: int, block: Block, error: RecordError) -> DataError:
        """Return the error with the file and the line, counted from 1."""
        with self._open_text(number) as stream:
            line = 1 + count_lines(stream, block.offset) + block.data.count(b"\n", 0, error.position)
        return DataError(error.what, where=f"{self.files[number].where}, line {line:,}", fix=error.fix)

    def _unify_types(self) -> None:
        """Set the types of all columns, and parse the blocks again in which a column of text looked like another."""
        types = {name: self._merge_types(name, evidence) for name, evidence in self._evidence.items()}
        for number, schema in enumerate(self.schemas):
            self._parse_texts(number, {name for name in schema.names if types[name] == pa.string()})
            names = self._check_names(number, schema.names)
            self.schemas[number] = pa.schema([(name, types[name]) for name in names])

    def _parse_texts(self, number: int, texts: set[str]) -> None:
        """Parse columns of text again, in the blocks where they have another type."""
        todo = {}
        for index, block in enumerate(self._blocks[number]):
            names = [name for name, kind in block.types.items() if name in texts and not _is_text_or_null(kind)]
            if names:
                todo[index] = names
        if not todo:
            return
        parser = self._parsers[number]

        def parse(block: StoredBlock, data: bytes, names: list[str]) -> None:
            block.text_key = self._store.append(parser.parse_as_text(data, names))
            block.text_columns = tuple(names)

        with (
            file_errors(self.files[number]),
            self._open_text(number) as stream,
            ThreadPoolExecutor(available_cpus()) as pool,
        ):
            reader, pending = _ExactReader(stream), deque[Future[None]]()
            for index in range(max(todo) + 1):
                block = self._blocks[number][index]
                if index in todo:
                    data = reader.read_range(block.offset, block.size)
                    pending.append(pool.submit(parse, block, data, todo[index]))
                    if len(pending) > available_cpus():
                        pending.popleft().result()
                note_progress()
            for future in pending:
                future.result()

    def _iter_stored_batches(self, number: int, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        schema = self.schemas[number]
        types = [schema.field(name).type for name in columns]
        for block in self._blocks[number]:
            arrays = self._read_block(block, columns)
            cast = [_cast(array, arrow_type) for array, arrow_type in zip(arrays, types, strict=True)]
            batch = pa.RecordBatch.from_arrays(cast, names=columns)
            for first in range(0, batch.num_rows, batch_rows):
                yield batch.slice(first, batch_rows)

    def _read_block(self, block: StoredBlock, columns: Sequence[str]) -> list[pa.Array]:
        stored = [name for name in columns if name in block.types and name not in block.text_columns]
        batch = self._store.read(block.key, stored)
        arrays = dict(zip(stored, batch.columns, strict=True))
        again = [name for name in columns if name in block.text_columns]
        if again:
            arrays |= zip(again, self._store.read(block.text_key, again).columns, strict=True)
        return [arrays[name] if name in arrays else pa.nulls(block.num_rows) for name in columns]

    def _iter_text_blocks(self, name: str) -> Iterator[pa.Array]:
        """Yield a column in those blocks in which it was found to be text."""
        for block in (block for stored in self._blocks for block in stored):
            if name in block.types and block.types[name] in (pa.string(), DICTIONARY):
                yield self._store.read(block.key, [name]).column(0)

    def _estimate_stored_bytes(self, stored_bytes: int) -> int:
        fraction = (self._finished_bytes + self._current_bytes) / max(self._total_bytes, 1)
        return int(SPARE_SPACE * stored_bytes / max(min(fraction, 1.0), 1e-3))


class _ExactReader:
    """Reads ranges of a text in ascending order."""

    def __init__(self, stream: TextStream) -> None:
        self._stream, self._offset, self._rest = stream, 0, b""

    def read_range(self, offset: int, size: int) -> bytes:
        self._take(offset - self._offset)
        return self._take(size)

    def _take(self, size: int) -> bytes:
        parts = [self._rest]
        count = len(self._rest)
        while count < size and (block := self._stream.read(min(size - count, blocks.BLOCK_BYTES))):
            parts.append(block)
            count += len(block)
        data = b"".join(parts)
        self._rest = data[size:]
        self._offset += size
        return data[:size]


def _is_text_or_null(arrow_type: pa.DataType) -> bool:
    return bool(pt.is_null(arrow_type) or arrow_type in (pa.string(), DICTIONARY))


def _cast(array: pa.Array, arrow_type: pa.DataType) -> pa.Array:
    """Convert to a type that holds the values of more blocks. Dictionaries remain."""
    if array.type == arrow_type or (array.type == DICTIONARY and arrow_type == pa.string()):
        return array
    return array.cast(arrow_type, safe=False)
