"""Encoding of tables: Arrow columns to the rows of a matrix that a schema lays out, in training and in prediction."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.rounding import NumberKind, max_rounding_error
from pipeline.data.tabular.arrow_types import (
    NUMERIC_KINDS,
    ArrowKind,
    FloatType,
    InvalidValues,
    arrow_kind,
    bytes_to_array,
    dictionary_encode,
    is_exact,
    to_float_array,
    unwrap_storage,
    value_type,
)
from pipeline.data.tabular.hashing import to_bucket_names
from pipeline.data.tabular.schema import Column, Schema
from pipeline.data.tabular.times import CLOCK_WIDTH, durations_to_seconds, times_to_numbers
from pipeline.errors import DataError

NUMERIC_PATTERN = re.compile(r"-?[0-9]+|true|false")
"""Categories that a column of numbers or booleans can have, see `dictionary_encode`."""

CANONICAL_PATTERN = re.compile(r"0|-?[1-9][0-9]*|true|false")
"""The same without those, such as 007, that are never written so."""


class TableEncoder:
    """Writes batches of a table to the rows of a matrix."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._categories = {column.name: pa.array(column.categories, pa.string()) for column in schema.columns}
        self._numeric = {
            column.name for column in schema.columns if any(map(NUMERIC_PATTERN.fullmatch, column.categories))
        }

    def write(
        self, batch: pa.RecordBatch, out: np.ndarray, findings: InvalidValues, rounding: np.ndarray | None = None
    ) -> None:
        """Fill `out`, float32 or float64 (n, width), from a batch of n rows; extra columns are ignored.

        Parameters
        ----------
        findings: where invalid values are counted.
        rounding: float64 (width,), raised to the largest error that conversion to the type of `out` causes in each
            column of the matrix.

        Raises
        ------
        DataError: a column is missing or of another kind.
        """
        for column, offset in zip(self._schema.columns, self._schema.offsets, strict=True):
            array = _get_column(batch, column, findings.where)
            if column.kind == "category":
                out[:, offset] = self._category_codes(array, column, findings)
                continue
            end = offset + column.width
            is_measured = rounding is not None and not is_exact(array.type, out.dtype)
            dtype = np.dtype(np.float64) if is_measured else out.dtype
            if column.kind == "time":
                values, is_measured = _times_to_array(array, column, findings), rounding is not None
            elif arrow_kind(array.type).kind == "duration":
                values, is_measured = durations_to_seconds(unwrap_storage(array))[:, None], rounding is not None
            elif column.width == 1 and arrow_kind(array.type).kind in (*NUMERIC_KINDS, "null"):
                values = to_float_array(array, dtype)[:, None]
            else:
                values = _lists_to_array(array, column, dtype, findings)
            with np.errstate(over="ignore"):  # what exceeds float32 becomes infinite, and is counted below
                out[:, offset:end] = values
            if rounding is not None and is_measured:
                errors = max_rounding_error(values, out[:, offset:end], kind=_number_kind(array.type))
                if column.kind == "time":
                    errors[1:] = 0.0  # positions in cycles need no more digits than float32 has
                np.maximum(rounding[offset:end], errors, out=rounding[offset:end])
            findings.add(
                column.name,
                "infinite values",
                "replace them, for example with nulls; numbers beyond 3e38 need train.precision: fp64",
                np.isinf(out[:, offset:end]).any(1),
            )

    def _category_codes(self, array: pa.Array, column: Column, findings: InvalidValues) -> np.ndarray:
        kind = arrow_kind(array.type)
        texts, text_codes = dictionary_encode(array, column.name, findings)
        is_numeric = kind.kind in NUMERIC_KINDS
        if is_numeric and column.categories and column.name not in self._numeric and (text_codes >= 0).any():
            raise DataError(
                f"the column {column.name!r} holds {kind}, but held text in training, such as "
                f"{column.categories[0]!r}: no number is one of its categories",
                where=findings.where,
                fix="use the texts that these numbers stand for",
            )
        if column.buckets:
            texts = to_bucket_names(texts, text_codes, column.buckets)
        known = pc.index_in(texts, value_set=self._categories[column.name]).fill_null(len(column.categories))
        codes: np.ndarray = np.append(known.to_numpy(zero_copy_only=False).astype(np.float64), np.nan)[text_codes]
        return codes


def encode_to_matrix(table: pa.Table | pa.RecordBatch, schema: Schema, *, dtype: FloatType, where: str) -> np.ndarray:
    """Return a table as a matrix (n, width): NaN where a value is missing, `len(categories)` for an unknown category.

    A numeric column accepts integers, booleans and decimals. A categorical column accepts numbers, converted to text,
    unless none of its categories looks like a number. The order of the columns does not matter, and further columns are
    ignored.

    Parameters
    ----------
    where: the table's name in messages.

    Raises
    ------
    DataError: a column is missing or of another kind, a value is infinite, or a list has another length.
    """
    encoder, findings = TableEncoder(schema), InvalidValues(where)
    out = np.empty((table.num_rows, schema.width), dtype)
    for batch in table.to_batches() if isinstance(table, pa.Table) else [table]:
        encoder.write(batch, out[findings.num_rows : findings.num_rows + len(batch)], findings)
        findings.num_rows += len(batch)
    findings.raise_if_any()
    return out


