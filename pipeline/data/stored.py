"""What was fitted, as plain values in a checkpoint: read back strictly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.errors import DataError

VERSION = 2

WHERE = "preprocess.json"


@contextmanager
def reading(values: Any) -> Iterator[None]:
    """Checks the version of stored values, then guards the reading of them.

    Raises
    ------
    DataError: written by another version; or a value inside is absent or of another type.
    """
    version = values.get("version") if isinstance(values, Mapping) else None
    if version != VERSION:
        raise DataError(
            f"version {version!r} of preprocessing; this program knows {VERSION}",
            where=WHERE,
            fix="use the version of Trainyard that wrote it",
        )
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"damaged: {error!r}", where=WHERE, fix="take another checkpoint") from error
