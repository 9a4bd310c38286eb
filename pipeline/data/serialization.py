"""Strict reading of fitted transforms, which checkpoints store as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.errors import DataError

VERSION = 3

ENCODINGS_VERSION = 4
"""Version of transforms that versions of this program before 4 would apply wrongly: those that encode numbers other
than as (x - mean) / std, dates and times, or hashed text."""

READABLE = (2, 3, 4)
"""Before 3, the values of numeric labels and the type of table rows were not stored."""

WHERE = "preprocess.json"


@contextmanager
def check_stored_values(values: Any) -> Iterator[None]:
    """Check the version of stored values, then translate errors of the reading inside.

    Raises
    ------
    DataError: the values were written by another version; or a value read inside is missing or of another type.
    """
    version = values.get("version") if isinstance(values, Mapping) else None
    if version not in READABLE:
        raise DataError(
            f"version {version!r} of preprocessing; this program reads {', '.join(map(str, READABLE))}",
            where=WHERE,
            fix="use the version of Trainyard that wrote it",
        )
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"damaged: {error!r}", where=WHERE, fix="take another checkpoint") from error


def parse_float_name(value: Any) -> str:
    """Return a stored type name of table rows, "" if none was stored; raise ValueError if it is not a float type."""
    if value not in ("", "float32", "float64"):
        raise ValueError(f"dtype {value!r}")
    return str(value)
