"""CSV, TSV and the like: the header, and the parsing of blocks."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.types as pt

from pipeline.config import CsvDataConfig
from pipeline.data.sources.tables.sniff import check_head
from pipeline.data.sources.tables.text.blocks import CsvSplitter, TextStream
from pipeline.data.sources.tables.text.dialect import (
    EXCEL_LINE,
    NUMBER,
    SAMPLE_BYTES,
    find_decimal,
    find_delimiter,
    has_spaces_after,
    looks_like_values,
)
from pipeline.data.sources.tables.text.files import TextFiles
from pipeline.data.sources.tables.text.parser import ParsedBlock, RecordError
from pipeline.data.sources.tables.text.types import ColumnEvidence
from pipeline.errors import DataError

SCAN_BYTES = 1 << 18
"""Bytes that are searched at once: they fit into the processor's cache."""

ENCODING_FIX = "set data.encoding to its encoding, such as latin-1 or cp1252"

NUL_BYTE = "has a NUL byte, so it is not UTF-8 text"
NUL_FIX = "set data.encoding: utf-16 if it is that; else exclude it with a glob"

UNNAMED = "\0"
"""Prefix of the names of unnamed columns; no other name has such a character."""

MAX_DICTIONARY_SIZE = 4096
"""Distinct texts in a block up to which a column is dictionary-encoded while it is parsed."""

SAMPLED_TEXT_BLOCKS, SAMPLED_ROWS = 4, 1 << 16
"""Blocks, and rows of each, in which a column of text is searched for numbers."""

MIN_NUMBERS = 5
"""Distinct numbers from which a column of text looks like one of numbers."""

PADDED, INEXACT = r"^\s*0[0-9]", r"^\s*(0[xX]|[+-]?[0-9]{19,}\s*$)"
RAGGED = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")

HYPHEN, ZERO, NINE = ord("-"), ord("0"), ord("9")
TRUE_VALUES, FALSE_VALUES = ["true", "True", "TRUE"], ["false", "False", "FALSE"]
"""Arrow's default also has 1 and 0, which would make the type of a column depend on the other values of its block."""


