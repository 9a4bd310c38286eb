"""The digest of a table's content: equal tables have equal digests, whatever library or version of Arrow made them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

FORMAT = 1
"""Version of the digest, to be increased when equal tables get another one."""


def digest_table(table: pa.Table) -> str:
    """Return the SHA-256 in hex over the names, types and values of the columns, in order.

    Chunks, memory layout, schema metadata, the bytes under nulls and the width of text offsets do not count. Columns
    must not be dictionary-encoded.
    """
    digest = hashlib.sha256(f"{FORMAT} {table.num_rows}\n".encode())
    for name, column in zip(table.column_names, table.columns, strict=True):
        digest.update(f"{name!r}\n".encode("utf-8", "surrogateescape"))
        _update(digest, column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)
    return digest.hexdigest()


def _update(digest: Any, array: pa.Array | pa.ChunkedArray) -> None:
    """Add an array: its type, its length, which values are null, and the others."""
    if isinstance(array, pa.ChunkedArray):  # of more bytes than one array of its type can hold
        array = pa.concat_arrays([_with_wide_offsets(chunk) for chunk in array.chunks])
    if isinstance(array, pa.ExtensionArray):
        digest.update(f"{array.type}\n".encode())
        array = array.storage
    array = _with_wide_offsets(array)
    digest.update(f"{array.type} {len(array)} {array.null_count}\n".encode())
    if array.null_count:
        digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
        array = array.drop_null()
    kind, types = array.type, pa.types
    if types.is_null(kind) or not len(array):
        return
    if types.is_large_binary(kind) or types.is_large_string(kind):
        _update_bytes(digest, pc.binary_length(array))
        first, end = (int(np.frombuffer(array.buffers()[1], np.int64)[array.offset + at]) for at in (0, len(array)))
        if end > first:
            digest.update(memoryview(array.buffers()[2])[first:end])
    elif types.is_large_list(kind) or types.is_fixed_size_list(kind):
        if types.is_large_list(kind):
            _update_bytes(digest, pc.list_value_length(array))
        _update(digest, array.flatten())
    elif types.is_boolean(kind):
        digest.update(np.packbits(array.to_numpy(zero_copy_only=False)).tobytes())
    elif types.is_primitive(kind) or types.is_decimal(kind) or types.is_fixed_size_binary(kind):
        _update_bytes(digest, array)
    else:  # structs and the like, which no model takes
        digest.update(repr(array.to_pylist()).encode("utf-8", "surrogateescape"))


def _with_wide_offsets(array: pa.Array) -> pa.Array:
    """Return text, bytes and lists of variable length with offsets of 64 bits."""
    kind, types = array.type, pa.types
    if types.is_string(kind):
        return array.cast(pa.large_string())
    if types.is_binary(kind):
        return array.cast(pa.large_binary())
    return array.cast(pa.large_list(kind.value_type)) if types.is_list(kind) else array


def _update_bytes(digest: Any, array: pa.Array) -> None:
    """Add the values of an array of fixed width, without nulls. (Arrow's arrays are little-endian.)"""
    width = array.type.bit_width // 8
    digest.update(memoryview(array.buffers()[1])[array.offset * width : (array.offset + len(array)) * width])
