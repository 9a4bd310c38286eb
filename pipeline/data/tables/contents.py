"""What Arrow columns hold, as far as training is concerned, and their values as NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.data.tables.findings import Findings

FloatType = type[np.float32] | type[np.float64]

Kind = Literal["whole", "real", "truth", "text", "vector", "bytes", "time", "null", "other"]

WORDS: dict[Kind, str] = {
    "whole": "whole numbers",
    "real": "numbers",
    "truth": "booleans",
    "text": "text",
    "vector": "lists of numbers",
    "bytes": "bytes",
    "time": "times",
    "null": "nulls alone",
    "other": "neither numbers nor text",
}
NUMBERS: tuple[Kind, ...] = ("whole", "real", "truth")


@dataclass(frozen=True)
class Content:
    """What a column holds.

    width: numbers in a row; 0 for lists whose length only the rows tell. type: as Arrow calls it, for messages.
    """

    kind: Kind
    width: int = 1
    type: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{WORDS[self.kind]} ({self.type})"


def content(kind: pa.DataType) -> Content:
    """What a column of an Arrow type holds. Widths of integers, texts and dictionaries make no difference."""
    types, name = pa.types, str(kind)
    while isinstance(kind, (pa.BaseExtensionType, pa.DictionaryType)):
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind.value_type
    if types.is_integer(kind):
        return Content("whole", type=name)
    if types.is_floating(kind) or types.is_decimal(kind):
        return Content("real", type=name)
    if types.is_boolean(kind):
        return Content("truth", type=name)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return Content("text", type=name)
    if types.is_fixed_size_binary(kind):
        return Content("bytes", kind.byte_width, name)
    if types.is_fixed_size_list(kind) and content(kind.value_type).kind in NUMBERS:
        return Content("bytes" if kind.value_type == pa.uint8() else "vector", kind.list_size, name)
    if (types.is_list(kind) or types.is_large_list(kind)) and content(kind.value_type).kind in NUMBERS:
        return Content("vector", 0, name)
    if types.is_timestamp(kind) or types.is_date(kind):
        return Content("time", type=name)
    return Content("null" if types.is_null(kind) else "other", type=name)


def both(one: Content, other: Content) -> Content | None:
    """What holds the rows of two files' columns; None if they do not go together."""
    if "null" in (one.kind, other.kind):
        return other if one.kind == "null" else one
    if {one.kind, other.kind} == {"whole", "real"}:
        return one if one.kind == "real" else other
    if one.kind == other.kind and (one.width == other.width or 0 in (one.width, other.width)):
        return one if one.width else other
    return None


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of single values: of a list, an extension type or a dictionary that of what it holds."""
    while isinstance(kind, (pa.BaseExtensionType, pa.DictionaryType)) or pa.types.is_nested(kind):
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif hasattr(kind, "value_type"):
            kind = kind.value_type
        else:
            break
    return kind


def is_exact(kind: pa.DataType, dtype: np.dtype[Any] | FloatType) -> bool:
    """Whether float32 or float64, whichever `dtype` is, holds every single value of an Arrow type."""
    kind, types, size = value_type(kind), pa.types, np.dtype(dtype).itemsize
    if types.is_integer(kind):
        return bool(kind.bit_width <= 4 * size)
    if types.is_floating(kind):
        return bool(kind.bit_width <= 8 * size)
    return not types.is_decimal(kind)


def numbers(array: pa.Array, dtype: np.dtype[Any] | FloatType) -> np.ndarray:
    """A column of numbers or booleans as floats (n,), NaN where null."""
    array = plain(array)
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    elif pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    floats: np.ndarray = array.cast(pa.from_numpy_dtype(dtype), safe=False).to_numpy(zero_copy_only=False)
    return floats


def as_texts(array: pa.Array, name: str, findings: Findings) -> tuple[pa.Array, np.ndarray]:
    """The distinct texts of a column, and each row's position in them, int64 (n,): -1 where null.

    Whole numbers are texts such as "3", whatever the width of their type; so are floats that are whole, for that is
    what whole numbers with nulls easily become. Booleans are "false" and "true".
    """
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    rows = encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    values = encoded.dictionary
    if content(values.type).kind == "real":
        floats = numbers(values, np.float64)
        broken = np.append((floats != np.floor(floats)) | (np.abs(floats) >= 2.0**63), False)
        findings.note(
            name,
            "numbers that are not whole",
            "round them, or do not list the column under data.categorical",
            (broken & ~np.isnan(np.append(floats, np.nan)))[rows],
        )
        whole = np.where(broken[:-1], 0, floats).astype(np.int64)
        values = pa.array(whole, mask=np.isnan(floats))
    texts = values.cast(pa.string())
    if texts.null_count:
        rows = np.append(np.where(texts.is_null().to_numpy(zero_copy_only=False), -1, np.arange(len(texts))), -1)[rows]
    return texts, rows


def raw_bytes(array: pa.Array, width: int) -> np.ndarray:
    """Fixed-size bytes as uint8 (n, width), a view where possible; what nulls hold is undefined."""
    array = plain(array)
    if pa.types.is_fixed_size_list(array.type):
        array = array.values.slice(array.offset * width, len(array) * width)
        return np.frombuffer(array.buffers()[1], np.uint8, len(array), array.offset).reshape(-1, width)
    buffer = array.buffers()[1]
    return np.frombuffer(buffer, np.uint8, len(array) * width, array.offset * width).reshape(-1, width)


def null_inside(array: pa.Array, width: int) -> np.ndarray:
    """Rows of fixed-size bytes or lists that have a value, but not in each of its places: bool (n,)."""
    array = plain(array)
    if not pa.types.is_fixed_size_list(array.type):
        return np.zeros(len(array), bool)
    values = array.values.slice(array.offset * width, len(array) * width)
    nulls = values.is_null().to_numpy(zero_copy_only=False).reshape(-1, width).any(1)
    inside: np.ndarray = nulls & array.is_valid().to_numpy(zero_copy_only=False)
    return inside


def plain(array: pa.Array) -> pa.Array:
    """The same values without the dress of an extension type or a dictionary."""
    while isinstance(array, (pa.ExtensionArray, pa.DictionaryArray)):
        array = array.storage if isinstance(array, pa.ExtensionArray) else array.dictionary_decode()
    return array
