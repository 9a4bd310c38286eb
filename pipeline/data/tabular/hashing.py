"""Hashing of text to a fixed number of buckets: a category for any value, without a list of them."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pyarrow as pa


def bucket_of(text: str, buckets: int) -> int:
    """Return the bucket of a text, 0 to buckets - 1: its 64-bit BLAKE2b digest modulo the number of buckets. It is the
    same in every process, on every machine, and in every version."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") % buckets


def bucket_names(buckets: int) -> tuple[str, ...]:
    """Return the categories of a hashed column: the numbers of the buckets as text."""
    return tuple(map(str, range(buckets)))


def to_bucket_names(texts: pa.Array, codes: np.ndarray, buckets: int) -> pa.Array:
    """Return the bucket of each text, as text; null for those that no code refers to.

    Parameters
    ----------
    texts: distinct texts. codes: positions in it, int64 (n,); negative where a value is missing.
    """
    names: list[str | None] = [None] * len(texts)
    present = np.unique(codes[codes >= 0])
    for position, text in zip(present.tolist(), texts.take(pa.array(present)).to_pylist(), strict=True):
        names[position] = str(bucket_of(text, buckets))
    return pa.array(names, pa.string())
