"""JSON lines: one object per line, whose keys are the columns."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from functools import reduce

import pyarrow as pa
import pyarrow.json as pa_json
import pyarrow.types as pt

from pipeline.data.sources.tables.sniff import check_head
from pipeline.data.sources.tables.text.blocks import TextStream
from pipeline.data.sources.tables.text.files import TextFiles
from pipeline.data.sources.tables.text.parser import ParsedBlock, RecordError
from pipeline.data.sources.tables.text.types import ColumnEvidence, merge_types
from pipeline.errors import DataError

ROW = re.compile(r"in row (\d+)")
REWRITE_HINT = "write one JSON object per line, with one type per key"


class JsonlParser:
    """Parses blocks of JSON lines, from any thread. See `TextParser`."""

    header_bytes = 0

    def __init__(self) -> None:
        self.stored_names: list[str] = []

    def find_last_end(self, data: bytes) -> int:
        """Return the end of the last complete line, 0 if there is none."""
        return data.rfind(b"\n") + 1

    def parse(self, data: bytes, known: Mapping[str, pa.DataType]) -> ParsedBlock:
        """Return the rows of a block."""
        return ParsedBlock(self._read(data, pa.schema([]), "infer"))

    def parse_as_text(self, data: bytes, columns: Sequence[str]) -> pa.RecordBatch:
        """Return columns of text, some values of which look like times."""
        return self._read(data, pa.schema([(name, pa.string()) for name in columns]), "ignore").select(list(columns))

    def _read(self, data: bytes, schema: pa.Schema, other_fields: str) -> pa.RecordBatch:
        try:
            table = pa_json.read_json(
                pa.BufferReader(data),
                read_options=pa_json.ReadOptions(block_size=len(data) + 1, use_threads=False),
                parse_options=pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=other_fields),
            )
        except pa.ArrowInvalid as error:
            raise _record_error(error, data) from None
        try:
            table.validate(full=True)
        except pa.ArrowInvalid:
            raise _encoding_error(data) from None
        batches = table.combine_chunks().to_batches()
        return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


class JsonlFiles(TextFiles):
    """The files of JSON lines of a URL, see `TextFiles`."""

    def _open_text(self, number: int) -> TextStream:
        check_head(self.files[number], self._read_head(self.files[number]), "jsonl")
        return self._open_utf8(number, "utf-8")

    def _make_parser(self, number: int, head: bytes) -> JsonlParser:
        if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            raise DataError(
                "is a JSON array", where=self.files[number].where, fix="write one object per line, without the array"
            )
        return JsonlParser()

    def _merge_types(self, name: str, evidence: ColumnEvidence) -> pa.DataType:
        """Return the type of a column in all files. Unlike those of CSV, its values have types, which must agree."""
        texts = {kind for kind in evidence.types if pt.is_string(kind) or pt.is_timestamp(kind) or pt.is_date(kind)}
        if texts == evidence.types:
            return merge_types(texts)
        try:
            return reduce(_promote, evidence.types)
        except pa.ArrowException:
            found = " and ".join(sorted(map(str, evidence.types)))
            raise DataError(
                f"{name!r} has values of different types: {found}", where=self.url, fix=REWRITE_HINT
            ) from None


def _promote(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """Return the type of numbers, lists or objects that holds both.

    Raises
    ------
    pa.ArrowException: there is none.
    """
    schemas = [pa.schema([("", kind)]) for kind in (first, second)]
    return pa.unify_schemas(schemas, promote_options="permissive").field("").type


def _encoding_error(data: bytes) -> RecordError:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return RecordError(f"is not UTF-8: {error.reason}", error.start, "write it in UTF-8, as JSON must be")
    return RecordError("is not valid", 0, REWRITE_HINT)


def _record_error(error: Exception, data: bytes) -> RecordError:
    message = str(error).removeprefix("JSON parse error: ")
    row = ROW.search(message)
    lines = [
        line for line in re.finditer(rb"[^\n]+", data) if line.group().strip()
    ]  # rows are lines that are not empty
    position = lines[int(row.group(1))].start() if row and int(row.group(1)) < len(lines) else 0
    return RecordError(f"is not valid: {ROW.sub('', message).strip()}", position, REWRITE_HINT)
