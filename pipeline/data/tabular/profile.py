"""What is in the columns of a table: types, missing values, distinct values, ranges and counts.

It takes one pass, in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.tabular.arrow_types import (
    ArrowKind,
    InvalidValues,
    dictionary_encode,
    to_float_array,
    unwrap_storage,
)

MAX_DISTINCT_TEXTS = 1_000_000
MAX_DISTINCT_NUMBERS = 10_000
"""Distinct values are counted exactly up to here; beyond, only that there are more is known. (Text needs a larger
limit: a column of text that is almost unique is told from one that repeats by the exact count.)"""

MAX_COUNTED_VALUES = 1_000
"""The rows of each value are counted in columns with up to this many distinct values."""

MAX_TEXT_LENGTH = 200
"""Characters of a text that are kept as a value."""

ISO_TIME = re.compile(r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d+)?)?(Z|[+-]\d{2}:?\d{2})?)?")

Value = str | int | float | bool


@dataclass(frozen=True)
class ColumnProfile:
    """What one column holds.

    kind: as in `arrow_types`, over all files.
    num_nulls: rows without a value, NaN included.
    num_distinct: distinct values of text, numbers and booleans; `has_more_distinct`: there are more than were counted.
    counts: rows of each value, the most frequent first; empty if there are more than `MAX_COUNTED_VALUES` values.
    low, high: of numbers, finite values only; as text of times.
    is_whole: whether all numbers are whole.
    has_infinite: whether a number is infinite.
    is_time_text: whether all texts are ISO 8601 dates or times.
    is_row_number: whether it holds each whole number from 0 or 1 on once.
    length: smallest and largest length of lists.
    """

    name: str
    kind: ArrowKind
    num_rows: int
    num_nulls: int = 0
    num_distinct: int = 0
    has_more_distinct: bool = False
    counts: tuple[tuple[Value, int], ...] = ()
    low: float | str | None = None
    high: float | str | None = None
    is_whole: bool = False
    has_infinite: bool = False
    is_time_text: bool = False
    is_row_number: bool = False
    length: tuple[int, int] | None = None

    @property
    def num_values(self) -> int:
        """Rows with a value."""
        return self.num_rows - self.num_nulls

    @property
    def is_constant(self) -> bool:
        """Whether there are no two rows that differ."""
        if self.num_nulls == self.num_rows:
            return True
        return self.kind.kind in ("text", "whole", "real", "truth") and self.num_distinct == 1 and not self.num_nulls


def profile_columns(kinds: Mapping[str, ArrowKind], batches: Iterable[pa.RecordBatch]) -> dict[str, ColumnProfile]:
    """Return the profile of each column.

    Parameters
    ----------
    kinds: the kinds of the columns over all files, in order.
    batches: all rows; each batch has any of these columns, and each column occurs in all batches or in the same part of
        them (wide tables are read some columns at a time).
    """
    counters = {name: _ColumnCounter(name, kind) for name, kind in kinds.items()}
    for batch in batches:
        for name, array in zip(batch.schema.names, batch.columns, strict=True):
            counters[name].add(array)
    return {name: counter.profile() for name, counter in counters.items()}


class _ColumnCounter:
    """Counts the values of one column, a batch at a time."""

    def __init__(self, name: str, kind: ArrowKind) -> None:
        self._name, self._kind = name, kind
        self._num_rows = self._num_nulls = 0
        self._distinct = _DistinctCounter(MAX_DISTINCT_TEXTS if kind.kind == "text" else MAX_DISTINCT_NUMBERS)
        self._counts: dict[Value, int] | None = {}
        self._low: Any = None
        self._high: Any = None
        self._is_whole, self._has_infinite, self._is_time_text = True, False, True
        self._sum = self._sum_of_squares = np.uint64(0)
        self._lengths: tuple[int, int] | None = None

    def add(self, array: pa.Array) -> None:
        self._num_rows += len(array)
        kind = self._kind.kind
        if pa.types.is_null(array.type):
            self._num_nulls += len(array)
        elif kind == "text":
            self._add_text(array)
        elif kind in ("whole", "real", "truth"):
            self._add_numbers(unwrap_storage(array))
        else:
            self._add_others(unwrap_storage(array))

    def _add_text(self, array: pa.Array) -> None:
        texts, codes = dictionary_encode(array, self._name, InvalidValues(""))
        present, counts = np.unique(codes[codes >= 0], return_counts=True)
        self._num_nulls += len(codes) - int(counts.sum())
        values = texts.take(pa.array(present)).to_pylist()
        if self._is_time_text:
            self._is_time_text = all(ISO_TIME.fullmatch(value) for value in values)
        self._distinct.add(np.fromiter(map(hash, values), np.int64, len(values)))
        self._count([value[:MAX_TEXT_LENGTH] for value in values], counts)

    def _add_numbers(self, array: pa.Array) -> None:
        if self._kind.kind == "whole" and pa.types.is_integer(array.type) and not pa.types.is_uint64(array.type):
            values = array.drop_null().to_numpy(zero_copy_only=False).astype(np.int64)
            unsigned = values.astype(np.uint64)  # modulo 2^64, exact enough to tell a permutation
            self._sum = np.add(self._sum, unsigned.sum(dtype=np.uint64))
            self._sum_of_squares = np.add(self._sum_of_squares, (unsigned * unsigned).sum(dtype=np.uint64))
        else:
            floats = to_float_array(array, np.float64)
            values = floats[~np.isnan(floats)] + 0.0  # -0.0 and 0.0 are one value
        self._num_nulls += len(array) - len(values)
        if values.dtype.kind == "f":
            finite = values[np.isfinite(values)]
            self._has_infinite |= len(finite) < len(values)
            self._is_whole = self._is_whole and bool((finite == np.floor(finite)).all())
        else:
            finite = values
        if len(finite):
            self._extend_range(finite.min().item(), finite.max().item())
        if self._distinct.is_full and self._counts is None:
            return
        distinct, counts = np.unique(values, return_counts=True)
        self._distinct.add(distinct.view(np.int64))
        names = [bool(value) for value in distinct] if self._kind.kind == "truth" else distinct.tolist()
        self._count(names, counts)

    def _add_others(self, array: pa.Array) -> None:
        self._num_nulls += array.null_count
        if self._kind.kind == "time":
            instants = array.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).drop_null().to_numpy()
            if len(instants):
                self._extend_range(np.datetime64(int(instants.min()), "us"), np.datetime64(int(instants.max()), "us"))
        elif self._kind.kind in ("vector", "bytes") and not pa.types.is_fixed_size_binary(array.type):
            ends = pc.min_max(pc.list_value_length(array)).as_py()
            if ends["min"] is not None:
                low, high = self._lengths or (ends["min"], ends["max"])
                self._lengths = min(low, ends["min"]), max(high, ends["max"])

    def _extend_range(self, low: Any, high: Any) -> None:
        self._low = low if self._low is None else min(self._low, low)
        self._high = high if self._high is None else max(self._high, high)

    def _count(self, values: list[Any], counts: np.ndarray) -> None:
        if self._counts is None:
            return
        if len(values) > MAX_COUNTED_VALUES:
            self._counts = None
            return
        for value, count in zip(values, counts.tolist(), strict=True):
            self._counts[value] = self._counts.get(value, 0) + count
        if len(self._counts) > MAX_COUNTED_VALUES:
            self._counts = None

    def profile(self) -> ColumnProfile:
        kind, is_number = self._kind.kind, self._kind.kind in ("whole", "real", "truth")
        counts = sorted((self._counts or {}).items(), key=lambda pair: (-pair[1], str(pair[0])))
        return ColumnProfile(
            name=self._name,
            kind=self._kind,
            num_rows=self._num_rows,
            num_nulls=self._num_nulls,
            num_distinct=self._distinct.count,
            has_more_distinct=self._distinct.is_full,
            counts=tuple(counts),
            low=_format_time(self._low) if kind == "time" else self._low,
            high=_format_time(self._high) if kind == "time" else self._high,
            is_whole=is_number and self._is_whole,
            has_infinite=self._has_infinite,
            is_time_text=kind == "text" and self._is_time_text and self._num_nulls < self._num_rows,
            is_row_number=self._is_row_number(),
            length=self._lengths,
        )

    def _is_row_number(self) -> bool:
        """Return whether the values are a permutation of the whole numbers from 0 or 1 on, by their sums and sums of
        squares."""
        rows, low = self._num_rows, self._low
        if self._kind.kind != "whole" or self._num_nulls or rows < 2 or low not in (0, 1):
            return False
        if self._high != low + rows - 1:
            return False
        last = int(self._high)
        total, squares = last * (last + 1) // 2, last * (last + 1) * (2 * last + 1) // 6
        return (int(self._sum), int(self._sum_of_squares)) == (total % 2**64, squares % 2**64)


class _DistinctCounter:
    """The number of distinct keys, up to a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._keys = np.empty(0, np.int64)
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self.is_full = False

    def add(self, keys: np.ndarray) -> None:
        """Add keys, int64 (n,), distinct among themselves."""
        if self.is_full:
            return
        self._pending.append(keys)
        self._num_pending += len(keys)
        if self._num_pending > max(len(self._keys), 10_000):
            self._merge()

    @property
    def count(self) -> int:
        self._merge()
        return min(len(self._keys), self._limit)

    def _merge(self) -> None:
        if self._pending:
            self._keys = np.unique(np.concatenate([self._keys, *self._pending]))
            self._pending, self._num_pending = [], 0
            if len(self._keys) > self._limit:
                self.is_full = True
                self._keys = self._keys[: self._limit]


def _format_time(instant: np.datetime64 | None) -> str | None:
    """Return a time as text in UTC, without a time of day at midnight and without fractions of zero."""
    return None if instant is None else str(instant).removesuffix(".000000").removesuffix("T00:00:00")