class CsvParser:
    """Parses the blocks of one CSV file, from any thread.

    header_bytes, stored_names: see `TextParser`. An unnamed first column is left out: pandas and R write row numbers
        or names there. Any other unnamed column is called `UNNAMED` and its number.

    Raises
    ------
    DataError: the header is missing or does not name the columns.
    """

    def __init__(self, data: CsvDataConfig, head: bytes, where: str) -> None:
        self._where = where
        text = head[:SAMPLE_BYTES].decode(errors="replace")
        excel = EXCEL_LINE.match(text)
        found = excel.group(1) if excel is not None else find_delimiter(text)
        self._delimiter = found if data.delimiter == "auto" else data.delimiter
        self._decimal = find_decimal(text, self._delimiter) if data.decimal == "auto" else data.decimal
        self._skips_spaces = has_spaces_after(text, self._delimiter)
        self._null_values = [*data.null_values, *(f" {value}" for value in data.null_values if self._skips_spaces)]
        self._splitter = CsvSplitter(self._delimiter)
        skipped = len(excel.group(0)) if excel is not None else 0
        blank = len(head) - len(head[skipped:].lstrip(b"\r\n"))
        end = self._splitter.find_first_end(head[blank:])
        self.header_bytes = blank + end if end else len(head)
        self._names = self._read_names(head[blank : self.header_bytes])
        self.has_index = self._names[:1] == [""]
        self.stored_names = self._names[1:] if self.has_index else self._names

    def find_last_end(self, data: bytes) -> int:
        """Return the end of the last complete record, 0 if there is none."""
        return self._splitter.find_last_end(data)

    def parse(self, data: bytes, known: Mapping[str, pa.DataType]) -> ParsedBlock:
        """Return the rows of a block, each column with the type that all its values here have.

        Parameters
        ----------
        known: types of columns that have been found before: they spare the inference, but do not change the result.

        Raises
        ------
        RecordError: a record has another number of columns than the header.
        DataError: it is not UTF-8, or not text.
        """
        if b"\0" in data:
            raise RecordError(NUL_BYTE, data.index(b"\0"), NUL_FIX)
        try:
            batch = self._read(data, known, self.stored_names)
        except pa.ArrowInvalid as error:
            if RAGGED.search(str(error)) or not known:
                raise self._record_error(error, data) from None
            # a value is of another type than before
            texts = {name: kind for name, kind in known.items() if kind != pa.float64()}
            try:
                batch = self._read(data, texts, self.stored_names)
            except pa.ArrowInvalid as second:
                raise self._record_error(second, data) from None
        if any(pt.is_binary(_value_type(kind)) for kind in batch.schema.types):
            raise self._record_error(None, data)
        padded, inexact = self._find_codes(data, batch, known)
        return ParsedBlock(batch, padded, inexact)

    def parse_as_text(self, data: bytes, columns: Sequence[str]) -> pa.RecordBatch:
        """Return these columns of a block as text."""
        try:
            return self._read(data, dict.fromkeys(columns, pa.string()), list(columns))
        except pa.ArrowInvalid as error:
            raise self._record_error(error, data) from None

    def _read(self, data: bytes, types: Mapping[str, pa.DataType], columns: list[str]) -> pa.RecordBatch:
        table = pa_csv.read_csv(
            pa.BufferReader(data),
            read_options=pa_csv.ReadOptions(column_names=self._names, block_size=len(data) + 1, use_threads=False),
            parse_options=pa_csv.ParseOptions(delimiter=self._delimiter),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict(types),
                include_columns=columns,
                null_values=self._null_values,
                strings_can_be_null=True,
                true_values=TRUE_VALUES,
                false_values=FALSE_VALUES,
                decimal_point=self._decimal,
                auto_dict_encode=True,
                auto_dict_max_cardinality=MAX_DICTIONARY_SIZE,
            ),
        )
        batches = table.combine_chunks().to_batches()
        batch = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
        if not self._skips_spaces:
            return batch
        return pa.RecordBatch.from_arrays([_trim(column) for column in batch.columns], names=batch.schema.names)

    def _find_codes(
        self, data: bytes, batch: pa.RecordBatch, known: Mapping[str, pa.DataType]
    ) -> tuple[frozenset[str], frozenset[str]]:
        """Return the columns with whole numbers that must stay text: those with leading zeros, and those that a number
        does not represent. The numbers that Arrow made of them do not show it, so the text is read again if need be."""
        whole = [name for name, kind in zip(batch.schema.names, batch.schema.types, strict=True) if kind == pa.int64()]
        suspects = whole if whole and self._may_have_codes(data) else []
        suspects += [
            name
            for name, kind in zip(batch.schema.names, batch.schema.types, strict=True)
            if kind == pa.float64() and _has_large(batch.column(name))
        ]
        if not suspects:
            return frozenset(), frozenset()
        texts = self.parse_as_text(data, suspects)
        padded = (name for name in whole if name in suspects and _any_match(texts.column(name), PADDED))
        inexact = (name for name in suspects if _any_match(texts.column(name), INEXACT))
        return frozenset(padded), frozenset(inexact)

    def _may_have_codes(self, data: bytes) -> bool:
        """Return whether a field begins with a zero and another digit, or x; false alarms are possible."""
        characters = np.frombuffer(data, np.uint8)
        for first in range(0, len(characters), SCAN_BYTES):
            part = characters[first : first + SCAN_BYTES + 1]
            before, after = part[:-1], part[1:]
            is_start = before < HYPHEN  # comma, tab, line break, quote, space
            if ord(self._delimiter) >= HYPHEN:
                is_start |= before == ord(self._delimiter)
            is_start &= after == ZERO
            positions = np.flatnonzero(is_start) + (first + 1)
            following = characters[np.minimum(positions + 1, len(characters) - 1)]
            is_code = ((following >= ZERO) & (following <= NINE)) | (following == ord("x")) | (following == ord("X"))
            positions = positions[is_code]
            if len(positions) and not _are_hours(characters, positions).all():
                return True
        return len(data) > 1 and data[:1] == b"0" and data[1:2] in b"0123456789xX"

    def _record_error(self, error: Exception | None, data: bytes) -> RecordError:
        """Return the error for a block that cannot be parsed."""
        ragged = RAGGED.search(str(error))
        open_quote = self._splitter.find_open_quote(data)
        if ragged and open_quote >= 0:
            return RecordError("has a quote that is never closed", open_quote, "close it, or double quotes in text")
        if ragged:
            row, expected, actual = (int(text) for text in ragged.groups())
            return RecordError(
                f"has {actual:,} columns, but the header names {expected:,}",
                self._find_record(data, row),
                f"correct the line; if the delimiter is not {self._delimiter!r}, set data.delimiter",
            )
        try:
            data.decode()
        except UnicodeDecodeError as failure:
            return RecordError(f"is not UTF-8: {failure.reason}", failure.start, ENCODING_FIX)
        return RecordError(f"cannot be read as CSV: {error}", 0, "write it again, or exclude it with a glob")

    def _find_record(self, data: bytes, number: int) -> int:
        """Return the position of a record in a block, counted from 1 without empty lines."""
        position = 0
        while position < len(data):
            if data[position : position + 1] in (b"\n", b"\r"):
                position += 1
                continue
            number -= 1
            if number == 0:
                return position
            end = self._splitter.find_first_end(data[position : position + (1 << 20)])
            position = position + end if end else len(data)
        return 0

    def _read_names(self, header: bytes) -> list[str]:
        """Return the names of the columns, and check that they are names."""
        where = f"{self._where}, line 1"
        try:
            text = header.decode()
            if "\0" in text:
                raise DataError(NUL_BYTE, where=where, fix=NUL_FIX)
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter) if row]
        except UnicodeDecodeError as error:
            raise DataError(f"the header is not UTF-8: {error.reason}", where=where, fix=ENCODING_FIX) from None
        except csv.Error as error:
            raise DataError(f"the header cannot be read: {error}", where=where, fix="write it again") from None
        if not rows:
            raise DataError("has only empty lines", where=self._where, fix="write the names of the columns first")
        names = [name.strip() for name in rows[0]]
        given = [name for name in names if name]
        if looks_like_values(given):
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise DataError(
                f"the first line has values instead of the names of the columns: {shown}",
                where=where,
                fix="write the names of the columns as the first line",
            )
        if duplicate := next((name for name, count in Counter(given).items() if count > 1), None):
            raise DataError(f"two columns are called {duplicate!r}", where=where, fix="rename one of them")
        return [name if name or not index else f"{UNNAMED}{index + 1}" for index, name in enumerate(names)]


