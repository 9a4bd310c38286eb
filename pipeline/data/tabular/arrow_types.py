"""The Arrow types that columns of tables and image tables may have, and their conversion to NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError

FloatType = type[np.float32] | type[np.float64]

ValueKind = Literal["whole", "real", "truth", "text", "vector", "bytes", "time", "clock", "duration", "null", "other"]

KIND_NAMES: dict[ValueKind, str] = {
    "whole": "whole numbers",
    "real": "numbers",
    "truth": "booleans",
    "text": "text",
    "vector": "lists of numbers",
    "bytes": "bytes",
    "time": "times",
    "clock": "times of day",
    "duration": "durations",
    "null": "only nulls",
    "other": "neither numbers nor text",
}
NUMERIC_KINDS: tuple[ValueKind, ...] = ("whole", "real", "truth")


@dataclass(frozen=True)
class ArrowKind:
    """The kind of values in an Arrow column.

    width: numbers per row; 0 for lists of variable length. type: Arrow's name of the type, for messages.
    """

    kind: ValueKind
    width: int = 1
    type: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{KIND_NAMES[self.kind]} ({self.type})"


def arrow_kind(arrow_type: pa.DataType) -> ArrowKind:
    """Return the kind of a column of an Arrow type. Widths of integers, texts and dictionaries make no difference."""
    types, name = pa.types, str(arrow_type)
    while isinstance(arrow_type, (pa.BaseExtensionType, pa.DictionaryType)):
        arrow_type = arrow_type.storage_type if isinstance(arrow_type, pa.BaseExtensionType) else arrow_type.value_type
    if types.is_integer(arrow_type):
        return ArrowKind("whole", type=name)
    if types.is_floating(arrow_type) or types.is_decimal(arrow_type):
        return ArrowKind("real", type=name)
    if types.is_boolean(arrow_type):
        return ArrowKind("truth", type=name)
    if types.is_string(arrow_type) or types.is_large_string(arrow_type) or types.is_string_view(arrow_type):
        return ArrowKind("text", type=name)
    if types.is_fixed_size_binary(arrow_type):
        return ArrowKind("bytes", arrow_type.byte_width, name)
    if types.is_fixed_size_list(arrow_type) and arrow_kind(arrow_type.value_type).kind in NUMERIC_KINDS:
        return ArrowKind("bytes" if arrow_type.value_type == pa.uint8() else "vector", arrow_type.list_size, name)
    if (types.is_list(arrow_type) or types.is_large_list(arrow_type)) and arrow_kind(
        arrow_type.value_type
    ).kind in NUMERIC_KINDS:
        return ArrowKind("vector", 0, name)
    if types.is_timestamp(arrow_type) or types.is_date(arrow_type):
        return ArrowKind("time", type=name)
    if types.is_time(arrow_type):
        return ArrowKind("clock", type=name)
    if types.is_duration(arrow_type):
        return ArrowKind("duration", type=name)
    return ArrowKind("null" if types.is_null(arrow_type) else "other", type=name)


def common_kind(first: ArrowKind, second: ArrowKind) -> ArrowKind | None:
    """Return the kind that holds the rows of two files' columns; None if they are incompatible."""
    if "null" in (first.kind, second.kind):
        return second if first.kind == "null" else first
    if {first.kind, second.kind} == {"whole", "real"}:
        return first if first.kind == "real" else second
    if first.kind == second.kind and (first.width == second.width or 0 in (first.width, second.width)):
        return first if first.width else second
    return None


def value_type(arrow_type: pa.DataType) -> pa.DataType:
    """Return the type of single values: for a list, an extension type or a dictionary, the type of its values."""
    while isinstance(arrow_type, (pa.BaseExtensionType, pa.DictionaryType)) or pa.types.is_nested(arrow_type):
        if isinstance(arrow_type, pa.BaseExtensionType):
            arrow_type = arrow_type.storage_type
        elif hasattr(arrow_type, "value_type"):
            arrow_type = arrow_type.value_type
        else:
            break
    return arrow_type


def is_exact(arrow_type: pa.DataType, dtype: np.dtype[Any] | FloatType) -> bool:
    """Return whether `dtype`, float32 or float64, represents every single value of an Arrow type exactly."""
    arrow_type, types, size = value_type(arrow_type), pa.types, np.dtype(dtype).itemsize
    if types.is_integer(arrow_type):
        return bool(arrow_type.bit_width <= 4 * size)
    if types.is_floating(arrow_type):
        return bool(arrow_type.bit_width <= 8 * size)
    return not types.is_decimal(arrow_type)


