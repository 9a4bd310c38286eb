"""What was fitted, as plain values in a checkpoint: read back strictly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.errors import DataError

VERSION = 3

READABLE = (2, 3)
"""Before 3, labels that were numbers had no values of their own, and rows of tables no type."""

WHERE = "preprocess.json"


@contextmanager
def check_stored_values(values: Any) -> Iterator[None]:
    """Checks the version of stored values, then guards the reading of them.

    Raises
    ------
    DataError: written by another version; or a value inside is absent or of another type.
    """
    version = values.get("version") if isinstance(values, Mapping) else None
    if version not in READABLE:
        raise DataError(
            f"version {version!r} of preprocessing; this program knows {' and '.join(map(str, READABLE))}",
            where=WHERE,
            fix="use the version of Trainyard that wrote it",
        )
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"damaged: {error!r}", where=WHERE, fix="take another checkpoint") from error


def parse_float_name(value: Any) -> str:
    """A stored name of a type of tables' rows; ValueError if there is no such type."""
    if value not in ("", "float32", "float64"):
        raise ValueError(f"dtype {value!r}")
    return str(value)