def _are_hours(characters: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return which positions in a text are of an hour after a date: `2024-05-31 08:30`."""
    last = characters[positions - 2]
    is_hour: np.ndarray = (positions > 1) & (characters[positions - 1] == ord(" ")) & (last >= ZERO) & (last <= NINE)
    return is_hour


def _distinct(array: pa.Array) -> list[str | None]:
    """Return the distinct texts of the first rows of a column."""
    rows = array.slice(0, SAMPLED_ROWS)
    return list((rows.dictionary_decode() if pt.is_dictionary(rows.type) else rows).unique().to_pylist())


def _trim(column: pa.Array) -> pa.Array:
    """Return a column of text without spaces at the begin; other columns unchanged."""
    if pt.is_dictionary(column.type):
        return pa.DictionaryArray.from_arrays(column.indices, pc.utf8_ltrim(column.dictionary, " "))
    return pc.utf8_ltrim(column, " ") if pt.is_string(column.type) else column


def _value_type(arrow_type: pa.DataType) -> pa.DataType:
    return arrow_type.value_type if pt.is_dictionary(arrow_type) else arrow_type


def _has_large(array: pa.Array) -> bool:
    """Return whether a column of float64 has numbers beyond int64; false alarms are possible."""
    if not len(array):
        return False
    values = np.frombuffer(array.buffers()[1], np.float64)[array.offset :][: len(array)]  # any value where null
    largest = max(values.max(), -values.min())
    return bool(2.0**63 <= largest < np.inf or np.isnan(largest))


def _any_match(array: pa.Array, pattern: str) -> bool:
    return bool(pc.any(pc.match_substring_regex(array, pattern)).as_py())


class CsvFiles(TextFiles):
    """The CSV files of a URL, see `TextFiles`."""

    def __init__(self, data: CsvDataConfig, *, read_layouts: bool = True) -> None:
        super().__init__(data.url, data.cache, read_layouts=read_layouts, text_columns=data.text_columns)
        self._data = data
        self._notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Also what is probably a mistake in the files."""
        return (*super().warnings, *self._notes)

    def _unify_types(self) -> None:
        super()._unify_types()
        parsers = [cast(CsvParser, parser) for parser in self._parsers]
        if any(parser.has_index for parser in parsers):
            self._notes += ("the first column has no name: it is left out, like the index that pandas and R write",)
        given = {UNNAMED, *self._data.text_columns}
        for name, evidence in self._evidence.items():
            if pt.is_string(evidence.type) and name not in given and not (evidence.has_padded or evidence.has_inexact):
                self._note_mixed(name, evidence)

    def _note_mixed(self, name: str, evidence: ColumnEvidence) -> None:
        """Warn of a column that is text because of a few values, while the others are numbers."""
        batches = islice(self._iter_text_blocks(name), SAMPLED_TEXT_BLOCKS)
        values = {value for batch in batches for value in _distinct(batch) if value is not None}
        others = sorted(value for value in values if not NUMBER.fullmatch(value.strip()))
        count = len(values) - len(others)
        if others and (evidence.types & {pa.int64(), pa.float64()} or count >= max(MIN_NUMBERS, 4 * len(others))):
            self._notes += (
                f"the column {name!r} is text because of values such as {others[0][:40]!r}; most others are numbers. "
                "If they stand for missing values, add them to data.null_values",
            )

    def _open_text(self, number: int) -> TextStream:
        check_head(self.files[number], self._read_head(self.files[number]), "csv")
        return self._open_utf8(number, self._data.encoding)

    def _make_parser(self, number: int, head: bytes) -> CsvParser:
        return CsvParser(self._data, head, self.files[number].where)

    def _check_names(self, number: int, names: list[str]) -> list[str]:
        for name in names:
            if name.startswith(UNNAMED) and not pt.is_null(self._evidence[name].type):
                raise DataError(
                    f"column {name.removeprefix(UNNAMED)} has no name",
                    where=f"{self.files[number].where}, line 1",
                    fix="name it in the first line",
                )
        return [name for name in names if not name.startswith(UNNAMED)]  # of a delimiter at the end of each line