def to_float_array(array: pa.Array, dtype: np.dtype[Any] | FloatType) -> np.ndarray:
    """Return a column of numbers or booleans as floats (n,), NaN where null."""
    array = unwrap_storage(array)
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    elif pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    floats: np.ndarray = array.cast(pa.from_numpy_dtype(dtype), safe=False).to_numpy(zero_copy_only=False)
    return floats


def dictionary_encode(array: pa.Array, name: str, findings: InvalidValues) -> tuple[pa.Array, np.ndarray]:
    """Return the distinct texts of a column, and each row's position in them, int64 (n,): -1 where null.

    Integers become texts such as "3", whatever the width of their type; so do floats with integer values, since
    integers with nulls are often converted to floats. Booleans are "false" and "true".
    """
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    codes = encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    values = encoded.dictionary
    if arrow_kind(values.type).kind == "real":
        floats = to_float_array(values, np.float64)
        not_integer = np.append((floats != np.floor(floats)) | (np.abs(floats) >= 2.0**63), False)
        findings.add(
            name,
            "numbers that are not whole",
            "round them, or do not list the column under data.categorical",
            (not_integer & ~np.isnan(np.append(floats, np.nan)))[codes],
        )
        integers = np.where(not_integer[:-1], 0, floats).astype(np.int64)
        values = pa.array(integers, mask=np.isnan(floats))
    texts = values.cast(pa.string())
    if texts.null_count:
        valid_codes = np.where(texts.is_null().to_numpy(zero_copy_only=False), -1, np.arange(len(texts)))
        codes = np.append(valid_codes, -1)[codes]
    return texts, codes


def bytes_to_array(array: pa.Array, width: int) -> np.ndarray:
    """Return fixed-size bytes as uint8 (n, width), a view where possible; the content of null rows is undefined."""
    array = unwrap_storage(array)
    if pa.types.is_fixed_size_list(array.type):
        array = array.values.slice(array.offset * width, len(array) * width)
        return np.frombuffer(array.buffers()[1], np.uint8, len(array), array.offset).reshape(-1, width)
    buffer = array.buffers()[1]
    return np.frombuffer(buffer, np.uint8, len(array) * width, array.offset * width).reshape(-1, width)


def has_inner_null(array: pa.Array, width: int) -> np.ndarray:
    """Return which rows of fixed-size bytes or lists are not null, but contain a null: bool (n,)."""
    array = unwrap_storage(array)
    if not pa.types.is_fixed_size_list(array.type):
        return np.zeros(len(array), bool)
    values = array.values.slice(array.offset * width, len(array) * width)
    nulls = values.is_null().to_numpy(zero_copy_only=False).reshape(-1, width).any(1)
    inside: np.ndarray = nulls & array.is_valid().to_numpy(zero_copy_only=False)
    return inside


def unwrap_storage(array: pa.Array) -> pa.Array:
    """Return the same values without extension types or dictionaries around them."""
    while isinstance(array, (pa.ExtensionArray, pa.DictionaryArray)):
        array = array.storage if isinstance(array, pa.ExtensionArray) else array.dictionary_decode()
    return array


@dataclass
class InvalidValues:
    """Counts of values that cannot be used, collected over batches of rows so that an error can report the total.

    where: the file or table.
    num_rows: rows of the batches before the current one.
    counts: first row and count, by (column, what, fix).
    """

    where: str
    num_rows: int = 0
    counts: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)

    def add(self, column: str, what: str, fix: str, wrong: np.ndarray) -> None:
        """Count the rows marked in `wrong`, bool (n,): the rows of the current batch, after the first `num_rows`."""
        count = int(np.count_nonzero(wrong))
        if count:
            first = self.num_rows + int(np.argmax(wrong))
            self.counts.setdefault((column, what, fix), [first, 0])[1] += count

    def raise_if_any(self) -> None:
        """Raise an error for the first problem found, if any.

        Raises
        ------
        DataError: with the column, the first row (from 0) and the count.
        """
        for (column, what, fix), (first, count) in self.counts.items():
            raise DataError(
                f"the column {column!r} has {what} in {count:,} of {self.num_rows:,} rows, first in row {first:,} "
                "(from 0)",
                where=self.where,
                fix=fix,
            )