def list_text_columns(schema: Schema) -> list[str]:
    """Return the categorical columns whose categories are not all whole numbers or all booleans. In a file without
    types, such a column is text also if all of its values look like numbers."""
    return [
        column.name
        for column in schema.columns
        if column.kind == "category" and not all(map(CANONICAL_PATTERN.fullmatch, column.categories))
    ]


def to_arrow_table(data: Any) -> pa.Table:
    """Convert to an Arrow table: a table of pandas, polars, Arrow or any library with Arrow's C stream interface, a
    dict of columns, or a list of dicts, one per row.

    Columns of a dict may be NumPy arrays (n,) or (n, width), or sequences.

    Raises
    ------
    DataError: anything else, or columns of unequal length or mixed types.
    """
    try:
        if isinstance(data, Mapping):
            return pa.table({str(name): _to_arrow_array(values) for name, values in data.items()})
        if isinstance(data, list | tuple) and all(isinstance(row, Mapping) for row in data):
            return pa.Table.from_pylist([dict(row) for row in data])
        if isinstance(data, pa.RecordBatch):
            return pa.Table.from_batches([data])
        if isinstance(data, pa.Table) or hasattr(data, "__arrow_c_stream__"):
            return pa.table(data)
    except (pa.ArrowException, ValueError, TypeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot be read as a table: {first_line}",
            where="table",
            fix="use one type per column, and columns of equal length",
        ) from error
    raise DataError(
        f"a {type(data).__name__} is not a table",
        where="table",
        fix="use a pandas or polars DataFrame, an Arrow table, a dict of columns or a list of dicts, one per row",
    )


def _to_arrow_array(values: Any) -> pa.Array:
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, from_pandas=True)


def suggest_columns(name: str, names: Iterable[str]) -> str:
    """Return a hint for a missing column: similar names, or the names that exist."""
    known = list(names)
    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"columns here: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"


def check_columns(schema: Schema, column_kinds: Mapping[str, ArrowKind], num_rows: int, where: str) -> None:
    """Check by the kinds of its columns that a table can be encoded.

    Raises
    ------
    DataError: a column is missing or of another kind.
    """
    for column in schema.columns:
        if column.name not in column_kinds:
            raise _missing_column_error(column.name, num_rows, column_kinds, where)
        _check_kind(column, column_kinds[column.name], where)


def _get_column(batch: pa.RecordBatch, column: Column, where: str) -> pa.Array:
    index = batch.schema.get_field_index(column.name)
    if index < 0:
        raise _missing_column_error(column.name, batch.num_rows, batch.schema.names, where)
    array = batch.column(index)
    _check_kind(column, arrow_kind(array.type), where)
    return array


def _missing_column_error(name: str, num_rows: int, names: Iterable[str], where: str) -> DataError:
    return DataError(f"there is no column {name!r} ({num_rows:,} rows)", where=where, fix=suggest_columns(name, names))


def _check_kind(column: Column, arrow_kind: ArrowKind, where: str) -> None:
    if column.kind == "category":
        is_valid = arrow_kind.kind in ("text", "null", *NUMERIC_KINDS)
    elif column.kind == "time":
        is_valid = arrow_kind.kind in (("clock", "null") if column.width == CLOCK_WIDTH else ("time", "text", "null"))
    elif arrow_kind.kind in ("vector", "bytes"):
        is_valid = arrow_kind.width in (0, column.width)
    else:
        is_valid = arrow_kind.kind == "null" or (arrow_kind.kind in (*NUMERIC_KINDS, "duration") and column.width == 1)
    if not is_valid:
        expected = f"{column.width} numbers" if column.width > 1 else "numbers"
        if column.kind == "time":
            expected = "times of day" if column.width == CLOCK_WIDTH else "dates or times"
        elif column.kind == "category":
            expected = "text"
        raise DataError(
            f"the column {column.name!r} holds {arrow_kind}; expected: {expected}", where=where, fix="cast it"
        )


def _times_to_array(array: pa.Array, column: Column, findings: InvalidValues) -> np.ndarray:
    """Return the numbers of dates and times, float64 (n, width), NaN where null."""
    array = unwrap_storage(array)
    if pa.types.is_null(array.type):
        return np.full((len(array), column.width), np.nan)
    try:
        return times_to_numbers(array, column.width)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"the column {column.name!r} has text that is not a date or time ({str(error).splitlines()[0]})",
            where=findings.where,
            fix="write all of them as 2024-05-31 or 2024-05-31T12:00:00, or all with a zone: 2024-05-31T12:00:00Z",
        ) from error


def _number_kind(arrow_type: pa.DataType) -> NumberKind:
    if is_exact(arrow_type, np.float64):
        return "floats"
    return "integers" if pa.types.is_integer(value_type(arrow_type)) else "decimals"


def _lists_to_array(array: pa.Array, column: Column, dtype: np.dtype[Any], findings: InvalidValues) -> np.ndarray:
    """Return fixed-size or equally long lists, or bytes, as floats (n, width), NaN where null."""
    array = unwrap_storage(array)
    out = np.full((len(array), column.width), np.nan, dtype)
    if pa.types.is_null(array.type):
        return out
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_binary(array.type):
        out[valid] = bytes_to_array(array, column.width)[valid]
        return out
    lengths = pc.list_value_length(array).fill_null(column.width).to_numpy(zero_copy_only=False)
    findings.add(
        column.name, f"lists whose length is not {column.width}", "make all lists equally long", lengths != column.width
    )
    if (lengths == column.width).all():
        out[valid] = to_float_array(array.flatten(), dtype).reshape(-1, column.width)
    return out
